"""The feature store: what feature extraction writes and training reads.

    STORE/features/<name>.safetensors            latents [16, F, H, W], prompt [L, D], prompt_mask [512] of one sample;
                                                 and the features that the store's task declares (mm/config/tasks)
    STORE/features/empty_prompt.safetensors      prompt [L, D], prompt_mask [512] of the empty caption
    STORE/recipe.json                            what they were made with (mm/data/recipe.py)
    STORE/data.jsonl                             one row a sample (mm/data/listing.py), written last: where it is, the
                                                 store is complete

`prompt` has the caption's true length; training pads it. Every file says in its header which sample, caption, video
and recipe it belongs to, so a file that is there and fits is complete and need not be made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mm.config.model import WanConfig
from mm.config.tasks.frames import MASK_CHANNELS
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import Source, Task
from mm.data.files import raise_limited, write_atomically
from mm.data.finite import require_finite
from mm.errors import DataError, Problem

FEATURES = "features"
LISTING = "data.jsonl"
EMPTY_PROMPT = "empty_prompt.safetensors"
EMPTY_PROMPT_ID = "empty_prompt"
PROMPT_ID = "prompt"
"""What the embedding of a caption, empty or not, says in place of a sample."""
PRECISIONS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES = {
    **PRECISIONS,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MAX_HEADER_BYTES = 2**20
OTHER_TASK = (
    "Extract for this model's task (\"task\" in tools.json and model_wan.json), or use a model of the features'."
)
_OF_EVERY_TASK = ("latents", "prompt", "prompt_mask")
EXTRACT_AGAIN = "Delete the file and run feature extraction again; it makes only what is missing."


def _features_of(task: Task) -> set[str]:
    return {feature.name for feature in task.stored}


_ALL_FEATURES = set[str]().union(*map(_features_of, TASKS.values()))


@dataclass(frozen=True, slots=True)
class Origin:
    """Source of one feature file.

    Attributes:
        sample: the sample's id. recipe: key of the recipe.
        caption: `text_hash` of the caption as given. video: `video_fingerprint` of the video, its cut, and what stands
            in the task's columns.
    """

    sample: str
    recipe: str
    caption: str
    video: str


@dataclass(frozen=True)
class Feature:
    """One sample as it is trained on.

    Attributes:
        latents: [16, F, H, W], normalised; those of images that stand in front of the clip come first, a frame each;
            None for the empty prompt.
        prompt: [L, D], the caption's embedding at its true length.
        start_frame: first frame of the clip in its video.
        features: what the task declares, by name.
        taken: what a shape rule chose (`mm.data.clips.Clip.taken`), where there is one.
    """

    latents: Tensor | None
    prompt: Tensor
    start_frame: int = 0
    features: Mapping[str, Tensor] = field(default_factory=dict)
    taken: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a feature file: tensor names with (dtype, shape), its origin, first frame and `Feature.taken`."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    origin: Origin
    start_frame: int
    taken: Mapping[str, Any] | None = None


def feature_name(sample: str) -> str:
    """File name of a sample's features: readable, and unique even where two folders hold videos of one name."""
    path, *cut = sample.split("//")  # of a cut of a video that is listed more than once
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", "_".join([Path(path).name[:80], *(word[:40] for word in cut)]))
    return f"{readable}-{text_hash(sample)}.safetensors"


def text_hash(text: str) -> str:
    """Sixteen hexadecimal digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def video_fingerprint(file: Path) -> str:
    """Sixteen hexadecimal digits of a video's size and its first and last 4 KiB, where its index of frames is.

    Raises:
        DataError: DATA-001 when it cannot be read.
    """
    window = 4096
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(window))
            stream.seek(max(0, size - window))
            digest.update(stream.read(window))
    except OSError as error:
        raise DataError("DATA-001", f"{file} cannot be read ({error}).", "Check the disk it is on.") from None
    return digest.hexdigest()[:16]


def write_feature(path: Path, feature: Feature, origin: Origin, text_len: int) -> None:
    """Write one feature file; it is complete or absent.

    Args:
        path: the file, in a folder that exists.
        feature: the sample. origin: what it was made from.
        text_len: length of the mask that is written beside the prompt.

    Raises:
        DataError: DATA-018 or DATA-019 when it cannot be written, DATA-013 when a value is not finite.
    """
    found = {**prompt_tensors(feature.prompt, text_len), **feature.features}
    if feature.latents is not None:
        found["latents"] = feature.latents
    content = serialised(found, origin, feature, str(path))
    write_atomically(path, [content], len(content))


def serialised(tensors: Mapping[str, Tensor], origin: Origin, feature: Feature, place: str) -> bytes:
    """Content of a feature file, or of a blob of a shard.

    Args:
        tensors: by name. origin: what they are made from. feature: whose clip its header describes.
        place: where it goes, for the message.

    Raises:
        DataError: DATA-013 when a value is not finite.
    """
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    require_finite(given, place, "The encoder gave it; check the weights, or try dtype fp32 in model_wan.json.")
    about: dict[str, Any] = {**asdict(origin), "start_frame": feature.start_frame}
    if feature.taken is not None:
        about["taken"] = feature.taken
    return save(given, {"made_from": json.dumps(about)})  # one entry: the library writes several in no fixed order


def prompt_tensors(prompt: Tensor, text_len: int) -> dict[str, Tensor]:
    """A caption's embedding [L, D] and the mask [text_len] that is written beside it."""
    mask = torch.zeros(text_len, dtype=torch.uint8)
    mask[: len(prompt)] = 1
    return {"prompt": prompt, "prompt_mask": mask}


def parse_header(stream: BinaryIO, size: int) -> Header:
    """Header of a feature's content, `size` bytes that begin where the stream stands.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is no such content, or has another size than
            its header promises.
    """
    return _parsed(stream, size)[0]


def parse_feature(content: memoryview) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of a feature's content that may be written to: the tensors share its memory.

    Raises:
        RuntimeError, and what `parse_header` raises: it is no such content.
    """
    length = min(_MAX_HEADER_BYTES, int.from_bytes(content[:8], "little"))
    header, places = _parsed(io.BytesIO(content[: 8 + length]), len(content))
    data = torch.frombuffer(content, dtype=torch.uint8)
    tensors = {}
    for name, (begin, end) in places.items():
        dtype, shape = header.tensors[name]
        tensors[name] = data[begin:end].view(_DTYPES[dtype]).reshape(shape)
    return header, tensors


def _parsed(stream: BinaryIO, size: int) -> tuple[Header, dict[str, tuple[int, int]]]:
    """Header of a feature's content, and where each tensor begins and ends in it."""
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"its header claims {length} bytes, it has {size}")
    entries: dict[str, Any] = json.loads(stream.read(length))
    about = json.loads(entries.pop("__metadata__")["made_from"])
    offsets = {name: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for name, entry in entries.items()}
    end = max(last for _, last in offsets.values())
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes, its header promises {8 + length + end}")
    tensors = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in entries.items()}
    if any(size < 0 for _, shape in tensors.values() for size in shape):
        raise ValueError("a tensor has a negative size")
    origin = Origin(about["sample"], about["recipe"], about["caption"], about["video"])
    begin = 8 + length
    places = {name: (begin + first, begin + last) for name, (first, last) in offsets.items()}
    return Header(tensors, origin, int(about["start_frame"]), about.get("taken")), places


def read_header(path: Path) -> Header:
    """Read what a feature file says of itself, and check that its size is what the header promises.

    Raises:
        DataError: DATA-011 when the file is missing, cut off or no feature file, DATA-072 when it cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise ValueError("it is no regular file")
        size = status.st_size
        with open(path, "rb") as stream:
            return parse_header(stream, size)
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError("DATA-011", f"{path} is no complete feature file ({error}).", EXTRACT_AGAIN) from None


def read_feature(path: Path, model: WanConfig, origin: tuple[str, str] | None = None) -> Feature:
    """Read one sample and check it against the model.

    Args:
        path: the feature file.
        model: the transformer that is to take it.
        origin: (sample id, recipe key) that it must have, when known.

    Raises:
        DataError: DATA-011 for a damaged file, DATA-072 for one that cannot be read, DATA-012 for tensors that are
            missing or of the wrong kind or shape, DATA-013 for NaN or Infinity, DATA-016 for the features of another
            sample or recipe, DATA-017 for a caption longer than the model's text length, DATA-046 for features of
            another task, DATA-047 for a clip that is no longer than what is given of it, DATA-048 for features of
            another shape than the model takes.
    """
    header = read_header(path)
    if origin is not None and (header.origin.sample, header.origin.recipe) != origin:
        found = f'sample "{header.origin.sample}" of recipe {header.origin.recipe}'
        message = f'{path} holds {found}, expected sample "{origin[0]}" of recipe {origin[1]}.'
        raise DataError("DATA-016", message, EXTRACT_AGAIN)
    check_header(header, str(path), model, EXTRACT_AGAIN)
    try:
        tensors = load(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from None
    except (SafetensorError, KeyError) as error:
        raise DataError("DATA-011", f"{path} cannot be read ({error}).", EXTRACT_AGAIN) from None
    return checked_feature(header, tensors, str(path), EXTRACT_AGAIN, model)


def check_header(header: Header, place: str, model: WanConfig, remedy: str) -> None:
    """Check a sample's header before its data are read.

    Args:
        header: it. place: where the sample is. model: that is to take it. remedy: what to do with one that is wrong.

    Raises:
        DataError: DATA-012, DATA-017, DATA-046 to DATA-048, as `read_feature`.
    """
    raise_limited(_header_problems(header, place, model, remedy))


def checked_feature(
    header: Header, tensors: Mapping[str, Tensor], place: str, remedy: str, model: WanConfig | None = None
) -> Feature:
    """A sample whose tensors are as its header says and whose header is in order.

    Args:
        header, tensors, place, remedy: of the sample. model: that is to take it, where there is one.

    Raises:
        DataError: DATA-013 for NaN or Infinity, DATA-012 for a mask that does not fit the prompt, DATA-047 for a clip
            of one frame that is known.
    """
    require_finite(tensors, place, remedy)
    if model is not None and _is_all_known(tensors, model):
        raise DataError("DATA-047", *_nothing_to_learn(place, model))
    length = len(tensors["prompt"])
    if not bool((tensors["prompt_mask"] == (torch.arange(len(tensors["prompt_mask"])) < length)).all()):
        message = f"{place}: prompt has {length} tokens, and prompt_mask marks others."
        raise DataError("DATA-012", message, remedy)
    features = {name: value for name, value in tensors.items() if name not in _OF_EVERY_TASK}
    return Feature(tensors.get("latents"), tensors["prompt"], header.start_frame, features, header.taken)


def _header_problems(header: Header, place: str, model: WanConfig, again: str) -> list[Problem]:
    """Check names, dtypes and shapes before any data is read."""
    problems: list[Problem] = []

    def wrong(text: str, id: str = "DATA-012", remedy: str = again) -> None:
        problems.append(Problem(id, f"{place}: {text}.", remedy))

    wanted = {"prompt", "prompt_mask"}
    if header.origin.sample not in (EMPTY_PROMPT_ID, PROMPT_ID):
        own, held = _features_of(model.task), set(header.tensors)
        wanted |= {"latents"} | own
        others = _ALL_FEATURES - own
        if held & others or (own and not held & own):
            found = ", ".join(sorted(held & others)) or f"no {' and no '.join(sorted(own))}"
            wrong(f"it holds {found}, and the model is {model.task.name}", "DATA-046", OTHER_TASK)
            return problems
    if set(header.tensors) != wanted:
        wrong(f"it holds {', '.join(sorted(header.tensors))}, expected {', '.join(sorted(wanted))}")
        return problems
    exact = {feature.name for feature in model.task.stored if feature.stored is not None}
    for name in sorted(wanted - {"prompt_mask"}):
        expected = ["F64"] if name in exact else list(PRECISIONS)
        if header.tensors[name][0] not in expected:
            wrong(f"{name} is {header.tensors[name][0]}, expected one of {', '.join(expected)}")
    prompt, mask = header.tensors["prompt"][1], header.tensors["prompt_mask"]
    if len(prompt) != 2 or prod(prompt) < 1 or prompt[1] != model.text_dim:
        wrong(f"prompt is {list(prompt)}, expected [tokens, {model.text_dim}]")
    elif prompt[0] > model.text_len:
        remedy = "Extract again with model_max_length in tokenizer_config no longer than the model's text_len."
        wrong(f"prompt has {prompt[0]} tokens, the model takes {model.text_len}", "DATA-017", remedy)
    if mask[0] != "U8" or len(mask[1]) != 1:
        wrong(f"prompt_mask is {mask[0]} {list(mask[1])}, expected U8 of one axis")
    if "latents" in header.tensors:
        shape = header.tensors["latents"][1]
        if len(shape) != 4 or prod(shape) < 1 or shape[0] != model.noise_channels:
            wrong(f"latents are {list(shape)}, expected [{model.noise_channels}, F, H, W]")
        elif any(size % patch for size, patch in zip(shape[1:], model.patch_size, strict=True)):
            wrong(f"latents are {list(shape)}, which patches of {list(model.patch_size)} do not divide")
        else:
            problems += _feature_problems(header, place, model)
    return problems


def _feature_problems(header: Header, place: str, model: WanConfig) -> Iterator[Problem]:
    """Problems of a sample whose latents are as the model takes them."""
    _, frames, height, width = header.tensors["latents"][1]
    if frames < model.task.fewest_latent_frames and not model.task.with_mask:  # or else the mask tells
        yield Problem("DATA-047", *_nothing_to_learn(place, model))
    remedy = "Extract again with the encoders that belong to the model, or correct pretrain_model.json."
    for name, shape in model.stored_shapes((frames, height, width)).items():
        if header.tensors[name][1] != shape:
            found = list(header.tensors[name][1])
            yield Problem("DATA-048", f"{place}: {name} is {found}, the model takes {list(shape)}.", remedy)


def _unreadable(path: Path, error: OSError) -> DataError:
    """DATA-011 for a file that is not there, DATA-072 for one that this machine cannot read."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return DataError("DATA-011", f"{path} does not exist.", EXTRACT_AGAIN)
    return DataError("DATA-072", f"{path} cannot be read ({error}).", "Check its permissions and the disk it is on.")


def _nothing_to_learn(place: str, model: WanConfig) -> tuple[str, str]:
    found = f"{place}: the clip is one frame, and in {model.task.name} that is known: there is nothing to learn."
    return found, "Leave the sample out; clips need at least 5 frames."


def _is_all_known(tensors: Mapping[str, Tensor], model: WanConfig) -> bool:
    """Tell whether a sample is one latent frame whose mask, the first of its channels, is 1 everywhere."""
    if "latents" not in tensors or tensors["latents"].shape[1] >= model.task.fewest_latent_frames:
        return False
    return all(bool((tensors[of.name][:MASK_CHANNELS] == 1).all()) for of in model.task.made_by(Source.KNOWN_FRAMES))
