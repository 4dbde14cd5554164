"""Description of a clip, as JSON: enough to make it again, and no times, so that the same run writes the same files."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

import mm
from mm.checkpoint.safetensor_file import hash_file
from mm.config.inference import InferenceModel
from mm.config.run.generation import GenerationRun
from mm.data.recipe import folder_fingerprint
from mm.generate.rows import GenerationRow
from mm.generate.weights import GenerationWeights


def describe_run(generation: GenerationRun, weights: GenerationWeights, device: str) -> dict[str, Any]:
    """Description that all clips of a run share.

    Args:
        generation: the configuration.
        weights: of the transformer; its fingerprint is right when all of them have been read.
        device: kind of device.
    """
    config = generation.config
    diffusion = config.diffusion
    sampler: dict[str, Any] = {"sample_solver": diffusion.solver}
    if diffusion.solver == "unipc":
        sampler |= {"solver_order": diffusion.solver_order, "solver_type": diffusion.solver_type}
    libraries = {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "av")}
    transformer = {"path": str(weights.source.path), "format": weights.source.label, "dtype": config.predictor.dtype}
    return {
        "task": config.task,
        "negative_prompt": config.negative_text if diffusion.guided else None,
        "seed": config.seed,
        "input_size": list(config.pipeline_config.input_size),
        "fps": config.fps,
        **sampler,
        "num_inference_steps": diffusion.num_inference_steps,
        "flow_shift": diffusion.flow_shift,
        "guidance_scale": diffusion.guidance_scale,
        "batched_guidance": diffusion.batched_guidance,
        "transformer": transformer | {"fingerprint": weights.fingerprint()},
        "lora": [
            section.model_dump() | {"fingerprint": digits}
            for section, digits in zip(config.lora, weights.adapter_fingerprints(), strict=True)
        ],
        **_encoders(config),
        "layout": generation.layout.name(),
        "device": device,
        # torch by its own word, which names the build (2.13.0+cu130); the package's version does not
        "versions": {"mm": mm.__version__, "torch": str(torch.__version__), **libraries},
    }


def describe_row(row: GenerationRow, config: InferenceModel) -> dict[str, Any]:
    """Description of one clip alone."""
    about: dict[str, Any] = {"prompt": row.prompt, "prompt_index": row.index}
    if row.images:
        about["images"] = [{"path": str(path), "fingerprint": hash_file(path)[:16]} for path in row.images]
    if row.columns:
        about["columns"] = dict(row.columns)
    if row.video is not None:
        section = config.pipeline_config
        about["video"] = {"path": str(row.video), "fingerprint": hash_file(row.video)[:16]}
        about |= {"strength": section.strength, "start_frame": section.start_frame or 0}
    return about


def _encoders(config: InferenceModel) -> dict[str, Any]:
    """Folders, precisions and contents of the parts around the transformer."""
    parts = {"ae", "text_encoder", "tokenizer"} | ({"image_encoder"} if config.image_encoder is not None else set())
    return {
        name: {**values, "fingerprint": folder_fingerprint(Path(values["from_pretrained"]))}
        for name, values in config.model_dump(mode="json", include=parts).items()
    }
