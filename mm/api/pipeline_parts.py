"""Models of a pipeline, told apart by the content of their files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mm.api.model_config import ModelConfig
from mm.checkpoint.encoder_kinds import CLIP, T5, VAE
from mm.checkpoint.encoder_paths import image_encoder, text_encoder, video_encoder
from mm.checkpoint.expert_band import recorded_band
from mm.checkpoint.formats.folder import of_files
from mm.checkpoint.identify import Found, identify
from mm.checkpoint.joined import WithModule, module_of
from mm.checkpoint.weights import WeightSource, open_weights
from mm.config.model import Precision
from mm.config.run.experts import HIGH
from mm.errors import ConfigError, Problem, raise_all
from mm.wan.encoders import TextEncoder, VideoEncoder
from mm.wan.image_encoder import ImageEncoder

Part = Literal["dit", "vae", "text_encoder", "image_encoder"]
_ENCODERS: dict[str, Part] = {VAE.name: "vae", T5.name: "text_encoder", CLIP.name: "image_encoder"}


@dataclass(frozen=True)
class Parts:
    """Files of a pipeline's models.

    Attributes:
        transformers: its weights, of two experts that for much noise first.
        vae, text_encoder, image_encoder: what was found, None where it was not given.
        tokenizer: its folder.
    """

    transformers: tuple[WeightSource, ...]
    vae: Found
    text_encoder: Found
    image_encoder: Found | None
    tokenizer: Path

    @property
    def transformer(self) -> WeightSource:
        """The only transformer; CFG-404 where there are two experts."""
        if len(self.transformers) > 1:
            paths = " and ".join(str(source.path) for source in self.transformers)
            raise ConfigError("CFG-404", f"{paths} are two experts, and one model is trained.", "Name one of them.")
        return self.transformers[0]

    def load_vae(self, dtype: Precision, device: torch.device) -> VideoEncoder:
        """The VAE; raises as `mm.checkpoint.encoder_paths.video_encoder`."""
        return video_encoder(self.vae.path, dtype, device)

    def load_text_encoder(self, dtype: Precision, device: torch.device, max_tokens: int) -> TextEncoder:
        """The text encoder with its tokenizer; raises as `mm.checkpoint.encoder_paths.text_encoder`."""
        return text_encoder(self.text_encoder.path, self.tokenizer, dtype, device, max_tokens)

    def load_image_encoder(self, dtype: Precision, device: torch.device) -> ImageEncoder | None:
        """The image encoder, where there is one; raises as `mm.checkpoint.encoder_paths.image_encoder`."""
        return None if self.image_encoder is None else image_encoder(self.image_encoder.path, dtype, device)


def find_parts(
    configs: Sequence[ModelConfig], tokenizer: ModelConfig, folder: Path, *, may_download: bool, shared: bool
) -> Parts:
    """Resolve and look at all files; headers are read, no tensor.

    Args:
        configs: of the models. tokenizer: of the tokenizer's folder. folder: of models.
        may_download, shared: as for `ModelConfig.resolve`.

    Raises:
        ConfigError: CFG-400 to CFG-403 for files that are not there, all at once; CFG-404 for two models of one kind,
            one that no pipeline has, and one that is lacking, all at once; CFG-295 for swapped experts.
        CheckpointError, DataError: what `identify` and `open_weights` raise.
    """
    problems: list[Problem] = []
    resolved: list[list[Path]] = []
    for config in (*configs, tokenizer):
        try:
            resolved.append(config.resolve(folder, may_download=may_download, shared=shared))
        except ConfigError as error:
            problems += error.problems
    raise_all(ConfigError, problems)
    *models, (tokenizer_folder, *_) = resolved
    by_part: dict[str, list[Found]] = {}
    for paths in models:
        found = identify(paths[0]) if len(paths) == 1 else of_files(paths)
        by_part.setdefault(_part(found), []).append(found)
    raise_all(ConfigError, list(_faults(by_part)))
    transformers = [open_weights(found) for found in by_part["dit"]]
    module = next(iter(by_part.get("module", ())), None)
    if module is not None:
        transformers = [_joined(transformers[0], module)]
    if len(transformers) > 1:
        raise_all(ConfigError, list(_expert_faults(*transformers)))
    image = next(iter(by_part.get("image_encoder", ())), None)
    return Parts(tuple(transformers), by_part["vae"][0], by_part["text_encoder"][0], image, tokenizer_folder)


def _joined(base: WeightSource, module: Found) -> WeightSource:
    """A transformer with a part of its own that was trained alone."""
    joined = WithModule(base, str(module_of(module)), module)
    if joined.left_over:
        told = f"{module.asked} has no {joined.left_over[0]}, which {base.path} has in that place."
        raise ConfigError("CFG-404", told, "Name a part of this transformer.")
    return joined


def _expert_faults(high: WeightSource, low: WeightSource) -> Iterable[Problem]:
    """CFG-295 for two experts in each other's place, CFG-404 for two transformers that are no experts of one model."""
    if _is_low(high.path) is True or _is_low(low.path) is False:
        found = f"The experts are swapped: {high.path} is named before {low.path}."
        yield Problem("CFG-295", found, "Name the one for much noise first.")
    if high.shapes() != low.shapes():
        found = f"{high.path} and {low.path} are transformers of two shapes."
        yield Problem("CFG-404", found, "Name one transformer, or both experts of one model.")


def _is_low(path: Path) -> bool | None:
    """Tell whether weights are of the expert for little noise; None where neither a record nor a folder says it."""
    folders = {path.name, path.parent.name}
    if folders & {"high_noise_model", "low_noise_model"}:  # of Wan2.2's releases
        return "low_noise_model" in folders
    band = recorded_band(path)
    return None if band is None else band[0] == 0


def _part(found: Found) -> str:
    """Word for what a file is."""
    if module_of(found) is not None:
        return "module"
    if found.content == "model":
        return "dit"
    return _ENCODERS.get(found.names, "unknown") if found.content == "encoder" else "unknown"


def _faults(by_part: dict[str, list[Found]]) -> Iterable[Problem]:
    for found in by_part.pop("unknown", []):
        what = f"{found.asked} holds {found.content if found.content != 'unknown' else 'no known'} weights."
        remedy = "Name a transformer, a VAE or an encoder; load_lora adds LoRA."
        if (Path(found.asked) / HIGH).is_dir():
            remedy = f"Name the models in it one by one: {Path(found.asked) / HIGH}, and its encoders' folders."
        yield Problem("CFG-404", what, remedy)
    for part, several in by_part.items():
        are_experts = part == "dit" and "module" not in by_part and len({found.path for found in several}) == 2
        if len(several) > (2 if are_experts else 1):
            names = ", ".join(str(found.asked) for found in several)
            yield Problem("CFG-404", f"Several models are a {part}: {names}.", "Name one, or a list of its shards.")
    for part in ("dit", "vae", "text_encoder"):
        if part not in by_part:
            yield Problem("CFG-404", f"model_configs names no {part}.", "Add its ModelConfig.")
