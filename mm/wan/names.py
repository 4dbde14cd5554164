"""Parameter names of a Wan transformer in the three conventions, as one table.

`native` is the original Wan (also VideoX-Fun, DiffSynth, ComfyUI) and the convention inside this project; `diffusers`
is the Hugging Face folder layout; `mm` is MindSpeed-MM. Sources: the published weights of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from mm.errors import DataError

Convention = Literal["native", "diffusers", "mm"]
CONVENTIONS: tuple[Convention, ...] = ("native", "diffusers", "mm")


class NameRule(NamedTuple):
    """One module or parameter in the three conventions; `kinds` are the parameters of the module, "" is itself one."""

    native: str
    diffusers: str
    mm: str
    kinds: tuple[str, ...] = ("weight", "bias")


_BARE = ("",)
_WEIGHT = ("weight",)

TOP: tuple[NameRule, ...] = (
    NameRule("patch_embedding", "patch_embedding", "patch_embedding"),
    NameRule("text_embedding.0", "condition_embedder.text_embedder.linear_1", "text_embedding.linear_1"),
    NameRule("text_embedding.2", "condition_embedder.text_embedder.linear_2", "text_embedding.linear_2"),
    NameRule("time_embedding.0", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    NameRule("time_embedding.2", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    NameRule("time_projection.1", "condition_embedder.time_proj", "time_projection.1"),
    NameRule("head.modulation", "scale_shift_table", "head.modulation", _BARE),
    NameRule("head.head", "proj_out", "head.head"),
    # Image-conditioned variants only, from here on.
    NameRule("img_emb.proj.0", "condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    NameRule("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    NameRule("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    NameRule("img_emb.proj.4", "condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    NameRule("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos", _BARE),
    # Speed control only; in neither of the other systems, so that its names are the same everywhere.
    *(NameRule(name, name, name) for name in (f"motion_controller.linear.{index}" for index in (0, 2, 4))),
    # A reference image and a camera's path, of models that only the native names have; and side blocks.
    NameRule("ref_conv", "ref_conv", "ref_conv"),
    *(
        NameRule(name, name, name)
        for name in (
            f"control_adapter.{part}" for part in ("conv", "residual_blocks.0.conv1", "residual_blocks.0.conv2")
        )
    ),
    NameRule("vace_patch_embedding", "vace_patch_embedding", "vace_patch_embedding"),
)
"""Names outside the blocks."""

BLOCK: tuple[NameRule, ...] = (
    NameRule("self_attn.q", "attn1.to_q", "self_attn.proj_q"),
    NameRule("self_attn.k", "attn1.to_k", "self_attn.proj_k"),
    NameRule("self_attn.v", "attn1.to_v", "self_attn.proj_v"),
    NameRule("self_attn.o", "attn1.to_out.0", "self_attn.proj_out"),
    NameRule("self_attn.norm_q", "attn1.norm_q", "self_attn.q_norm", _WEIGHT),
    NameRule("self_attn.norm_k", "attn1.norm_k", "self_attn.k_norm", _WEIGHT),
    NameRule("cross_attn.q", "attn2.to_q", "cross_attn.proj_q"),
    NameRule("cross_attn.k", "attn2.to_k", "cross_attn.proj_k"),
    NameRule("cross_attn.v", "attn2.to_v", "cross_attn.proj_v"),
    NameRule("cross_attn.o", "attn2.to_out.0", "cross_attn.proj_out"),
    NameRule("cross_attn.norm_q", "attn2.norm_q", "cross_attn.q_norm", _WEIGHT),
    NameRule("cross_attn.norm_k", "attn2.norm_k", "cross_attn.k_norm", _WEIGHT),
    NameRule("norm3", "norm2", "norm3"),
    NameRule("ffn.0", "ffn.net.0.proj", "ffn.0"),
    NameRule("ffn.2", "ffn.net.2", "ffn.2"),
    NameRule("modulation", "scale_shift_table", "modulation", _BARE),
    # Image-conditioned variants only, from here on.
    NameRule("cross_attn.k_img", "attn2.add_k_proj", "cross_attn.k_img"),
    NameRule("cross_attn.v_img", "attn2.add_v_proj", "cross_attn.v_img"),
    NameRule("cross_attn.norm_k_img", "attn2.norm_added_k", "cross_attn.k_norm_img", _WEIGHT),
)
"""Names inside a block, after `blocks.N.`, which all conventions share."""

VACE_BLOCK: tuple[NameRule, ...] = (
    *BLOCK,
    NameRule("before_proj", "proj_in", "before_proj"),  # of the first alone
    NameRule("after_proj", "proj_out", "after_proj"),
)
"""Names inside a block of VACE's branch, after `vace_blocks.N.`. The MM names are ours: MindSpeed-MM makes a module of
the model and another of the branch, wan_dit and vace_dit, which are not read."""

_BLOCK_NAME = re.compile(r"((?:vace_)?blocks\.(?:0|[1-9][0-9]*)\.)(.+)")


class _Table(NamedTuple):
    top: dict[str, str]
    block: dict[str, str]
    vace_block: dict[str, str]


def native_to_diffusers(name: str) -> str:
    """`blocks.0.self_attn.q.weight` to `blocks.0.attn1.to_q.weight`. Raises DataError DATA-029 for an unknown name."""
    return _from_native(name, "diffusers")


def native_to_mindspeed(name: str) -> str:
    """`blocks.0.self_attn.q.weight` to `blocks.0.self_attn.proj_q.weight`. Raises DATA-029 for an unknown name."""
    return _from_native(name, "mm")


def translate(name: str, source: Convention, target: Convention) -> str | None:
    """`name` of convention `source` in convention `target`, or None when `source` does not have such a name."""
    table = _TABLES[source, target]
    if match := _BLOCK_NAME.fullmatch(name):
        prefix, rest = match.groups()
        block = table.vace_block if prefix.startswith("vace_") else table.block
        return prefix + block[rest] if rest in block else None
    return table.top.get(name)


def convention(names: Iterable[str]) -> Convention:
    """The convention that knows most of `names` (without prefix).

    Names it does not know are left for a strict comparison with the model to report. Conventions share some names; a
    set of only such names means the same in all of them.

    Raises:
        DataError: DATA-029 when no convention knows any name.
    """
    names = list(names)
    known = {c: sum(translate(name, c, "native") is not None for name in names) for c in CONVENTIONS}
    best = max(CONVENTIONS, key=lambda c: known[c])  # the first of equals, so native wins
    if not known[best]:
        raise _no_convention(names)
    return best


def _from_native(name: str, target: Convention) -> str:
    result = translate(name, "native", target)
    if result is None:
        raise _unknown([name], "the native convention")
    return result


def _no_convention(names: list[str]) -> DataError:
    """Says what stands before names that would be known without it."""
    place = "any of the Wan name conventions (" + ", ".join(CONVENTIONS) + ")"
    before = sorted({found for name in names if (found := _before_a_known_name(name))})
    if len(before) == 1:
        return _unknown(names, place, f"Save them without the {before[0]} that stands before names of Wan.")
    if before:
        remedy = f"They are names of Wan after {', '.join(before[:4])}; keep one set, without what stands before it."
        return _unknown(names, place, remedy)
    if any(".lora_" in name for name in names):
        remedy = (
            "They are of a LoRA: name the base model here, and add the LoRA with --mode merge_lora or as an adapter."
        )
        return _unknown(names, place, remedy)
    return _unknown(names, place)


def _before_a_known_name(name: str) -> str:
    """Prefix to be cut off a name until some convention knows it; empty when none ever does."""
    parts = name.split(".")
    for start in range(1, len(parts)):
        rest = ".".join(parts[start:])
        if any(translate(rest, convention, "native") for convention in CONVENTIONS):
            return ".".join(parts[:start]) + "."
    return ""


def _unknown(
    names: list[str],
    place: str,
    remedy: str = "Use the weights of a Wan2.1 transformer in diffusers, original Wan or MindSpeed-MM names.",
) -> DataError:
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return DataError(
        "DATA-029", f"Unknown tensor names, not part of {place}: {shown or 'there are no tensors'}.", remedy
    )


def _table(rows: Sequence[NameRule], source: Convention, target: Convention) -> dict[str, str]:
    return {
        ".".join(filter(None, (getattr(row, source), kind))): ".".join(filter(None, (getattr(row, target), kind)))
        for row in rows
        for kind in row.kinds
    }


_TABLES: dict[tuple[Convention, Convention], _Table] = {
    (source, target): _Table(*(_table(rows, source, target) for rows in (TOP, BLOCK, VACE_BLOCK)))
    for source in CONVENTIONS
    for target in CONVENTIONS
}
