"""The config.json beside transformer weights, in the three dialects in use, and its inference from tensor shapes.

Dialects: diffusers (`num_attention_heads`), original Wan and VideoX-Fun (`dim`), and this suite's own predictor fields
(`hidden_size`). Keys are checked like every configuration: an unknown key or a value without meaning here is an error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm.config.base import load_json, parse
from mm.config.model import WanConfig
from mm.config.tasks.fun import PIXELS_OF_A_LATENT
from mm.config.tasks.fun_camera import RAY_CHANNELS
from mm.config.tasks.registry import DEFAULT, TASKS, named
from mm.config.tasks.task import Entry, Sizes, Task
from mm.errors import ConfigError, DataError, Problem, raise_all

Shapes = Mapping[str, Sequence[int]]

HEAD_DIM = 128
"""Head width of every published Wan2.1 model, used only when no config.json says it."""


class Dialect(NamedTuple):
    """One spelling of the configuration.

    Attributes:
        title: what messages call it.
        fields: its key to the field of `WanConfig`.
        task: keys that belong to another task unless they have one of these values.
        fixed: keys that must have this value.
        unused: keys that change nothing in these models.
    """

    title: str
    fields: Mapping[str, str]
    task: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any]
    unused: frozenset[str]


_TASKS = {"model_type": tuple(TASKS)}
_OF_TASKS = ("model_type", "img_dim", "clip_token_len", "vace_layers")
"""The original Wan fixes the middle two, so its files lack them; those of models of other sizes have them."""
_IMAGES, _POSITIONS, _SIDE = "img_emb.proj.0.weight", "img_emb.emb_pos", "vace_patch_embedding.weight"
_SWITCHES = {"add_ref_conv": "ref_conv.weight", "add_control_adapter": "control_adapter.conv.weight"}
"""Keys of VideoX-Fun that say of a parameter that it is there."""
_LOOSE = ("t2v", "i2v")
"""Kinds of a model in original files, which say of some tasks no more than whether it has channels beside the noise."""
_IMAGE_KEYS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
"""diffusers does not name the task: these are null or tell it."""
_OF_DIFFUSERS = {"img_emb", "vace_patch_embedding"}
_UNTOLD = tuple(task.name for task in TASKS.values() if not set(task.modules) <= _OF_DIFFUSERS)
"""Tasks that diffusers does not have. Its models are loaded without their modules; its config.json names them so that
they are found again."""
_CLASSES = {"WanTransformer3DModel": None, "WanModel": None, "WanVACETransformer3DModel": _SIDE, "VaceWanModel": _SIDE}
"""Classes, and the parameter that the models of one alone have."""
_SAME = {k: k for k in ("patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "eps")}

DIFFUSERS = Dialect(
    "diffusers",
    {
        **_SAME,
        "in_channels": "in_dim",
        "out_channels": "out_dim",
        "num_attention_heads": "num_heads",
        "vace_layers": "vace_layers",
    },
    {"model_type": _UNTOLD},
    {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"},
    # The length of a table, ours has the length of the grid; and what the tensors' shapes say.
    frozenset({"rope_max_seq_len", "vace_in_channels"}),
)
ORIGINAL = Dialect(
    "original Wan",
    {**_SAME, **{k: k for k in ("text_len", "in_dim", "out_dim", "num_heads", *_OF_TASKS)}, "dim": "hidden_size"},
    {
        **_TASKS,
        "cross_attn_type": (None, "t2v_cross_attn", "i2v_cross_attn", "cross_attn"),
        **dict.fromkeys(_SWITCHES, (False, True)),
        "in_dim_control_adapter": (RAY_CHANNELS,),
        "downscale_factor_control_adapter": (PIXELS_OF_A_LATENT,),
    },
    {"window_size": [-1, -1], "cross_attn_norm": True, "qk_norm": True},
    # VideoX-Fun writes the first two for a base class of its own; the others say what the tensors' shapes say.
    frozenset({"hidden_size", "in_channels", "in_dim_ref_conv", "vace_in_dim", "motion_controller"}),
)
OWN = Dialect(
    "predictor",
    {name: name for name in WanConfig.model_fields},
    _TASKS,
    {},
    frozenset(),
)


def read_config(path: Path, shapes: Shapes | None = None) -> WanConfig:
    """Read the config.json of a transformer; `text_len` keeps its default where a dialect lacks it.

    Where a dialect lacks `img_dim` or `clip_token_len`, they are those of the released models.

    Args:
        path: the file.
        shapes: of the tensors beside it, by native name: where a file does not say the task, they do.

    Raises:
        DataError: DATA-026 when it describes another class or task, DATA-027 when it cannot be read or has unknown,
            missing or unsupported keys or values; all problems at once.
    """
    try:
        raw = load_json(path)
        if not isinstance(raw, dict):
            raise ConfigError("CFG-002", f"{path} is not a JSON object.", "Take it from the weights' source.")
        raise_all(DataError, _problems(path, raw))
        return parse(WanConfig, _translated(raw, shapes), str(path))
    except ConfigError as error:
        raise_all(DataError, [Problem("DATA-027", p.message, p.remedy) for p in error.problems])
        raise AssertionError("an error without problems") from None


def infer_config(shapes: Shapes, source: Path, head_dim: int = HEAD_DIM) -> WanConfig:
    """The configuration that the tensor shapes (native names) of a model imply.

    Args:
        shapes: by native name.
        source: what to call the weights in messages.
        head_dim: width of a head, which shapes do not tell.

    Raises:
        DataError: DATA-026 when tensors for images are there and the tensors or channels of an I2V or FLF2V model are
            not; DATA-028 when tensors that tell the shape are missing or strange, or the width is not a multiple of
            `head_dim`.
    """
    try:
        hidden, in_dim, *patch = shapes["patch_embedding.weight"]
        blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
        out_width, _ = shapes["head.head.weight"]
        values = {
            "patch_size": patch,
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "in_dim": in_dim,
            "out_dim": out_width // math.prod(patch),
            "hidden_size": hidden,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "num_heads": hidden // head_dim,
            "num_layers": len(blocks),
            **_inferred_task(shapes, source),
        }
        if hidden % head_dim or blocks != set(range(len(blocks))):
            raise ValueError(f"width {hidden} in heads of {head_dim}, blocks {sorted(blocks)}")
        return parse(WanConfig, values, str(source))
    except (KeyError, IndexError, ValueError, ConfigError) as error:
        raise DataError(
            "DATA-028",
            f"{source} has no config.json and its tensors do not tell the model's shape ({error}).",
            "Put the model's config.json beside the weights.",
        ) from None


def _inferred_task(shapes: Shapes, source: Path) -> dict[str, Any]:
    """The task by the parameters that mark it and its channels, and the sizes that its models alone have."""
    marks = _marks_among(shapes)
    image = sorted(n for n in shapes if n.startswith("img_emb.") or n.rpartition(".")[0].endswith("_img"))
    in_dim = shapes["patch_embedding.weight"][1]
    out_dim = shapes["head.head.weight"][0] // math.prod(shapes["patch_embedding.weight"][2:])
    task = _task_of(marks, in_dim, out_dim)
    if task is None or bool(image) != (_IMAGES in marks):
        if not image and not marks:
            return {"model_type": DEFAULT.name}
        what = f"it holds {len(image)} tensors for image conditions, the first is {(image or sorted(marks))[0]}, and "
        what += "no img_emb.proj.0.weight" if image and _IMAGES not in marks else f"{in_dim} input channels"
        raise _other_task(source, what)
    values: dict[str, Any] = {"model_type": task.name}
    if _IMAGES in marks:
        positions = shapes.get(_POSITIONS)
        values |= _image_sizes(task, shapes[_IMAGES][0], None if positions is None else positions[1])
    if _SIDE in marks:
        values["vace_layers"] = _inferred_layers(shapes)
    return values


def _marks_among(names: Collection[str]) -> frozenset[str]:
    return frozenset(mark for task in TASKS.values() for mark in task.marks if mark in names)


def _task_of(marks: frozenset[str], in_dim: Any, out_dim: Any) -> Task | None:
    """The task whose models have these parameters and channels; None where there is none."""
    if type(in_dim) is not int or type(out_dim) is not int:
        return None
    sizes = Sizes(out_dim, (1, 1, 1), 0, 0)
    found = [
        task
        for task in TASKS.values()
        if task.marks == marks and task.channels(sizes) == in_dim - out_dim and task.latent_channels in (None, out_dim)
    ]
    return max(found, key=lambda task: task.latent_channels is not None, default=None)


def _image_sizes(task: Task, width: int, positions: int | None) -> dict[str, Any]:
    """Width of the image encoder's tokens, and how many there are, which learned positions tell."""
    (images,) = task.entering(Entry.CONTEXT)
    one_each = images.shape(Sizes(1, (1, 1, 1), 1, 1))[0]
    tokens = task.sizes["clip_token_len"] if positions is None else positions // one_each
    return {"img_dim": width, "clip_token_len": tokens}


def _inferred_layers(shapes: Shapes) -> list[int]:
    """Blocks that side blocks hint at, as the released models spread them: the first, and then every n-th.

    Raises:
        ValueError: where their numbers do not divide.
    """
    blocks, sides = (
        len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})
        for kind in ("blocks", "vace_blocks")
    )
    if not sides or blocks % sides:
        raise ValueError(f"{sides} side blocks beside {blocks} blocks")
    return [*range(0, blocks, blocks // sides)]


def _tokens_agree(positions: Any) -> bool:
    """Accept learned positions that can be those of whole images."""
    images = next(len(task.frames) for task in TASKS.values() if task.positions)
    return type(positions) is int and positions > 0 and positions % images == 0


def wan_config_to_diffusers(config: WanConfig) -> dict[str, object]:
    """The content of config.json for diffusers' class of the model, keys sorted as diffusers writes them.

    `text_len` has no place in it: diffusers pads captions in its pipeline. Neither has the number of tokens of a single
    image, on which no weight depends.
    """
    side = config.vace_layers is not None
    values: dict[str, object] = {
        "_class_name": "WanVACETransformer3DModel" if side else "WanTransformer3DModel",
        "attention_head_dim": config.head_dim,
        "rope_max_seq_len": 1024,
        "image_dim": config.img_dim,
        "added_kv_proj_dim": config.hidden_size if config.image_tokens else None,
        "pos_embed_seq_len": config.image_tokens if config.task.positions else None,
        **DIFFUSERS.fixed,
        **{key: getattr(config, field) for key, field in DIFFUSERS.fields.items()},
        "patch_size": list(config.patch_size),
        **({"model_type": config.task.name} if config.task.name in _UNTOLD else {}),
    }
    del values["vace_layers"]
    if config.vace_layers is not None:
        values |= {"vace_layers": list(config.vace_layers), "vace_in_channels": config.side_channels}
    return dict(sorted(values.items()))


def wan_config_to_original(config: WanConfig) -> dict[str, object]:
    """The content of config.json for the official `WanModel`, VACE's or VideoX-Fun's, keys sorted."""
    values: dict[str, object] = {key: getattr(config, field) for key, field in ORIGINAL.fields.items()}
    for key in {key for task in TASKS.values() for key in task.sizes}:
        if values[key] in (None, config.task.sizes.get(key)):
            del values[key]
    marks = config.task.marks
    switches: dict[str, object] = {key: True for key, mark in _SWITCHES.items() if mark in marks}
    if config.vace_layers is not None:
        switches |= {"vace_layers": list(config.vace_layers), "vace_in_dim": config.side_channels}
    if config.condition_channels and _POSITIONS not in marks:
        values["model_type"] = "i2v"  # the original's word for all models with channels beside the noise
        switches |= {} if _IMAGES in marks else {"cross_attn_type": "cross_attn"}
    values |= {"_class_name": "VaceWanModel" if config.vace_layers else "WanModel", **switches}
    return dict(sorted((values | {"patch_size": list(config.patch_size)}).items()))


def _dialect(raw: Mapping[str, Any]) -> Dialect:
    if "num_attention_heads" in raw or "attention_head_dim" in raw:
        return DIFFUSERS
    return ORIGINAL if "dim" in raw else OWN


def _problems(path: Path, raw: Mapping[str, Any]) -> list[Problem]:
    dialect = _dialect(raw)
    if raw.get("_class_name") not in (None, *_CLASSES):
        return list(_other_task(path, f"its _class_name is {raw['_class_name']}").problems)
    fields = {*dialect.fields, *({"attention_head_dim", *_IMAGE_KEYS} if dialect is DIFFUSERS else ())}
    problems: list[Problem] = []
    if dialect is DIFFUSERS and not _image_keys_agree(raw):
        values = ", ".join(f"{key} {raw.get(key)!r}" for key in _IMAGE_KEYS)
        problems += _other_task(path, f"it has {values}, which do not belong together").problems
    for key, value in raw.items():
        if key in dialect.task and value not in dialect.task[key]:
            known = " or ".join(repr(known) for known in dialect.task[key])
            problems += _other_task(path, f"{key} is {value!r}, expected {known}").problems
        elif key in dialect.fixed and value != dialect.fixed[key]:
            what = f"{path}: {key} is {value!r}; Wan2.1 has {dialect.fixed[key]!r}."
            problems.append(Problem("DATA-027", what, "Use the weights and config.json of a Wan2.1 model."))
        elif not (key in fields | dialect.task.keys() | dialect.fixed.keys() | dialect.unused or key.startswith("_")):
            what = f'{path} has the unknown key "{key}" for a {dialect.title} configuration.'
            problems.append(Problem("DATA-027", what, "Remove it if the model does not depend on it."))
    required = {key for key, field in dialect.fields.items() if WanConfig.model_fields[field].is_required()}
    if dialect is DIFFUSERS:
        required |= {"attention_head_dim"}
    for key in sorted(required - raw.keys()):
        problems.append(
            Problem("DATA-027", f'{path} lacks the key "{key}" of a {dialect.title} configuration.', "Add it.")
        )
    return problems


def _translated(raw: Mapping[str, Any], shapes: Shapes | None) -> dict[str, Any]:
    dialect = _dialect(raw)
    values = {field: raw[key] for key, field in dialect.fields.items() if key in raw}
    if dialect is DIFFUSERS:
        heads, width = raw["num_attention_heads"], raw["attention_head_dim"]
        # Otherwise `parse` reports the wrong type of the one or the other.
        values["hidden_size"] = heads * width if type(heads) is type(width) is int else width
    if dialect is OWN:
        return values
    task = _told_task(raw, values, shapes)
    if dialect is DIFFUSERS and raw.get("image_dim") is not None:
        positions = raw.get("pos_embed_seq_len")
        values |= _image_sizes(task, raw["image_dim"], positions) if task.entering(Entry.CONTEXT) else {}
    return {**({} if dialect is DIFFUSERS else task.sizes), **values, "model_type": task.name}


def _told_task(raw: Mapping[str, Any], values: Mapping[str, Any], shapes: Shapes | None) -> Task:
    """The task that a file of another system tells: by its name, its switches, and for what it leaves open the tensors.

    Raises:
        DataError: DATA-026 where they are those of no task.
    """
    named, in_dim, out_dim = raw.get("model_type"), values.get("in_dim", 16), values.get("out_dim", 16)
    if named is not None and named not in _LOOSE:
        return TASKS[named]
    told, there = _told_marks(raw), frozenset() if shapes is None else _marks_among(shapes)
    marks = {mark for mark in {*told, *there} if told.get(mark, mark in there)}
    if shapes is None and named == "i2v":
        marks |= {_IMAGES} if told.get(_IMAGES, True) else set()
    found, plain = _task_of(frozenset(marks), in_dim, out_dim), TASKS[named or DEFAULT.name]
    if found is None and {mark for mark, is_there in told.items() if is_there} - plain.marks - {_POSITIONS}:
        raise _other_task(Path("config.json"), f"{in_dim} input channels and {' and '.join(sorted(marks))}")
    fits = found is not None and (named is None or (named == "i2v") == (in_dim != out_dim))
    return found if found is not None and fits else plain  # what does not fit is told where the whole is checked


def _told_marks(raw: Mapping[str, Any]) -> dict[str, bool]:
    """Parameters that a file of another system says to be there or not; it may say nothing of one."""
    told = {mark: bool(raw[key]) for key, mark in _SWITCHES.items() if key in raw}
    if raw.get("_class_name") in _CLASSES or "vace_layers" in raw:
        told[_SIDE] = "vace_layers" in raw or _CLASSES[raw["_class_name"]] is not None
    if raw.get("_class_name") == "WanModel" and "vace_layers" not in raw:
        del told[_SIDE]  # the word of files that say less
    if "image_dim" in raw:
        told |= {_IMAGES: raw["image_dim"] is not None, _POSITIONS: raw.get("pos_embed_seq_len") is not None}
    if raw.get("cross_attn_type") is not None:
        told[_IMAGES] = raw["cross_attn_type"] == "i2v_cross_attn"
    return told


def _image_keys_agree(raw: Mapping[str, Any]) -> bool:
    """Accept diffusers' keys that are those of one task: all null, or widths, with or without learned positions."""
    image, added, positions = (raw.get(key) for key in _IMAGE_KEYS)
    if image is None or added is None:
        return image is added is positions is None
    heads, width = raw.get("num_attention_heads"), raw.get("attention_head_dim")
    if type(heads) is not int or type(width) is not int:
        return True  # reported as what they are
    return added == heads * width and (positions is None or _tokens_agree(positions))


def _other_task(path: Path, what: str) -> DataError:
    return DataError(
        "DATA-026",
        f"{path} is not a Wan2.1 text-to-video or image-to-video transformer: {what}.",
        f"Use the weights of one of {named(TASKS.values())} models.",
    )
