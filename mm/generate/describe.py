"""Description of a clip, as JSON: enough to make it again, and no times, so that the same run writes the same files."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mm
from mm.checkpoint.safetensor_file import hash_file
from mm.config.run.generation import AdapterFile, GenerationEncoders, GenerationRun
from mm.config.run.listed import begins_as
from mm.data.recipe import folder_fingerprint
from mm.generate.camera_line import is_move
from mm.generate.experts import boundary_of
from mm.generate.rows import GenerationRow
from mm.generate.weights import GenerationWeights


def describe_run(
    generation: GenerationRun, device: str, weights: GenerationWeights, low: GenerationWeights | None
) -> dict[str, Any]:
    """Description that all clips of a run share.

    Args:
        generation: the configuration.
        weights: of the transformer; its fingerprint is right when all of them have been read.
        device: kind of device. low: of the expert for little noise; its fingerprint is part of the transformer's.
    """
    sampling = generation.sampling
    sampler: dict[str, Any] = {"sample_solver": sampling.solver}
    if sampling.solver != "euler":
        sampler["solver_order"] = sampling.solver_order or 2
    if sampling.solver == "unipc":
        sampler["solver_type"] = sampling.solver_type or "bh2"
    libraries = {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "av")}
    transformer = {
        "path": str(weights.source.path),
        "format": weights.source.label,
        "dtype": generation.model.precision,
    }
    return {
        "task": generation.task,
        "negative_prompt": generation.negative_text if generation.guided else None,
        "seed": generation.generation.seed,
        "input_size": list(generation.output.size),
        "fps": generation.output.fps,
        **sampler,
        "num_inference_steps": sampling.steps,
        "flow_shift": sampling.shift,
        "guidance_scale": sampling.guidance_scale,
        "batched_guidance": sampling.batched_guidance,
        **_shortened(generation),
        "transformer": transformer | _fp8(generation) | {"fingerprint": fingerprint_of(weights, low)},
        "lora": _adapters(generation.model.adapters, weights),
        **({} if low is None else _low_noise(generation, low)),
        **_encoders(generation.encoders),
        "layout": generation.layout.name(),
        "device": device,
        # torch by its own word, which names the build (2.13.0+cu130); the package's version does not
        "versions": {"mm": mm.__version__, "torch": str(torch.__version__), **libraries},
    }


def _fp8(generation: GenerationRun) -> dict[str, Any]:
    kind = generation.residency.fp8
    return {} if kind is None else {"fp8": kind}


def _shortened(generation: GenerationRun) -> dict[str, Any]:
    """Ways in which sampling is shortened; nothing where it is not, as beside clips of earlier versions."""
    sampling = generation.sampling
    found: dict[str, Any] = {} if sampling.attention == "exact" else {"attention": sampling.attention}
    if sampling.tea_cache is not None:
        found |= dict(zip(("tea_cache_l1_thresh", "tea_cache_model_id"), sampling.tea_cache, strict=True))
    if sampling.windows is not None:
        found |= dict(zip(("sliding_window_size", "sliding_window_stride"), sampling.windows, strict=True))
    return found


def _adapters(sections: Sequence[AdapterFile], weights: GenerationWeights) -> list[dict[str, Any]]:
    each = zip(sections, weights.adapter_fingerprints(), strict=True)
    return [section.model_dump() | {"fingerprint": digits} for section, digits in each]


def _low_noise(generation: GenerationRun, weights: GenerationWeights) -> dict[str, Any]:
    section = generation.model.low_noise
    assert section is not None  # noqa: S101  whose weights these are
    about = {
        "path": str(weights.source.path),
        "format": weights.source.label,
        "lora": _adapters(section.adapters, weights),
        "boundary": boundary_of(section, generation.origins),
        "guidance_scale": section.guidance_scale,
    }
    return {"low_noise": about}


def fingerprint_of(weights: GenerationWeights, low: GenerationWeights | None) -> str:
    """Sixteen hexadecimal digits of a transformer, or of two experts together; of none that was not read."""
    if low is None:
        return weights.fingerprint()
    return hashlib.sha256(f"{weights.fingerprint()} {low.fingerprint()}".encode()).hexdigest()[:16]


def describe_row(row: GenerationRow, run: GenerationRun) -> dict[str, Any]:
    """Description of one clip alone."""
    about: dict[str, Any] = {"prompt": row.prompt, "prompt_index": row.index}
    if row.columns:
        about["columns"] = dict(row.columns)
    for name, paths in row.files.items():
        if name in ("videos", "input_videos"):
            about[name.removesuffix("s")] = _file(paths[0])
            about["start_frame"] = run.inputs.start_frame or 0
            if name == begins_as(run.row_task, run.inputs.shown):
                about["strength"] = run.inputs.strength
                about |= {"strength_steps": "all"} if run.inputs.strength_steps == "all" else {}
        elif name == "cameras":
            about["camera"] = paths[0] if is_move(paths[0]) else _file(paths[0])
        else:
            about[name] = [_file(path) for path in paths]
    if run.inputs.text_only:
        about["text_only"] = True
    return about | run.inputs.settings


def _file(path: str) -> dict[str, str]:
    return {"path": path, "fingerprint": hash_file(Path(path))[:16]}


def _encoders(named: GenerationEncoders) -> dict[str, Any]:
    """Folders, precisions and contents of the parts around the transformer.

    Keys and constants are those that clips of earlier versions have beside them: a clip is kept where they are equal.
    """
    hub, tiles = {"hub_backend": "hf"}, named.vae.tiles
    parts: dict[str, dict[str, Any]] = {
        "ae": {
            "model_id": "wan_video_vae",
            "from_pretrained": named.vae.from_pretrained,
            "dtype": named.vae.precision,
            "enable_tiling": named.vae.tiling,
            "tiling_param": None if tiles is None else {"tile_size": tiles.size, "tile_stride": tiles.stride},
            **({} if named.vae.tile_blend is None else {"tile_blend": named.vae.tile_blend}),
            **({} if named.vae.condition_tiling is None else {"condition_tiling": named.vae.condition_tiling}),
            "norm_latents": True,
            "norm_mode": "channel_specified_shift_scale",
            "do_sample": False,
        },
        "tokenizer": {**hub, "autotokenizer_name": "AutoTokenizer", **named.tokenizer.model_dump()},
        "text_encoder": {
            "model_id": "UMT5",
            **hub,
            "from_pretrained": named.text.from_pretrained,
            "dtype": named.text.precision,
        },
    }
    if named.image is not None:
        folder = {"from_pretrained": named.image.from_pretrained, "dtype": named.image_precision}
        parts["image_encoder"] = {"model_id": "CLIPVisionModel", **hub, **folder}
    return {
        name: {**values, "fingerprint": folder_fingerprint(Path(values["from_pretrained"]))}
        for name, values in parts.items()
    }
