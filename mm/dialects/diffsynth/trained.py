"""Choice of what is trained, as DiffSynth-Studio's arguments say it: models of its pipeline, LoRA of one, or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mm.config.base import hint
from mm.config.model import WanConfig
from mm.config.run.checkpoint import AdapterSection
from mm.config.unread import built
from mm.dialects.diffsynth.pipeline_names import FROZEN, TRANSFORMER, models_of, words_of_model
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.errors import Problem

_ATTENTION = ("q", "k", "v", "o")
_OF_IMAGES = ("k_img", "v_img")
_FEED_FORWARD = ("ffn.0", "ffn.2")


def trained_whole(flags: DiffSynthFlags) -> tuple[str, ...]:
    """The models of `--trainable_models`."""
    return tuple(word.strip() for word in (flags.trainable_models or "").split(",") if word.strip())


def trainable_of(flags: DiffSynthFlags, wan: WanConfig) -> tuple[str, ...] | None:
    """Words for the models that are trained whole; None where these are all, or none beside a LoRA."""
    whole = trained_whole(flags)
    named = [model for model in models_of(wan) if model in whole]
    if not named or (flags.lora_base_model is None and len(named) == len(models_of(wan))):
        return None
    return tuple(word for model in named for word in words_of_model(model, wan))


def adapters_of(flags: DiffSynthFlags, wan: WanConfig, base: str) -> AdapterSection | None:
    """The section of a LoRA; None without `--lora_base_model`.

    Args:
        flags: the command line. wan: the model. base: path of its weights.
    """
    if flags.lora_base_model is None:
        return None
    values: dict[str, Any] = {
        "rank": flags.lora_rank,
        "alpha": float(flags.lora_rank),  # there is no other one there
        "targets": _targets(flags.lora_target_modules, wan, flags.lora_base_model),
        "base": base,
    }
    return built(AdapterSection, values)


def trained_problems(flags: DiffSynthFlags, wan: WanConfig) -> Iterator[Problem]:
    """CFG-385: models that are not there, or are trained nowhere here. CFG-386: one that is trained in both ways."""
    there, whole, base = models_of(wan), trained_whole(flags), flags.lora_base_model
    for flag, words in (("--trainable_models", whole), ("--lora_base_model", (base,) if base is not None else ())):
        for word in words:
            if word in FROZEN:
                found = f"{flag} {word}: it makes features before the training, which are the same in every step."
                yield Problem("CFG-385", found, f"Remove it; {' or '.join(there)} can be trained.")
            elif word not in there:
                found = f"{flag} {word} is not in the models that are named.{hint(word, list(there))}"
                yield Problem("CFG-385", found, f"There is {' and '.join(there)}.")
    if base is None and not whole:
        found = "Nothing is trained: neither --trainable_models nor --lora_base_model is given."
        yield Problem("CFG-385", found, f"Give one of them, such as --trainable_models {TRANSFORMER}.")
    if base in there and base in whole:
        found = f"--trainable_models {base} beside LoRA of {base}: its weights are trained themselves, or by adapters."
        yield Problem("CFG-386", found, f"Take {base} out of one of the two.")
    if flags.lora_checkpoint is not None and base is None:
        yield Problem("CFG-385", "--lora_checkpoint has no effect without --lora_base_model.", "Give both, or none.")


def _targets(given: str, wan: WanConfig, base: str) -> list[str]:
    """Words for `mm.lora.targets`, of the linears of one of the pipeline's models.

    The words themselves, by the end of a name as in PEFT; where a model here consists of several of the pipeline's, the
    names of the linears.
    """
    in_block = _linears(wan)
    words = [word.strip() for word in given.split(",") if word.strip()] or sorted(
        {name.removeprefix("self_attn.").removeprefix("cross_attn.") for name in in_block}
    )
    if len(models_of(wan)) == 1 or not wan.side_blocks:
        return words
    stem, blocks = ("blocks", wan.num_layers) if base == TRANSFORMER else (f"{base}_blocks", len(wan.side_blocks))
    named = [name for name in in_block if any(name == word or name.endswith(f".{word}") for word in words)]
    unknown = [word for word in words if not any(name == word or name.endswith(f".{word}") for name in in_block)]
    return [f"{stem}.{block}.{name}" for block in range(blocks) for name in named] + unknown


def _linears(wan: WanConfig) -> list[str]:
    """The linears of a block that can have an adapter."""
    cross = (*_ATTENTION, *(_OF_IMAGES if wan.img_dim is not None else ()))
    return [*(f"self_attn.{name}" for name in _ATTENTION), *(f"cross_attn.{name}" for name in cross), *_FEED_FORWARD]
