"""Features of clips and captions, as training takes them, without a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mm.api.arguments import VideoInput, as_pixels, column_problems
from mm.api.encoders import Encoders, name_of
from mm.config.data import MAX_TEXT_TOKENS, TEMPORAL_STRIDE
from mm.config.model import WAN_1_3B
from mm.config.rules.generation import size_problems
from mm.config.run.extraction import SourceClip
from mm.config.tasks.registry import DEFAULT, FEATURE_TASKS, FeatureTaskName
from mm.config.tasks.task import Source, Task
from mm.data.clips import Clip, clip_of_frames, load_clip
from mm.data.features import Feature
from mm.data.metadata import Annotation, VideoSample
from mm.data.sources.checking import beside_problems
from mm.device.backend import DeviceKind, select
from mm.errors import ConfigError, DataError, Problem, raise_all
from mm.extract.encode import ClipEncoder
from mm.extract.sources import VisualEncoders
from mm.wan.conditions.computed import computed
from mm.wan.encoders import require_stride


@dataclass(frozen=True)
class VideoRow:
    """A video with its caption.

    Attributes:
        video: a file, or frames uint8 [F, H, W, 3]. caption: any text; the empty one is a caption, too.
        columns: the task's numbers, by name.
        media: files beside it, by the task's roles (docs/data.md); of a role that takes several a list of them.
    """

    video: VideoInput
    caption: str
    columns: Mapping[str, float] = field(default_factory=dict)
    media: Mapping[str, str | Path | Sequence[str | Path]] = field(default_factory=dict)


def extract_features(
    rows: Sequence[VideoRow | tuple[VideoInput, str]],
    encoders: Encoders | str | Path,
    *,
    task: FeatureTaskName = DEFAULT.name,
    size: tuple[int, int, int] = (81, 480, 832),
    frame_interval: int = 1,
    min_num_frames: int | None = None,
    max_text_tokens: int = MAX_TEXT_TOKENS,
    seed: int = 1234,
    device: DeviceKind | None = None,
) -> list[Feature]:
    """Encode videos and captions as `mm extract` does, one after the other, and write nothing.

    Args:
        rows: videos with their captions.
        encoders: the encoders, or a model's folder in the diffusers layout (`Encoders.of`).
        task: what the features are for.
        size: frames (4k + 1), height and width of the clips; videos are resized to cover it and cropped at the centre.
        frame_interval: every how-manieth frame is taken.
        min_num_frames: the fewest frames to accept of a short video; None refuses one that is shorter than `size`.
        max_text_tokens: tokens after which a caption is cut.
        seed: with a file's path as given, or a row's number where it is in memory, it decides where in a longer video
            the clip begins.
        device: kind of device; None takes the best there is.

    Returns:
        For each row `latents` [C, F, H, W], those of images in front of the clip first, `prompt` [L, text_dim],
        `start_frame`, and in `features` what the task declares, by name, on the encoders' device and in their
        precision.

    Raises:
        ConfigError: CFG-060 and CFG-061 for the size, CFG-075 for a clip that is no longer than what is given of it,
            CFG-120 for columns, CFG-200 for other arguments; all rows' at once.
        DataError: DATA-245 to DATA-247 and DATA-250 for media, all rows' at once; DATA-004 for a video that is too
            short, what `mm.data.clips.load_clip` raises, DATA-040 to DATA-045 for encoders, DATA-260 for a VAE of
            another stride than the task's models have.
    """
    declared = FEATURE_TASKS[task]
    if not isinstance(encoders, Encoders):
        encoders = Encoders.of(encoders)
    given = [row if isinstance(row, VideoRow) else VideoRow(*row) for row in rows]
    problems = list(size_problems(size, WAN_1_3B.patch_size, declared, "size"))
    for index, row in enumerate(given):
        problems += [*column_problems(declared, row.columns, f"Row {index}"), *_unknown_roles(declared, row, index)]
    problems += _nothing_to_learn(declared, min(size[0], min_num_frames or size[0]))
    raise_all(ConfigError, problems)
    samples = [_sample(row, index) for index, row in enumerate(given)]
    checked = (beside_problems(one, declared.media, f"Row {index}") for index, one in enumerate(samples))
    raise_all(DataError, [problem for found in checked for problem in found])
    preprocess = SourceClip(
        num_frames=size[0],
        height=size[1],
        width=size[2],
        frame_interval=frame_interval,
        min_num_frames=min_num_frames,
    )
    place = select(device).device
    video, text = encoders.load_vae(place), encoders.load_text_encoder(place, max_text_tokens)
    require_stride(name_of(encoders.vae, "VAE"), video, declared)
    visual = VisualEncoders(declared, video, video)
    if declared.made_by(Source.IMAGE_ENCODER):
        name = name_of(encoders.image_encoder, "image encoder")
        visual = VisualEncoders(declared, video, video, encoders.load_image_encoder(place), name)
    encoder, found = ClipEncoder(text, visual), []
    for index, (row, sample) in enumerate(zip(given, samples, strict=True)):
        clip = _clip(row, index, sample, preprocess, seed, declared)
        feature = encoder.encode(clip, encoder.prompt(row.caption), row.columns)
        one = {name: value[None] for name, value in feature.features.items()}
        found.append(replace(feature, features={name: value[0] for name, value in computed(one, declared).items()}))
    return found


def _unknown_roles(task: Task, row: VideoRow, index: int) -> Iterator[Problem]:
    """CFG-200 for roles that the task does not have."""
    known = [media.name for media in task.media]
    for name in row.media.keys() - known:
        has = f"it takes {', '.join(known)}" if known else "it takes no files"
        yield Problem(
            "CFG-200", f"Row {index} gives media {name!r}, and the task is {task.name}.", f"Remove it; {has}."
        )


def _sample(row: VideoRow, index: int) -> VideoSample:
    name = str(row.video) if isinstance(row.video, (str, Path)) else f"row {index}"
    roles = {
        role: (Path(files),) if isinstance(files, (str, Path)) else tuple(map(Path, files))
        for role, files in row.media.items()
    }
    about = Annotation(path=name, cap=row.caption)
    return VideoSample(name, Path(name), (row.caption,), about, row.columns, roles=roles)


def _clip(row: VideoRow, index: int, sample: VideoSample, preprocess: SourceClip, seed: int, task: Task) -> Clip:
    if isinstance(row.video, (str, Path)):
        return load_clip(sample, preprocess, seed, media=task.media)
    pixels = as_pixels(row.video, f"The video of row {index}", 4)
    return clip_of_frames(pixels, sample, preprocess, seed, task.media)


def _nothing_to_learn(task: Task, num_frames: int) -> Iterator[Problem]:
    """CFG-075, as for `mm extract`."""
    if task.fewest_latent_frames > 1 and num_frames <= TEMPORAL_STRIDE:
        message = f"A clip of {num_frames} frames is its own first frame, and {task.name} has nothing to learn."
        yield Problem("CFG-075", message, f"Ask for at least {TEMPORAL_STRIDE + 1} frames in size and min_num_frames.")
