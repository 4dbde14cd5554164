"""Flags and file of the generation command. A flag that is given wins over the same value in inference_model.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mm.config.base import Section, load_json, parse, take_retired
from mm.config.data import TokenizerConfig
from mm.config.extract import AutoencoderConfig, TextEncoderConfig
from mm.config.flags import Flags
from mm.config.inference_retired import RETIRED_INFERENCE_KEYS
from mm.config.model import Precision, WanConfig
from mm.errors import ConfigError, Problem, raise_all

# The negative prompt of the Wan2.1 release (wan/configs/shared_config.py), which its models are meant to be used with.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# Pixels that one latent stands for: frames after the first, rows, columns. Fixed by the Wan2.1 VAE.
VAE_STRIDE = (4, 8, 8)


class VaeSection(AutoencoderConfig):
    """The `ae` section: the VAE's folder, the precision and, to save memory, the tiles it decodes in."""

    @model_validator(mode="after")
    def _tiles_cover_the_frame(self) -> VaeSection:
        if self.tiling_param is not None:
            if not self.enable_tiling:
                raise ValueError("tiling_param has no effect while enable_tiling is false")
            for size, stride in zip(self.tiling_param.tile_size, self.tiling_param.tile_stride, strict=True):
                if stride > size:
                    raise ValueError(f"tiles of {size} every {stride} latent pixels leave gaps")
        return self


class InferencePredictor(WanConfig):
    """The `predictor` section: the transformer's shape, precision and, unless `--load` says it, its weights."""

    model_type: Literal["t2v"] = "t2v"  # no other is given its images yet
    model_id: Literal["wandit"] = "wandit"
    from_pretrained: str | None = Field(None, min_length=1)
    dtype: Precision

    def wan(self) -> WanConfig:
        """The transformer's shape alone."""
        return WanConfig.model_validate({name: getattr(self, name) for name in WanConfig.model_fields})


class InferenceDiffusion(Section):
    """The `diffusion` section: how the velocity is integrated.

    Attributes:
        model_id: the sampler, under the name of its diffusers class.
        num_inference_steps: evaluations of the model for each prompt; twice as many with guidance.
        flow_shift: of the noise levels; 3 for 480p and 5 for 720p are usual.
        guidance_scale: of classifier-free guidance; exactly 1 leaves the negative prompt out.
        solver_order, solver_type: of UniPC alone.
    """

    model_id: Literal["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"] = "UniPCMultistepScheduler"
    num_inference_steps: int = Field(50, ge=1)
    flow_shift: float = Field(gt=0)
    guidance_scale: float = Field(5.0, ge=0)
    solver_order: Literal[1, 2, 3] = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"

    @property
    def solver(self) -> Literal["unipc", "euler"]:
        """The sampler's short name."""
        return "unipc" if self.model_id == "UniPCMultistepScheduler" else "euler"

    @property
    def guided(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.guidance_scale != 1


class PipelineSection(Section):
    """The `pipeline_config` section: frames, height and width of the clips in pixels."""

    input_size: tuple[int, int, int]


class InferenceModel(Section):
    """inference_model.json.

    Attributes:
        prompt: a text file, one prompt a line.
        negative_prompt: what guidance leads away from; the default is the Wan2.1 release's.
        save_path: folder for the clips. fps: frames a second of the clips.
        seed: with the prompt's index it decides the initial noise.
    """

    pipeline_class: Literal["WanPipeline"] = "WanPipeline"
    prompt: str
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    save_path: str
    fps: int = Field(16, ge=1, le=240)
    seed: int = Field(42, ge=0)
    pipeline_config: PipelineSection
    ae: VaeSection
    tokenizer: TokenizerConfig
    text_encoder: TextEncoderConfig
    predictor: InferencePredictor
    diffusion: InferenceDiffusion

    def latent_size(self) -> tuple[int, int, int]:
        """(F, H, W) of the latents of one clip."""
        frames, height, width = self.pipeline_config.input_size
        return (frames - 1) // VAE_STRIDE[0] + 1, height // VAE_STRIDE[1], width // VAE_STRIDE[2]


class GenerateFlags(Flags):
    """Generate one clip for each prompt of a file. A flag that is given wins over the same value in the json file."""

    mm_model: str = Field(description="inference_model.json")
    load: str | None = Field(None, description="transformer weights; default: predictor.from_pretrained of the json")
    prompt: str | None = Field(None, description="text file, one prompt a line; default: from the json")
    negative_prompt: str | None = Field(None, description="default: from the json, else that of the Wan2.1 release")
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
    micro_batch_size: int = Field(1, ge=1, description="prompts in one forward")
    device: Literal["cpu", "cuda", "npu"] | None = Field(None, description="kind of device; default: the best there is")
    no_progress_bar: bool = Field(False, description="log lines only")

    @field_validator("input_size")
    @classmethod
    def _three_numbers(cls, value: list[int]) -> list[int]:
        if len(value) not in (0, 3):
            raise ValueError("it takes three numbers: frames, height and width")
        return value


def load_inference(flags: GenerateFlags) -> InferenceModel:
    """Read inference_model.json, put the flags over it and check the result.

    Raises:
        ConfigError: CFG-001 to CFG-005 from reading, CFG-008 for a key that means nothing here, and CFG-060 to CFG-064
            from the rules below.
    """
    values = load_json(Path(flags.mm_model))
    problems = list(take_retired(values, RETIRED_INFERENCE_KEYS, flags.mm_model))
    try:
        config = parse(InferenceModel, _with_flags(values, flags), flags.mm_model)
    except ConfigError as error:
        raise_all(ConfigError, [*problems, *error.problems])
        raise
    raise_all(ConfigError, [*problems, *_broken_rules(config, flags.mm_model)])
    return config


def _with_flags(values: Any, flags: GenerateFlags) -> Any:
    """A copy of the file's values in which the given flags take the place of theirs."""
    if not isinstance(values, dict):
        return values  # `parse` says what is wrong with it
    solvers = {"unipc": "UniPCMultistepScheduler", "euler": "FlowMatchEulerDiscreteScheduler", None: None}
    given = {
        (): {name: getattr(flags, name) for name in ("prompt", "negative_prompt", "save_path", "seed", "fps")},
        ("pipeline_config",): {"input_size": flags.input_size or None},
        ("diffusion",): {
            "model_id": solvers[flags.sample_solver],
            "num_inference_steps": flags.num_inference_steps,
            "flow_shift": flags.flow_shift,
            "guidance_scale": flags.guidance_scale,
        },
        ("predictor",): {"from_pretrained": flags.load},
    }
    result = dict(values)
    for path, settings in given.items():
        settings = {name: value for name, value in settings.items() if value is not None}
        if not path:
            result |= settings
        elif settings and isinstance(result.get(path[0], {}), dict):
            result[path[0]] = result.get(path[0], {}) | settings
    return result


def _broken_rules(config: InferenceModel, source: str) -> Iterator[Problem]:
    yield from _impossible_size(config)
    if config.predictor.from_pretrained is None:
        yield Problem(
            "CFG-062",
            f"Neither --load nor predictor.from_pretrained in {source} says where the transformer is.",
            "Give one of them.",
        )
    unipc_only = sorted({"solver_order", "solver_type"} & config.diffusion.model_fields_set)
    if unipc_only and config.diffusion.solver == "euler":
        yield Problem(
            "CFG-063",
            f"{source}: diffusion.{' and diffusion.'.join(unipc_only)} has no effect with the Euler sampler.",
            "Remove it, or choose UniPC.",
        )
    if config.tokenizer.model_max_length > config.predictor.text_len:
        yield Problem(
            "CFG-064",
            f"{source}: tokenizer.model_max_length is {config.tokenizer.model_max_length}, more than the "
            f"{config.predictor.text_len} text tokens of predictor.text_len.",
            "Lower model_max_length; prompts are cut there.",
        )


def _impossible_size(config: InferenceModel) -> Iterator[Problem]:
    frames, height, width = config.pipeline_config.input_size
    stride, patch = VAE_STRIDE, config.predictor.patch_size
    if frames < 1 or (frames - 1) % stride[0]:
        below = max(1, (frames - 1) // stride[0] * stride[0] + 1)
        yield Problem(
            "CFG-060",
            f"input_size asks for {frames} frames; the VAE makes 4k + 1.",
            f"Use {below} or {below + stride[0]}.",
        )
    for name, size, multiple in (("height", height, stride[1] * patch[1]), ("width", width, stride[2] * patch[2])):
        if size < multiple or size % multiple:
            below = max(multiple, size // multiple * multiple)
            yield Problem(
                "CFG-061",
                f"input_size asks for a {name} of {size} pixels, which is no positive multiple of {multiple}.",
                f"Use {below} or {below + multiple}.",
            )
