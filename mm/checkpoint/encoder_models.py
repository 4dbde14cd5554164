"""An encoder as a model, from a file of the original release, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mm.checkpoint.encoder_sizes import sizes_of
from mm.checkpoint.encoders import EncoderSource, hf_entries, hf_name
from mm.checkpoint.mismatch import raise_on_mismatch
from mm.checkpoint.safetensor_file import Entry
from mm.wan.names_t5 import EMBEDDING, TIED_EMBEDDING


def load_encoder(source: EncoderSource, dtype: torch.dtype, device: torch.device) -> Any:
    """Build the encoder of a source. One tensor at a time is read and put on the device.

    Args:
        source: from `mm.checkpoint.encoders.open_encoder`, in the original's names.
        dtype: of all parameters. device: where they lie.

    Returns:
        diffusers' AutoencoderKLWan, or transformers' UMT5EncoderModel or CLIPVisionModelWithProjection.

    Raises:
        CheckpointError: CKPT-011 for tensors that are missing, left over or of another shape, CKPT-023 for sizes of no
            published encoder.
    """
    with torch.device("meta"):
        model, _ = source.encoder.build(_config(source))
    entries = {entry.name: entry for entry in hf_entries(source)}
    targets = {name: _key(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    _require_fit(model, source, entries, targets)
    made: dict[str, nn.Parameter] = {}  # tied parameters are one
    for name, key in targets.items():
        if key not in made:
            made[key] = nn.Parameter(entries[key].read().to(device, dtype), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[key])
    _place_buffers(model, device)
    return model.eval()


def _config(source: EncoderSource) -> Mapping[str, Any]:
    """Fields of the configuration: published ones with what the tensors say."""
    with torch.device("meta"):
        published: Any = source.encoder.build(None)[0]
    values = published.config if isinstance(published.config, Mapping) else published.config.to_dict()
    of_the_model = {name: value for name, value in values.items() if not name.startswith("_")}
    return {**of_the_model, **sizes_of(source)}


def _key(name: str) -> str:
    """Name of a parameter in files."""
    return EMBEDDING if name == TIED_EMBEDDING else hf_name(name)


def _require_fit(
    model: nn.Module, source: EncoderSource, entries: Mapping[str, Entry], targets: Mapping[str, str]
) -> None:
    shapes = {targets[name]: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    different = [
        f"{name} is {list(entry.shape)} there, {list(shapes[name])} in the configuration"
        for name, entry in entries.items()
        if name in shapes and entry.shape != shapes[name]
    ]
    missing, left_over = sorted(shapes.keys() - entries.keys()), sorted(entries.keys() - shapes.keys())
    raise_on_mismatch(f"{source.path} ({source.encoder.name})", missing, left_over, different)


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    """Fill what no file holds: the numbers of CLIP's positions."""
    for name, buffer in list(model.named_buffers()):
        if not name.endswith("position_ids"):
            raise NotImplementedError(f"buffer {name} has no value in any file")
        owner, _, leaf = name.rpartition(".")
        numbers = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        model.get_submodule(owner).register_buffer(leaf, numbers, persistent=False)
