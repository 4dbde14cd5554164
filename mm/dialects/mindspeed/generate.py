"""`mm generate`'s flags, with inference_model.json under them, as a generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm.config.base import load_json, take_retired
from mm.config.model import WanConfig
from mm.config.run.encoders import ImageEncoderSection, TextEncoderSection
from mm.config.run.generation import (
    AdapterFile,
    GenerationEncoders,
    GenerationRun,
    GenerationSections,
    GenerationVideoEncoder,
    LowNoiseExpert,
)
from mm.config.unread import UNREAD, Unread, broken, built, if_read, is_given, parse_parts, read_or, whole
from mm.dialects.mindspeed.accepted import settle
from mm.dialects.mindspeed.accepted_flags import ACCEPTED_GENERATE_FLAGS
from mm.dialects.mindspeed.as_done_here import mesh_as_done_here
from mm.dialects.mindspeed.contradictions import layerzero_has_its_file
from mm.dialects.mindspeed.extraction import tokenizer
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.generate_words import GENERATION_WORDS, generation_origins
from mm.dialects.mindspeed.inference_json import SCHEDULERS, InferenceModel, LoraSection, PipelineSection
from mm.dialects.mindspeed.inference_retired import RETIRED_GENERATE_FLAGS, RETIRED_INFERENCE_KEYS
from mm.dialects.mindspeed.reading import Reading
from mm.dialects.mindspeed.words import MESH_FLAGS
from mm.dialects.mindspeed.zero_file import load_zero
from mm.errors import Problem


def read_generation(argv: Sequence[str], world_size: int = 1) -> GenerationRun:
    """The generation that the words after `mm generate` ask for, with all that is wrong in them and in their files; not
    yet checked by the rules.
    """
    reading = Reading()
    given = reading.flags(
        GenerateFlags, argv, "mm generate", accepted=ACCEPTED_GENERATE_FLAGS, retired=RETIRED_GENERATE_FLAGS
    )
    flags, notes = mesh_as_done_here(given)
    reading.notes["flags"] += notes
    return translate(flags, reading, world_size)


def translate(flags: GenerateFlags, reading: Reading, world_size: int = 1) -> GenerationRun:
    """The generation that a command line and its files describe, with what is wrong in them.

    Args:
        flags: the command line. reading: what reading it gave. world_size: the processes that were started.
    """
    values, model = reading.attempt(partial(_read_model, flags, reading)), UNREAD
    if not isinstance(values, Unread):
        values, model = values
    zero = reading.attempt(lambda: load_zero(flags))
    parallel = {path.removeprefix("parallel."): flag.read(flags) for path, flag in MESH_FLAGS.items()}
    given = _sections(flags, model)
    given["parallel"] = {**parallel, "layerzero": zero}
    for path in _unread_flags(flags):
        section, name, *_ = path.split(".")
        given[section][name] = UNREAD
    kinds: dict[str, Any] = {name: field.annotation for name, field in GenerationSections.model_fields.items()}
    sections = built(
        GenerationSections,
        {"encoders": _encoders(model), **{name: built(kinds[name], values) for name, values in given.items()}},
    )
    contradictions = broken([_layerzero_has_its_file, _strengths_belong_to_adapters], flags)
    problems = (*reading.problems, *contradictions)
    return GenerationRun.described(sections, generation_origins(flags, values), world_size, problems, reading.told())


def _read_model(flags: GenerateFlags, reading: Reading) -> tuple[Any, InferenceModel]:
    """The values of inference_model.json, and what they are with the flags over them."""
    values, found = settle(load_json(Path(flags.mm_model)), "inference_model.json")
    reading.notes.setdefault(flags.mm_model, []).extend(found)
    reading.problems += take_retired(values, RETIRED_INFERENCE_KEYS, flags.mm_model)
    model, problems = parse_parts(InferenceModel, _with_flags(values, flags), flags.mm_model)
    reading.problems += problems
    return values, model


def _sections(flags: GenerateFlags, model: InferenceModel) -> dict[str, dict[str, Any]]:
    """The values of most sections."""
    predictor, diffusion, pipeline = model.predictor, model.diffusion, model.pipeline_config
    return {
        "generation": {"seed": model.seed, "device": flags.device},
        "model": {
            "shape": if_read(lambda: whole(predictor, WanConfig.model_fields).wan()),
            "precision": predictor.dtype,
            "weights": predictor.from_pretrained,
            "adapters": if_read(lambda: _adapters(model.lora)),
            "low_noise": if_read(lambda: _low_noise(model)),
        },
        "inputs": {
            "prompts": model.prompt,
            "images": model.image,
            "videos": model.video,
            "controls": model.control,
            "references": model.reference,
            "cameras": model.camera,
            "masks": model.mask,
            "input_videos": model.input_video,
            "columns": model.columns,
            "negative_prompt": model.negative_prompt,
            "last_frame": pipeline.dual_image,
            "strength": pipeline.strength,
            "strength_steps": pipeline.strength_steps,
            "start_frame": pipeline.start_frame,
            "text_only": pipeline.text_only,
            "vace_scale": pipeline.vace_scale,
        },
        "sampling": {
            "solver": if_read(lambda: diffusion.solver),
            "steps": diffusion.num_inference_steps,
            "shift": diffusion.flow_shift,
            "guidance_scale": diffusion.guidance_scale,
            "batched_guidance": diffusion.batched_guidance,
            "solver_order": diffusion.solver_order,
            "solver_type": diffusion.solver_type,
            "attention": diffusion.attention,
            "tea_cache_threshold": diffusion.tea_cache_l1_thresh,
            "tea_cache_model": diffusion.tea_cache_model_id,
            "window_size": diffusion.sliding_window_size,
            "window_stride": diffusion.sliding_window_stride,
        },
        "output": {
            "path": model.save_path,
            "overwrite": flags.overwrite,
            "fps": model.fps,
            **_size(pipeline),
        },
        "batch": {"size": flags.micro_batch_size},
        "residency": {
            "device_limit": flags.device_memory_limit,
            "device_buffer": flags.device_memory_buffer,
            "staying_parameters": flags.staying_parameters,
            "host_limit": flags.host_memory_limit,
            "fp8": flags.fp8_weights,
        },
        "supervision": {"timeout_minutes": flags.distributed_timeout_minutes},
        "logging": {"progress_bar": if_read(lambda: not flags.no_progress_bar)},
    }


def _adapters(lora: Sequence[LoraSection]) -> tuple[AdapterFile, ...]:
    return tuple(AdapterFile(path=one.path, strength=one.strength) for one in lora)


def _low_noise(model: InferenceModel) -> LowNoiseExpert | None:
    low = model.low_noise
    if not is_given(low):
        return None
    values = {
        "weights": low.from_pretrained,
        "adapters": if_read(lambda: _adapters(low.lora)),
        "boundary": low.boundary,
        "guidance_scale": low.guidance_scale,
    }
    return built(LowNoiseExpert, values)


def _size(pipeline: PipelineSection) -> dict[str, int]:
    size = pipeline.input_size
    numbers = (UNREAD,) * 3 if isinstance(size, Unread) else size
    return dict(zip(("num_frames", "height", "width"), numbers, strict=True))


def _encoders(model: InferenceModel) -> GenerationEncoders:
    ae, text = model.ae, model.text_encoder
    vae = {
        "from_pretrained": ae.from_pretrained,
        "precision": ae.dtype,
        "tiling": ae.enable_tiling,
        "tiles": if_read(ae.tiles),
        "tile_blend": ae.tile_blend,
    }
    parts = {
        "vae": built(GenerationVideoEncoder, vae),
        "text": built(TextEncoderSection, {"from_pretrained": text.from_pretrained, "precision": text.dtype}),
        "tokenizer": tokenizer(model.tokenizer),
        "image": if_read(lambda: _image_encoder(model)),
    }
    return built(GenerationEncoders, parts)


def _image_encoder(model: InferenceModel) -> ImageEncoderSection | None:
    given = model.image_encoder
    if given is None:
        return None
    return built(ImageEncoderSection, {"from_pretrained": given.from_pretrained, "precision": given.dtype})


def _layerzero_has_its_file(flags: GenerateFlags) -> Iterator[Problem]:
    """CFG-045."""
    yield from layerzero_has_its_file(layerzero=flags.layerzero, config=flags.layerzero_config)


def _strengths_belong_to_adapters(flags: GenerateFlags) -> Iterator[Problem]:
    """CFG-122: a strength for each adapter, or none."""
    if flags.lora_strength and len(flags.lora_strength) != len(flags.lora):
        found = f"--lora-strength has {len(flags.lora_strength)} numbers, and --lora {len(flags.lora)} files."
        yield Problem("CFG-122", found, "Give one number for each file, or none.")


def _unread_flags(flags: GenerateFlags) -> Iterator[str]:
    """The paths whose flag is there and could not be read; the file's value is not what was asked for."""
    for path, (flag, _) in GENERATION_WORDS.items():
        if flag is not None and isinstance(getattr(flags, flag), Unread):
            yield path


_LISTS = ("prompt", "image", "video", "control", "reference", "camera", "mask", "input_video")
_SAME_NAME = (*_LISTS, "negative_prompt", "save_path", "seed", "fps")
_SAME_DIFFUSION = (
    "num_inference_steps",
    "flow_shift",
    "guidance_scale",
    "tea_cache_l1_thresh",
    "tea_cache_model_id",
    "sliding_window_size",
    "sliding_window_stride",
)


def _with_flags(values: Any, flags: GenerateFlags) -> Any:
    """A copy of the file's values in which the given flags take the place of theirs."""
    if not isinstance(values, dict):
        return values  # `parse_parts` says what is wrong with it
    said = {name: read_or(getattr(flags, name), None) for name in GenerateFlags.model_fields}
    given = {
        (): {name: said[name] for name in _SAME_NAME},
        ("pipeline_config",): {
            "input_size": said["input_size"] or None,
            "strength": said["strength"],
            "text_only": said["text_only"] or None,
            "vace_scale": said["vace_scale"],
        },
        ("diffusion",): {
            "model_id": SCHEDULERS.get(said["sample_solver"]),
            "batched_guidance": said["batched_guidance"] or None,
            "attention": said["sample_attention"],
            **{name: said[name] for name in _SAME_DIFFUSION},
        },
        ("predictor",): {"from_pretrained": said["load"]},
        ("low_noise",): {"from_pretrained": said["low_noise"]},
    }
    if said["lora"]:
        strengths = said["lora_strength"] or [1.0] * len(said["lora"])
        # zip: another number of strengths is CFG-122
        adapters = [{"path": path, "strength": one} for path, one in zip(said["lora"], strengths, strict=False)]
        values = values | {"lora": adapters}
    if said["columns"]:
        values = values | {"columns": dict(word.split("=", 1) for word in said["columns"])}
    result = dict(values)
    for path, settings in given.items():
        settings = {name: value for name, value in settings.items() if value is not None}
        if not path:
            result |= settings
        elif settings and isinstance(held := {} if result.get(path[0]) is None else result[path[0]], dict):
            result[path[0]] = held | settings
    return result
