"""A command line of VideoX-Fun as the extraction of the features that it trains on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm.config.run.encoders import (
    EncodersSection,
    ImageEncoderSection,
    TextEncoderSection,
    TokenizerSection,
    VideoEncoderSection,
)
from mm.config.run.extraction import ExtractionSection, ExtractionSections, SourceClip, SourceSection, StoreSection
from mm.config.run.live import LiveSection
from mm.config.tasks.task import Source
from mm.config.unread import UNREAD, built, if_read, is_given
from mm.dialects.videox_fun.flags import VideoxFlags
from mm.dialects.videox_fun.model_config import ModelConfig, part_of
from mm.dialects.videox_fun.reading import Reading
from mm.dialects.videox_fun.scripts import Script
from mm.dialects.videox_fun.task import clip_of
from mm.dialects.videox_fun.training import FEATURES, Facts, passes_of, precision_of

EXTRACTION_FILE = "features.yaml"
"""File in --output_dir of the extraction whose features are made in the steps."""
_MOST_DRAWS = 4  # of each sample, unless --feature_draws asks for others


@dataclass(frozen=True)
class Parts:
    """Paths of a model's encoders, folders or original files; image is None where its task has none."""

    vae: str
    text: str
    tokenizer: str
    image: str | None


def parts_of(flags: VideoxFlags, config: ModelConfig, *, sees_images: bool, reading: Reading) -> Parts:
    """Find the encoders of a model; keeps CFG-347 for each that is missing. Missing ones are unread."""
    model = flags.pretrained_model_name_or_path
    text = config.text_encoder_kwargs

    def found(title: str, subpath: str, diffusers: str) -> Any:
        place = part_of(model, subpath, diffusers)
        if place is None:
            missing = f"{model} has no {title}: neither {subpath} nor the folder {diffusers}."
            reading.wrong("CFG-347", missing, "Give the whole folder of the model, or correct --config_path.")
            return UNREAD
        return place

    vae = flags.vae_path if flags.vae_path is not None else found("video VAE", config.vae_kwargs.vae_subpath, "vae")
    image = None
    if sees_images:
        image = found("image encoder", config.image_encoder_kwargs.image_encoder_subpath, "image_encoder")
    return Parts(
        vae,
        found("text encoder", text.text_encoder_subpath, "text_encoder"),
        found("tokenizer", text.tokenizer_subpath, "tokenizer"),
        image,
    )


def extraction_sections(
    script: Script, flags: VideoxFlags, facts: Facts, parts: Parts, reading: Reading
) -> ExtractionSections:
    """The extraction's sections."""
    makers: dict[str, dict[str, Callable[[], Any]]] = {
        "extraction": {
            "task": lambda: facts.task.name,
            "seed": lambda: 1234 if flags.seed is None else flags.seed,
            "device": lambda: "cpu" if facts.launch.cpu else None,
            "draws": lambda: flags.feature_draws or _draws(flags, facts),
        },
        "data": {
            "path": lambda: flags.train_data_meta,
            "folder": lambda: "." if flags.train_data_dir == "" else flags.train_data_dir,
            "format": lambda: "videox-fun",
            "clip": lambda: built(SourceClip, clip_of(script, flags, facts.task, reading)),
            "workers": lambda: max(1, flags.dataloader_num_workers),
        },
        "output": {
            "path": lambda: os.path.join(flags.output_dir, FEATURES),
            "overwrite": lambda: flags.overwrite_features,
        },
    }
    kinds: dict[str, Any] = {"extraction": ExtractionSection, "data": SourceSection, "output": StoreSection}
    sections: dict[str, Any] = {
        name: built(kinds[name], {key: if_read(make) for key, make in values.items()})
        for name, values in makers.items()
    }
    sections["encoders"] = _encoders(flags, facts, parts)
    return built(ExtractionSections, sections)


def _draws(flags: VideoxFlags, facts: Facts) -> int:
    """Draws of each sample where nothing says how many: one a pass, of those that are stored before training a few."""
    passes = passes_of(flags, facts)
    return passes if flags.live else min(_MOST_DRAWS, passes)


def live_section(flags: VideoxFlags, reading: Reading) -> LiveSection | None:
    """The section of features that are made in the steps; keeps CFG-434 for a budget of nothing."""
    if not flags.live:
        if is_given(flags.live_budget):
            reading.wrong("CFG-434", "--live_budget has no effect without --live.", "Give both, or remove it.")
        return None
    file = os.path.join(flags.output_dir, EXTRACTION_FILE)
    return built(LiveSection, {"extractions": (file,), "budget": flags.live_budget})


def _encoders(flags: VideoxFlags, facts: Facts, parts: Parts) -> EncodersSection:
    precision = if_read(lambda: precision_of(flags, facts.launch))

    def section(kind: Any, part: Any) -> Any:
        return built(kind, {"from_pretrained": part, "precision": precision})

    tokenizer = {"from_pretrained": parts.tokenizer, "model_max_length": flags.tokenizer_max_length}
    return built(
        EncodersSection,
        {
            "vae": section(VideoEncoderSection, parts.vae),
            "text": section(TextEncoderSection, parts.text),
            "tokenizer": built(TokenizerSection, tokenizer),
            "image": if_read(lambda: None if parts.image is None else section(ImageEncoderSection, parts.image)),
        },
    )


def sees_images(facts: Facts) -> bool:
    """Tell whether the task has features of the image encoder."""
    return bool(facts.task.made_by(Source.IMAGE_ENCODER))
