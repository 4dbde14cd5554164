"""Flags of the generation command, and the configuration that they and inference_model.json make together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from mm.config.base import load_json, parse, take_retired
from mm.config.inference import InferenceModel
from mm.config.inference_retired import RETIRED_INFERENCE_KEYS
from mm.config.model import WanConfig
from mm.config.rules.generation import GENERATION_RULES
from mm.config.rules.mesh import MESH_RULES
from mm.config.run.generation import GenerationRun
from mm.config.run.origins import Origins, Word
from mm.config.run.parallel import MeshSection
from mm.dialects.mindspeed.accepted import Note, said, settle
from mm.dialects.mindspeed.contradictions import layerzero_has_its_file
from mm.dialects.mindspeed.mesh_flags import MeshFlags
from mm.dialects.mindspeed.words import MESH_FLAGS, mesh_words
from mm.dialects.mindspeed.zero_file import load_zero
from mm.errors import ConfigError, Problem, raise_all


class GenerateFlags(MeshFlags):
    """Generate one clip for each prompt of a file. A flag that is given wins over the same value in the json file."""

    may_be_empty = frozenset({"negative_prompt"})
    groups: ClassVar[Mapping[str, str]] = {
        "load": "files",
        "prompt": "what is asked for",
        "lora": "LoRA",
        "negative_prompt": "what is asked for",
        "save_path": "clips",
        "seed": "sampling",
        "input_size": "clips",
        "sample_solver": "sampling",
        "micro_batch_size": "batches",
        "no_progress_bar": "logging",
    }

    mm_model: str = Field(description="inference_model.json")
    load: str | None = Field(None, description="transformer weights; default: predictor.from_pretrained of the json")
    prompt: str | None = Field(None, description="text file, one prompt a line; default: from the json")
    image: str | None = Field(
        None, description="text file, one image a line, or first and last with a comma between; default: from the json"
    )
    video: str | None = Field(None, description="text file, one video a line; default: from the json")
    columns: list[str] = Field(
        [], description="NAME=FILE: numbers that the task takes, one a line for each prompt; default: from the json"
    )
    strength: float | None = Field(
        None, description="share of the steps taken from a given video, above 0 to 1; default: from the json"
    )
    lora: list[str] = Field([], description="adapter files to add to the weights; default: from the json")
    lora_strength: list[float] = Field([], description="factor on each adapter of --lora; default: 1")
    negative_prompt: str | None = Field(
        None, description="default: from the json, else that of the Wan2.1 release for the task"
    )
    save_path: str | None = Field(None, description="folder for the clips; default: from the json")
    overwrite: bool = Field(False, description="replace clips that exist; otherwise they are an error")
    seed: int | None = Field(None, ge=0, description="seed of the initial noise; default: from the json")
    input_size: list[int] = Field([], description="frames, height and width in pixels; default: from the json")
    fps: int | None = Field(None, description="frames a second of the clips; default: from the json")
    sample_solver: Literal["unipc", "euler"] | None = Field(None, description="sampler; default: from the json")
    num_inference_steps: int | None = Field(None, ge=1, description="sampler steps; default: from the json")
    flow_shift: float | None = Field(None, gt=0, description="shift of the noise levels; default: from the json")
    guidance_scale: float | None = Field(
        None, ge=0, description="1 leaves the negative prompt out; default: from the json"
    )
    batched_guidance: bool = Field(False, description="both prompts of guidance in one pass of twice the batch")
    micro_batch_size: int = Field(1, ge=1, description="prompts in one forward")
    no_progress_bar: bool = Field(False, description="log lines only")

    @field_validator("columns")
    @classmethod
    def _names_and_files(cls, value: list[str]) -> list[str]:
        if not all(re.fullmatch(r"\w+=.+", word) for word in value):
            raise ValueError("it takes words such as NAME=FILE")
        return value

    @field_validator("input_size")
    @classmethod
    def _three_numbers(cls, value: list[int]) -> list[int]:
        if len(value) not in (0, 3):
            raise ValueError("it takes three numbers: frames, height and width")
        return value


def load_generation(flags: GenerateFlags, world_size: int) -> GenerationRun:
    """Read inference_model.json and zero_config.yaml, put the flags over the former, and check everything.

    Args:
        flags: the command line.
        world_size: the processes that were started.

    Raises:
        ConfigError: what `load_inference` and `mm.dialects.mindspeed.zero_file.load_zero` raise, and CFG-032 to CFG-037
            and CFG-045 for what the processes cannot do.
    """
    notes: list[Note] = []
    config, zero = load_inference(flags, notes), load_zero(flags)
    values = {path.removeprefix("parallel."): flag.read(flags) for path, flag in MESH_FLAGS.items()}
    words = mesh_words(flags.layerzero_config)
    words |= {f"model.shape.{name}": Word(name, flags.mm_model, is_json=True) for name in WanConfig.model_fields}
    words["model.precision"] = Word("predictor.dtype", flags.mm_model, is_json=True)
    parallel = MeshSection(**values, layerzero=zero)
    told = (said(flags.mm_model, notes),) if notes else ()
    run = GenerationRun(config=config, parallel=parallel, origins=Origins(words), world_size=world_size, notes=told)
    problems = list(layerzero_has_its_file(layerzero=flags.layerzero, config=flags.layerzero_config))
    raise_all(ConfigError, [*(problem for rule in MESH_RULES for problem in rule(run)), *problems])
    return run


def load_inference(flags: GenerateFlags, notes: list[Note] | None = None) -> InferenceModel:
    """Read inference_model.json, put the flags over it and check the result.

    Args:
        flags: the command line.
        notes: gets what the file says that is how it is done here anyway, and what goes by another name here.

    Raises:
        ConfigError: CFG-001 to CFG-005 from reading, CFG-008 for a key that means nothing here, CFG-122 for strengths
            without adapters, and what `mm.config.rules.generation` has rules for.
    """
    values, settled = settle(load_json(Path(flags.mm_model)), "inference_model.json")
    if notes is not None:
        notes += settled
    problems = list(take_retired(values, RETIRED_INFERENCE_KEYS, flags.mm_model))
    if flags.lora_strength and len(flags.lora_strength) != len(flags.lora):
        found = f"--lora-strength has {len(flags.lora_strength)} numbers, and --lora {len(flags.lora)} files."
        problems.append(Problem("CFG-122", found, "Give one number for each file, or none."))
    try:
        config = parse(InferenceModel, _with_flags(values, flags), flags.mm_model)
    except ConfigError as error:
        raise_all(ConfigError, [*problems, *error.problems])
        raise
    raise_all(ConfigError, problems + [p for rule in GENERATION_RULES for p in rule(config, flags.mm_model)])
    return config


_SAME_NAME = ("prompt", "image", "video", "negative_prompt", "save_path", "seed", "fps")


def _with_flags(values: Any, flags: GenerateFlags) -> Any:
    """A copy of the file's values in which the given flags take the place of theirs."""
    if not isinstance(values, dict):
        return values  # `parse` says what is wrong with it
    solvers = {"unipc": "UniPCMultistepScheduler", "euler": "FlowMatchEulerDiscreteScheduler", None: None}
    given = {
        (): {name: getattr(flags, name) for name in _SAME_NAME},
        ("pipeline_config",): {"input_size": flags.input_size or None, "strength": flags.strength},
        ("diffusion",): {
            "model_id": solvers[flags.sample_solver],
            "num_inference_steps": flags.num_inference_steps,
            "flow_shift": flags.flow_shift,
            "guidance_scale": flags.guidance_scale,
            "batched_guidance": flags.batched_guidance or None,
        },
        ("predictor",): {"from_pretrained": flags.load},
    }
    if flags.lora:
        strengths = flags.lora_strength or [1.0] * len(flags.lora)
        # zip: another number of strengths is CFG-122
        values = values | {"lora": [{"path": p, "strength": s} for p, s in zip(flags.lora, strengths, strict=False)]}
    if flags.columns:
        values = values | {"columns": dict(word.split("=", 1) for word in flags.columns)}
    result = dict(values)
    for path, settings in given.items():
        settings = {name: value for name, value in settings.items() if value is not None}
        if not path:
            result |= settings
        elif settings and isinstance(result.get(path[0], {}), dict):
            result[path[0]] = result.get(path[0], {}) | settings
    return result
