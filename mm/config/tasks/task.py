"""The type of a task's declaration: what a sample has, how that becomes inputs of the model, and where they enter.

A declaration is plain data and imports no torch, so that rules and messages may ask it before anything is loaded. What
runs is elsewhere and is found by the words that stand here: `mm.extract.sources` makes features of a clip,
`mm.generate.sources` of a row, `mm.wan.embeddings` has the modules that features go through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

Shape = tuple[int, ...]


class Entry(Enum):
    """Place where a feature enters the model."""

    CHANNELS = "channels behind those of the noisy latents"
    CONTEXT = "tokens in front of the text's, which cross attention tells apart"
    TOKENS = "tokens of one more latent frame in front of the video's, which self attention sees and nobody predicts"
    HIDDEN = "added to the video's embedded tokens"
    TIME_MODULATION = "added to the time modulation that all blocks share"
    SIDE_BLOCKS = "tokens of a stream beside the video's, which runs through blocks of its own and adds hints"
    HINTS = "a factor on what the side blocks add"


class Source(Enum):
    """Maker of a feature."""

    IMAGE_ENCODER = "the image encoder, of the frames that are given"
    KNOWN_FRAMES = "the VAE, of a video that is grey between the frames that are given; a mask of them in front"
    KNOWN_PIXELS = "the VAE, of a video that is grey where a mask gives its pixels free; the mask in front"
    COLUMN = "a number beside the video, as it is"
    CONTROL_VIDEO = "the VAE, of a control video; behind it the latents of a start image, zeros after the first frame"
    START_IMAGE = "the VAE, of a start image, zeros after the first frame"
    REFERENCE_IMAGE = "the VAE, of a reference image"
    CAMERA_PATH = "the rays of a camera's pixels along its path"
    EDITED_VIDEO = "the VAE, of what a mask keeps of a video and of what it gives free, and the mask"
    SETTING = "a number that generation sets"


@dataclass(frozen=True)
class Frame:
    """A role of media: a frame of the clip that is given; in training it is taken from the clip itself.

    Attributes:
        name: for messages and files, `first`. index: in the clip.
    """

    name: str
    index: int


@dataclass(frozen=True)
class Column:
    """A role that is a number: a column of the annotations, and a line of a text file in generation.

    Attributes:
        name: of the column, and of the feature that is made of it. lowest, highest: what it may be.
    """

    name: str
    lowest: float
    highest: float

    @property
    def expected(self) -> str:
        """`a number from 0 to 100`."""
        return f"a number from {self.lowest:g} to {self.highest:g}"

    def holds(self, value: object) -> bool:
        """Tell whether a value may stand in it."""
        return type(value) in (int, float) and self.lowest <= value <= self.highest  # type: ignore[operator]


MediaKind = Literal["video", "image", "images", "mask", "poses"]
ListName = Literal["images", "videos", "controls", "references", "cameras", "masks", "input_videos"]
"""Lists of a generation, of what goes with its prompts line by line."""
FromClip = Literal["first frame", "other frame", "whole"]


@dataclass(frozen=True)
class Media:
    """A role of media: files beside the clip.

    Attributes:
        name: in tables (`mm.data.metadata.VideoSample.roles`), messages and files of generation.
        kind: a video, one image, several images, a video or image of a mask, or a file of camera poses.
        listed: the list of a generation that it stands in.
        required: whether every row gives it. Without, models are called with what stands for nothing given.
        from_clip: what of the clip itself training takes where a row lists no file. A clip gives one image at most: of
            a task that can take another frame than the first, one of both is drawn.
        is_trained: whether features are made of it; otherwise generation alone takes it, and training has the clip's
            own first frame.
        in_front: each image is a latent frame in front of the clip's, which the sampler has and nobody decodes; in
            training it is noised and learned as the clip's frames are.
        most: files that a row may list of several images.
        also: roles that are this one where the task takes no files of them: other systems' tables have one word for it.
    """

    name: str
    kind: MediaKind
    listed: ListName
    required: bool = True
    from_clip: FromClip | None = None
    is_trained: bool = True
    in_front: bool = False
    most: int = 1
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Sizes that shapes of features are made of.

    Attributes:
        channels: of latents. latent: F, H, W of a sample's latents.
        image_dim, image_tokens: width and number of the image encoder's tokens of one image; 0 without it.
    """

    channels: int
    latent: tuple[int, int, int]
    image_dim: int
    image_tokens: int


@dataclass(frozen=True)
class InputFeature:
    """A named input of the model, beside latents, timestep and text.

    Attributes:
        name: in feature files, batches and the model's arguments. title: in messages.
        source: what makes it. entry: where it enters.
        shape: of one sample's, from the sizes.
        module: the module of the model that it goes through (`mm.wan.embeddings`); None where it is used as it is.
        error, remedy: id and remedy where the model is given another shape.
        parts: of one that has several in its channels, what these are, by word, and how many of each.
        mindspeed: its name in MindSpeed-MM's feature files, where these have it.
        stored: shape in stores where that is another one: of what it is computed from when the model is given it.
        dropped_as: words of the conditions that training drops for some samples (ConditionDropout in
            mm/config/run/data.py): of a feature with parts these parts, of another one the whole. Zeros stand for them.
        dropped_with_caption: zeros take its place where a sample's caption is dropped in training. Without, it stays:
            guidance is about the caption alone.
        optional: models run without it too, as if its path into them were not there. All samples of a batch have it or
            none.
    """

    name: str
    title: str
    source: Source
    entry: Entry
    shape: Callable[[Sizes], Shape]
    error: str
    remedy: str
    module: str | None = None
    parts: Callable[[Sizes], dict[str, int]] | None = None
    mindspeed: str | None = None
    stored: Callable[[Sizes], Shape] | None = None
    dropped_as: tuple[str, ...] = ()
    dropped_with_caption: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: in configurations, recipes and stores. title: in names of models, `I2V`.
        roles: what a sample has beside its caption and its clip, which is the target.
        features: the inputs made of them, in the order in which they are drawn, listed and checked.
        sizes: fields of `WanConfig` that its models alone have, with the values of the released ones (where sizes of
            models differ in one, of the smallest).
        positions: image tokens get learned positions, which tell the images apart.
        marks: parameters by which weights of it are known, native names.
        latent_channels: of its models' latents, where they alone have so many, by which weights are known too.
        latent_pixels: rows and columns of pixels that a latent pixel of its VAE stands for.
        first_frame_share: share of samples whose first latent frame is given clean in training where nothing else is
            said; 0 for tasks that never are. The others train without it, and so do single frames.
        recipe: fields of a feature store's recipe that it has beside those of all tasks.
        negative: what stands before the release's negative prompt.
        models_of: the task whose models are trained on its features, where these differ from that one's in how they
            are made alone. No model is of such a task.
        with_mask: generation may give its models any pixels, by a video and a mask, or none at all, instead of frames.
        with_video: what generation from given videos, which all models can do, is called where it has its own word.
        with_last_frame: the task of both frames, whose rows are taken where models can be given the last one too.
    """

    name: str
    title: str
    roles: tuple[Frame | Column | Media, ...] = ()
    features: tuple[InputFeature, ...] = ()
    sizes: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    positions: bool = False
    marks: frozenset[str] = frozenset()
    latent_channels: int | None = None
    latent_pixels: int = 8
    first_frame_share: float = 0.0
    recipe: frozenset[str] = frozenset()
    negative: str = ""
    models_of: str | None = None
    with_mask: bool = False
    with_video: str | None = None
    with_last_frame: str | None = None

    @property
    def trains(self) -> str:
        """The task whose models are trained on its features."""
        return self.models_of or self.name

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The roles that are frames of the clip."""
        return tuple(role for role in self.roles if isinstance(role, Frame))

    @property
    def columns(self) -> tuple[Column, ...]:
        """The roles that are numbers."""
        return tuple(role for role in self.roles if isinstance(role, Column))

    @property
    def media(self) -> tuple[Media, ...]:
        """The roles that are files beside the clip."""
        return tuple(role for role in self.roles if isinstance(role, Media))

    @property
    def fewest_latent_frames(self) -> int:
        """Frames that a clip's latents must have so that something is left to learn where frames are given.

        Where pixels are given by masks, a single frame has both kinds.
        """
        return 2 if self.made_by(Source.KNOWN_FRAMES) else 1

    @property
    def leading_frames(self) -> int:
        """Latent frames of tokens in front of the video's, where all features are given."""
        return len(self.entering(Entry.TOKENS))

    @property
    def most_in_front(self) -> int:
        """Images that a clip has in front of it at most."""
        return sum(media.most for media in self.media if media.in_front)

    def images_in_front(self, files: Mapping[str, Sequence[object]]) -> int:
        """Latent frames in front of a clip's, by the files or images that it has of each role."""
        return sum(len(files.get(media.name, ())) for media in self.media if media.in_front)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that its features go through."""
        return tuple(feature.module for feature in self.features if feature.module is not None)

    @property
    def stored(self) -> tuple[InputFeature, ...]:
        """The features that extraction makes."""
        return tuple(feature for feature in self.features if feature.source is not Source.SETTING)

    @property
    def dropped(self) -> frozenset[str]:
        """Words of the conditions that training may drop."""
        return frozenset(word for feature in self.features for word in feature.dropped_as)

    def entering(self, entry: Entry) -> tuple[InputFeature, ...]:
        """The features that enter at one place."""
        return tuple(feature for feature in self.features if feature.entry is entry)

    def made_by(self, source: Source) -> tuple[InputFeature, ...]:
        """The features that one source makes."""
        return tuple(feature for feature in self.features if feature.source is source)

    def channels(self, sizes: Sizes) -> int:
        """Channels behind those of the noisy latents."""
        return sum(feature.shape(sizes)[0] for feature in self.entering(Entry.CHANNELS))

    def channels_in_words(self, sizes: Sizes) -> str:
        """`4 mask and 16 condition`."""
        found = [feature.parts(sizes) for feature in self.entering(Entry.CHANNELS) if feature.parts is not None]
        return " and ".join(f"{count} {word}" for parts in found for word, count in parts.items())

    def context_tokens(self, sizes: Sizes) -> int:
        """Tokens in front of the text's."""
        return sum(feature.shape(sizes)[0] for feature in self.entering(Entry.CONTEXT))
