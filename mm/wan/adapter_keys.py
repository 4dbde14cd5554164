"""Names that tools give to the tensors of a LoRA file of Wan.

A key is the name of a module, which half of its update it is, and `.weight`:

| tools | a module | its halves | alpha |
| --- | --- | --- | --- |
| diffusers, PEFT | `transformer.blocks.0.attn1.to_q`, diffusers' names | `.lora_A`, `.lora_B` | PEFT's configuration |
| ComfyUI, diffusion-pipe | `diffusion_model.blocks.0.self_attn.q`, native | `.lora_down`, `.lora_up` | `.alpha` |
| DiffSynth | `blocks.0.self_attn.q`, native | `.lora_A.default`, ... | none |
| kohya, VideoX-Fun, OneTrainer | `lora_unet_blocks_0_self_attn_q`, with underscores | as ComfyUI | `.alpha` |

Beside a LoRA DiffSynth writes parameters that were trained themselves, by their names in its pipeline or without the
beginning of these: `pipe.motion_controller.linear.0.weight`, `vace_blocks.0.ffn.0.weight`.

lora_A and lora_down are the same [r, in], lora_B and lora_up the same [out, r]. What a file is its keys tell: every
spelling of modules is read with every spelling of halves, with and without PEFT's name of an adapter (`.default`), and
behind any of the prefixes and wrappers of `mm.wan.prefixes`. Where nothing says alpha, all of these tools take it to be
r. Names with underscores are resolved by the list of the model's modules, so that no underscore has to be guessed.

Sources: diffusers (`loaders/lora_base.py`, `loaders/lora_conversion_utils.py`), ComfyUI (`comfy/lora.py`),
musubi-tuner, VideoX-Fun (`utils/lora_utils.py`) and DiffSynth-Studio.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mm.wan.names import BLOCK, CONVENTIONS, TOP, VACE_BLOCK, Convention, translate
from mm.wan.prefixes import common_prefix, unwrapped

Part = Literal["A", "B", "alpha"]

_KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?:(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.(?!weight\b|bias\b)\w+)?(?:\.weight)?|alpha)"
)
_PARTS: dict[str | None, Part] = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down"), "A"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up"), "B"),
    None: "alpha",
}
_OF_DIFFSYNTH = re.compile(r"\.lora_[AB]\.default\.weight$")
_CONTROLLER = re.compile(r"(?:pipe\.)?(?:motion_controller\.)?(?P<name>linear\.[024]\.(?:weight|bias))")
_OF_PIPELINE = re.compile(r"^pipe\.[a-z]+\.")
_UNDERSCORED = re.compile(r"(?:lora_(?:unet|transformer)|lycoris)__?(?P<module>.+)")
_NUMBERED = re.compile(r"(?P<blocks>(?:vace_)?blocks)_(?P<number>0|[1-9][0-9]*)_(?P<rest>.+)")
_OTHERS = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_",
    "OFT": r"\.b?oft_|\.oft_",
    "Tucker-decomposed LoRA": r"lora_mid",
    "the text encoder": r"^lora_te|^text_encoder",
    "Wan2.2's second transformer": r"^transformer_2\.",
    "biases": r"\.diff_b$|lora_[AB](\.\w+)?\.bias$|\.b_norm$",
    "whole weights or norms": r"\.diff$|\.diff_m$|\.w_norm$|\.set_weight$|\.reshape_weight$",
}
"""What files for Wan hold beside or instead of plain LoRA, and the keys by which it is known."""


@dataclass(frozen=True)
class Keys:
    """The keys of an adapter file, sorted out.

    Attributes:
        spelling: of the modules, for messages.
        parts: key to (native module name, the module's name in the file, which part of its update).
        whole: key to native name of parameters that DiffSynth has beside its LoRA.
        left_over: keys that are no part of a plain LoRA of a module that Wan has.
    """

    spelling: str
    parts: Mapping[str, tuple[str, str, Part]]
    whole: Mapping[str, str]
    left_over: Sequence[str]


def sort_keys(keys: Sequence[str]) -> Keys | None:
    """Sort out the keys of a file; None where there is no half of any module of Wan."""
    matches = {key: match for key in keys if (match := _KEY.fullmatch(key))}
    modules = {key: match["module"] for key, match in matches.items()}
    underscored = {key: match["module"] for key, name in modules.items() if (match := _UNDERSCORED.fullmatch(name))}
    if underscored:
        convention = _convention(underscored.values(), _underscored_name)
        names = {key: _underscored_name(name, convention) for key, name in underscored.items()}
        spelled = underscored
    else:
        spelled = {key: unwrapped(name.removeprefix(common_prefix([f"{name}."]))) for key, name in modules.items()}
        convention = _convention(spelled.values(), _module_name)
        names = {key: _module_name(name, convention) for key, name in spelled.items()}
    parts = {
        key: (native, spelled[key], _PARTS[matches[key]["half"]]) for key, native in names.items() if native is not None
    }
    if not any(part != "alpha" for _, _, part in parts.values()):
        return None
    spelling = f"{convention} names" + (" with underscores" if underscored else "")
    of_diffsynth = any(_OF_DIFFSYNTH.search(key) for key in parts)
    others = [key for key in keys if key not in parts]
    whole = {key: name for key in others if of_diffsynth and (name := _whole_parameter(key)) is not None}
    return Keys(spelling, parts, whole, [key for key in others if key not in whole])


def _whole_parameter(key: str) -> str | None:
    """Native name of a parameter by its name in DiffSynth's pipeline, or by the end of that."""
    controller = _CONTROLLER.fullmatch(key)
    if controller is not None:
        return f"motion_controller.{controller['name']}"
    name = _OF_PIPELINE.sub("", key)
    return name if translate(name, "native", "diffusers") is not None else None


def other_kinds(keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys of what is known to be more or other than plain LoRA, by what it is."""
    found: dict[str, list[str]] = {}
    for key in keys:
        kind = next((kind for kind, pattern in _OTHERS.items() if re.search(pattern, key)), None)
        if kind is not None:
            found.setdefault(kind, []).append(key)
    return found


def _convention(names: Iterable[str], resolve: Callable[[str, Convention], str | None]) -> Convention:
    """The convention that knows most of the names; the first of equals, so native wins."""
    known = Counter(dict.fromkeys(CONVENTIONS, 0))
    for name in names:
        known.update(c for c in CONVENTIONS if resolve(name, c) is not None)
    return max(CONVENTIONS, key=lambda c: known[c])


def _module_name(name: str, convention: Convention) -> str | None:
    """The native name of a module of a convention, or None."""
    weight = translate(f"{name}.weight", convention, "native")
    return None if weight is None else weight.removesuffix(".weight")


def _underscored_name(name: str, convention: Convention) -> str | None:
    """The native name of a module whose dots are underscores, all of them or some, or None."""
    flat = name.replace(".", "_")
    if match := _NUMBERED.fullmatch(flat):
        rest = _FLAT[convention][match["blocks"]].get(match["rest"])
        return None if rest is None else f"{match['blocks']}.{match['number']}.{rest}"
    return _FLAT[convention][""].get(flat)


_FLAT: dict[Convention, dict[str, dict[str, str]]] = {
    convention: {
        where: {getattr(row, convention).replace(".", "_"): row.native for row in rows if "weight" in row.kinds}
        for where, rows in (("", TOP), ("blocks", BLOCK), ("vace_blocks", VACE_BLOCK))
    }
    for convention in CONVENTIONS
}
"""Native module names by their names with underscores, outside the blocks and inside each kind of them."""
