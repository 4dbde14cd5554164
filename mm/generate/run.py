"""A whole generation: prompts in, clips out, one part of the model on the device after the other."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mm
from mm.checkpoint.safetensor_file import bytes_of
from mm.checkpoint.weights import WeightSource, load_into, open_weights
from mm.config.inference import InferenceModel
from mm.config.model import WanConfig
from mm.data.recipe import folder_fingerprint
from mm.diffusion.samplers import make_sampler
from mm.errors import ConfigError, DataError, Problem, raise_all
from mm.generate.pipeline import denoise, initial_latents, pad_text, to_frames
from mm.generate.prompts import read_prompts
from mm.generate.video import clip_path, prepare_folder, write_clip
from mm.wan.encoders import DTYPES, TextEncoder, VideoEncoder
from mm.wan.model import WanModel

log = logging.getLogger(__name__)


def generate_clips(
    config: InferenceModel,
    device: torch.device,
    *,
    micro_batch_size: int = 1,
    overwrite: bool = False,
    show_progress: bool = True,
) -> list[Path]:
    """Generate one clip for each prompt and write it as soon as it is done.

    Args:
        config: checked by `mm.config.inference.load_inference`.
        device: where everything is computed.
        micro_batch_size: prompts in one forward.
        overwrite: replace clips that exist.
        show_progress: draw a progress bar over prompts times steps.

    Returns:
        The clips' paths, in the order of the prompts.

    Raises:
        ConfigError: CFG-065 and CFG-066 when the parts of the model do not fit each other or the configuration.
        DataError: DATA-050 to DATA-056 for prompts and clips, DATA-020 to DATA-045 for weights that cannot be used.
        CheckpointError: CKPT-010 to CKPT-021 for weights that cannot be used.
    """
    prompts = read_prompts(Path(config.prompt))
    folder = Path(config.save_path)
    prepare_folder(folder, len(prompts), overwrite=overwrite)
    source = open_weights(config.predictor.from_pretrained or "")
    _require_same_shape(source, config.predictor.wan())
    text, negative = _encode_text(config, prompts, device)
    video = VideoEncoder.from_pretrained(Path(config.ae.from_pretrained), config.ae.dtype, device, config.ae.tiling())
    _require_fitting_parts(config, text[0], video)
    model = _load_transformer(source, config, device)
    description = _describe(config, source, model, device)
    steps = config.diffusion.num_inference_steps
    paths = []
    with tqdm(total=len(prompts) * steps, desc="generating", unit="step", disable=not show_progress) as bar:
        for batch in _batches(len(prompts), micro_batch_size):
            latents = _sample(config, model, batch, [text[index] for index in batch], negative, bar, device)
            frames = to_frames(video.decode(latents))
            _require_size(frames, config)
            for index, clip in zip(batch, frames, strict=True):
                path = clip_path(folder, index)
                write_clip(path, clip, config.fps, {"prompt": prompts[index], "prompt_index": index, **description})
                paths.append(path)
    log.info("%d clips are in %s", len(paths), folder)
    return paths


def weights_fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of all parameters' names and bits, whatever file they came from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}:".encode())
        digest.update(bytes_of(parameter))
    return digest.hexdigest()[:16]


def _encode_text(
    config: InferenceModel, prompts: Sequence[str], device: torch.device
) -> tuple[list[Tensor], Tensor | None]:
    """Features of the prompts and, where guidance uses it, of the negative prompt, on the CPU.

    One text at a time, so that features do not depend on their neighbours; the encoder is dropped afterwards and
    leaves the device to the transformer.
    """
    encoder = TextEncoder.from_pretrained(
        Path(config.text_encoder.from_pretrained),
        Path(config.tokenizer.from_pretrained),
        config.text_encoder.dtype,
        device,
        config.tokenizer.model_max_length,
    )
    negative = encoder.encode([config.negative_prompt])[0].cpu() if config.diffusion.guided else None
    return [encoder.encode([prompt])[0].cpu() for prompt in prompts], negative


def _load_transformer(source: WeightSource, config: InferenceModel, device: torch.device) -> WanModel:
    """The transformer on the device in its precision; no copy of it is made on the way."""
    with torch.device("meta"):
        model = WanModel(config.predictor.wan())
    model.to_precision(DTYPES[config.predictor.dtype]).to_empty(device=device)
    load_into(model, source)
    return model.eval().requires_grad_(False)


def _sample(
    config: InferenceModel,
    model: WanModel,
    batch: Sequence[int],
    text: Sequence[Tensor],
    negative: Tensor | None,
    bar: tqdm[None],
    device: torch.device,
) -> Tensor:
    """Latents [B, C, F, H, W] of the clips of one batch of prompts."""
    diffusion, predictor = config.diffusion, config.predictor
    sampler = make_sampler(
        diffusion.solver,
        diffusion.num_inference_steps,
        diffusion.flow_shift,
        device=device,
        solver_order=diffusion.solver_order,
        solver_type=diffusion.solver_type,
    )
    return denoise(
        model,
        initial_latents(config.seed, batch, (predictor.in_dim, *config.latent_size())).to(device),
        pad_text(text, predictor.text_len).to(device),
        None if negative is None else pad_text([negative] * len(batch), predictor.text_len).to(device),
        sampler,
        diffusion.guidance_scale,
        on_step=lambda: bar.update(len(batch)),
    )


def _batches(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _require_same_shape(source: WeightSource, ours: WanConfig) -> None:
    """Compare what the weights say about themselves with the predictor section: tensors do not tell the heads."""
    theirs = source.config()
    if theirs is None:
        return
    raise_all(
        ConfigError,
        [
            Problem(
                "CFG-065",
                f"{source.path} has {name} {getattr(theirs, name)}, "
                f"and predictor.{name} in inference_model.json is {getattr(ours, name)}.",
                "Correct the predictor section, or name other weights.",
            )
            for name in theirs.differing_fields(ours)
        ],
    )


def _require_fitting_parts(config: InferenceModel, text: Tensor, video: VideoEncoder) -> None:
    channels = len(video.vae.config.latents_mean)
    predictor = config.predictor
    problems = [
        Problem("CFG-066", f"{what} is {found}, and predictor.{name} is {expected}.", "Use the parts of one model.")
        for what, found, name, expected in (
            (f"The width of {config.text_encoder.from_pretrained}", text.shape[-1], "text_dim", predictor.text_dim),
            (f"The number of channels of {config.ae.from_pretrained}", channels, "in_dim", predictor.in_dim),
            (f"The number of channels of {config.ae.from_pretrained}", channels, "out_dim", predictor.out_dim),
        )
        if found != expected
    ]
    raise_all(ConfigError, problems)


def _require_size(frames: Tensor, config: InferenceModel) -> None:
    """The VAE's stride is the one that the latents' size was computed with."""
    if tuple(frames.shape[1:4]) != config.pipeline_config.input_size:
        raise DataError(
            "DATA-055",
            f"{config.ae.from_pretrained} made clips of {tuple(frames.shape[1:4])} where (frames, height, width) "
            f"{config.pipeline_config.input_size} were expected.",
            "Use the VAE of a Wan2.1 model (stride 4x8x8).",
        )


def _describe(config: InferenceModel, source: WeightSource, model: WanModel, device: torch.device) -> dict[str, Any]:
    """What made the clips, enough to make them again; without times, so that the same run writes the same files."""
    diffusion = config.diffusion
    sampler: dict[str, Any] = {"sample_solver": diffusion.solver}
    if diffusion.solver == "unipc":
        sampler |= {"solver_order": diffusion.solver_order, "solver_type": diffusion.solver_type}
    encoders = config.model_dump(mode="json", include={"ae", "text_encoder", "tokenizer"})
    libraries = {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "av")}
    return {
        "negative_prompt": config.negative_prompt if diffusion.guided else None,
        "seed": config.seed,
        "input_size": list(config.pipeline_config.input_size),
        "fps": config.fps,
        **sampler,
        "num_inference_steps": diffusion.num_inference_steps,
        "flow_shift": diffusion.flow_shift,
        "guidance_scale": diffusion.guidance_scale,
        "transformer": {
            "path": str(source.path),
            "format": source.label,
            "dtype": config.predictor.dtype,
            "fingerprint": weights_fingerprint(model),
        },
        **{
            name: {**values, "fingerprint": folder_fingerprint(Path(values["from_pretrained"]))}
            for name, values in encoders.items()
        },
        "device": device.type,
        # torch by its own word, which names the build (2.13.0+cu130); the package's version does not
        "versions": {"mm": mm.__version__, "torch": str(torch.__version__), **libraries},
    }
