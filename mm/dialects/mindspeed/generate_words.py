"""MindSpeed-MM's word for each value of a generation: a flag, a key of inference_model.json, or either."""

from __future__ import annotations

from typing import Any

from mm.config.flags import flag_name
from mm.config.model import WanConfig
from mm.config.run.origins import Origins, Word
from mm.config.tasks.registry import ALL_COLUMNS
from mm.config.unread import Unread, read_or
from mm.dialects.mindspeed.accepted import value_at
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.words import mesh_words

_SIZE = ("input_size", "pipeline_config.input_size")
GENERATION_WORDS: dict[str, tuple[str | None, str | None]] = {
    "generation.seed": ("seed", "seed"),
    "generation.device": ("device", None),
    "model.precision": (None, "predictor.dtype"),
    "model.weights": ("load", "predictor.from_pretrained"),
    "model.adapters": ("lora", "lora"),
    "model.low_noise": (None, "low_noise"),
    "model.low_noise.weights": ("low_noise", "low_noise.from_pretrained"),
    "model.low_noise.adapters": (None, "low_noise.lora"),
    "model.low_noise.boundary": (None, "low_noise.boundary"),
    "model.low_noise.guidance_scale": (None, "low_noise.guidance_scale"),
    "inputs.prompts": ("prompt", "prompt"),
    "inputs.images": ("image", "image"),
    "inputs.videos": ("video", "video"),
    "inputs.controls": ("control", "control"),
    "inputs.references": ("reference", "reference"),
    "inputs.cameras": ("camera", "camera"),
    "inputs.masks": ("mask", "mask"),
    "inputs.input_videos": ("input_video", "input_video"),
    "inputs.columns": ("columns", "columns"),
    "inputs.negative_prompt": ("negative_prompt", "negative_prompt"),
    "inputs.last_frame": (None, "pipeline_config.dual_image"),
    "inputs.strength": ("strength", "pipeline_config.strength"),
    "inputs.strength_steps": (None, "pipeline_config.strength_steps"),
    "inputs.start_frame": (None, "pipeline_config.start_frame"),
    "inputs.text_only": ("text_only", "pipeline_config.text_only"),
    "inputs.vace_scale": ("vace_scale", "pipeline_config.vace_scale"),
    "sampling.solver": ("sample_solver", "diffusion.model_id"),
    "sampling.steps": ("num_inference_steps", "diffusion.num_inference_steps"),
    "sampling.shift": ("flow_shift", "diffusion.flow_shift"),
    "sampling.guidance_scale": ("guidance_scale", "diffusion.guidance_scale"),
    "sampling.batched_guidance": ("batched_guidance", "diffusion.batched_guidance"),
    "sampling.solver_order": (None, "diffusion.solver_order"),
    "sampling.solver_type": (None, "diffusion.solver_type"),
    "sampling.attention": ("sample_attention", "diffusion.attention"),
    "sampling.tea_cache_threshold": ("tea_cache_l1_thresh", "diffusion.tea_cache_l1_thresh"),
    "sampling.tea_cache_model": ("tea_cache_model_id", "diffusion.tea_cache_model_id"),
    "sampling.window_size": ("sliding_window_size", "diffusion.sliding_window_size"),
    "sampling.window_stride": ("sliding_window_stride", "diffusion.sliding_window_stride"),
    "output.path": ("save_path", "save_path"),
    "output.overwrite": ("overwrite", None),
    "output.num_frames": _SIZE,
    "output.height": _SIZE,
    "output.width": _SIZE,
    "output.fps": ("fps", "fps"),
    "batch.size": ("micro_batch_size", None),
    "residency.device_limit": ("device_memory_limit", None),
    "residency.device_buffer": ("device_memory_buffer", None),
    "residency.staying_parameters": ("staying_parameters", None),
    "residency.host_limit": ("host_memory_limit", None),
    "residency.fp8": ("fp8_weights", None),
    "supervision.timeout_minutes": ("distributed_timeout_minutes", None),
    "encoders.vae.from_pretrained": (None, "ae.from_pretrained"),
    "encoders.vae.precision": (None, "ae.dtype"),
    "encoders.vae.tiling": (None, "ae.enable_tiling"),
    "encoders.vae.tiles": (None, "ae.tiling_param"),
    "encoders.vae.tiles.size": (None, "ae.tiling_param.tile_size"),
    "encoders.vae.tiles.stride": (None, "ae.tiling_param.tile_stride"),
    "encoders.vae.tile_blend": (None, "ae.tile_blend"),
    "encoders.text.from_pretrained": (None, "text_encoder.from_pretrained"),
    "encoders.text.precision": (None, "text_encoder.dtype"),
    "encoders.tokenizer.from_pretrained": (None, "tokenizer.from_pretrained"),
    "encoders.tokenizer.model_max_length": (None, "tokenizer.model_max_length"),
    "encoders.image": (None, "image_encoder"),
    "encoders.image.from_pretrained": (None, "image_encoder.from_pretrained"),
    "encoders.image.precision": (None, "image_encoder.dtype"),
}
"""The flag's field and the key, either of which may be None; a flag that is given wins."""


def generation_origins(flags: GenerateFlags, values: Any) -> Origins:
    """The words of a command line and of the file that it names.

    Args:
        flags: the command line. values: of inference_model.json.
    """
    file = read_or(flags.mm_model, "inference_model.json")
    held = {} if isinstance(values, Unread) else values
    words = {path: _word(flags, held, file, *names) for path, names in GENERATION_WORDS.items()}
    words |= mesh_words(read_or(flags.layerzero_config, None))
    words |= {
        f"model.shape.{name}": Word(name, file, f"predictor.{name}", is_json=True) for name in WanConfig.model_fields
    }
    words["logging.progress_bar"] = Word("--no-progress-bar", spelled=lambda shown: not shown)
    columns = read_or(flags.columns, []) or list((held.get("columns") or {}) if isinstance(held, dict) else {})
    for name in ALL_COLUMNS | {word.partition("=")[0] for word in columns}:
        words[f"inputs.columns.{name}"] = Word(f"columns.{name}", file, is_json=True)
    weights = Word("predictor.from_pretrained", file, is_json=True)
    return Origins(words, also={"model.weights": (weights,)})


def _word(flags: GenerateFlags, held: Any, file: str, flag: str | None, key: str | None) -> Word:
    given = flag in flags.model_fields_set
    if flag is not None and (given or key is None or value_at(held, key) is None):
        return Word(flag_name(flag))
    assert key is not None  # noqa: S101  a value has a flag or a key
    return Word(key, file, is_json=True)
