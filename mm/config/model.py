"""The shape of a Wan transformer, with the field names of the `predictor` section of pretrain_model.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from mm.config.base import Section
from mm.config.tasks.flf2v import FLF2V
from mm.config.tasks.fun_camera import FUN_CAMERA
from mm.config.tasks.fun_control import FUN_CONTROL
from mm.config.tasks.fun_control_ref import FUN_CONTROL_REF
from mm.config.tasks.i2v import I2V
from mm.config.tasks.registry import DEFAULT, TASKS, TaskName, named
from mm.config.tasks.speedcontrol import SPEEDCONTROL
from mm.config.tasks.task import Entry, Shape, Sizes, Task
from mm.config.tasks.ti2v import TI2V
from mm.config.tasks.vace import VACE
from mm.config.tasks.wan22_i2v import WAN22_I2V

Precision = Literal["fp32", "bf16", "fp16"]
TASK_FIELD = "model_type"
_MOST = 2**20  # far beyond any model; what configurations of strangers say is built, on the meta device at least
_MOST_BLOCKS = 1000
_MOST_OF_A_PATCH = 64
_OF_A_RUN = frozenset({"text_len", "clip_token_len", "force_2_1_time_embedding"})
"""Fields of a shape in which weights of one model may be used differently."""


def task_named_in(values: Mapping[str, Any]) -> Task | None:
    """The task of a model's unchecked fields; None where they name none that there is."""
    return TASKS.get(values.get(TASK_FIELD, DEFAULT.name))


TASK_FIELD = "model_type"
"""The field of a shape that says the task."""


class WanConfig(Section):
    """Shape of one Wan2.1 transformer. Defaults are what all published Wan2.1 models share.

    Attributes:
        model_type: the task the weights belong to (`mm.config.tasks`).
        patch_size: latent frames, rows and columns that make one token.
        text_len: text tokens that cross attention sees; shorter captions are padded with zero vectors.
        text_dim: width of the text encoder's output.
        in_dim, out_dim: channels into the patch embedding and out of the head. in_dim is out_dim and the
            channels of the task's features.
        img_dim: width of the image encoder's features; for tasks with images only.
        clip_token_len: tokens that the image encoder makes of one image; for tasks with images only.
        force_2_1_time_embedding: one timestep a sample, as Wan2.1's models have, of models that may have one for each
            token: a run's choice, not of weights. Nothing then tells a given first frame from noise, so none is given.
        vace_layers: blocks that take the hint of a side block, one each; for VACE only. The first is block 0.
        hidden_size: D; ffn_dim: width inside the feed-forward; num_heads: N; num_layers: number of blocks.
        freq_dim: width of the sinusoidal timestep embedding.
        qk_norm: RMSNorm over all heads on queries and keys; cross_attn_norm: affine LayerNorm before cross attention.
        eps: of all norms.
    """

    model_type: TaskName = DEFAULT.name
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = Field(512, ge=1, le=_MOST)
    text_dim: int = Field(4096, ge=1, le=_MOST)
    in_dim: int = Field(16, ge=1, le=_MOST)
    out_dim: int = Field(16, ge=1, le=_MOST)
    img_dim: int | None = Field(None, ge=1, le=_MOST)
    clip_token_len: int | None = Field(None, ge=1, le=_MOST)
    force_2_1_time_embedding: bool = False
    vace_layers: tuple[int, ...] | None = None
    hidden_size: int = Field(ge=1, le=_MOST)
    ffn_dim: int = Field(ge=1, le=_MOST)
    num_heads: int = Field(ge=1, le=_MOST)
    num_layers: int = Field(ge=1, le=_MOST_BLOCKS)
    freq_dim: int = Field(256, ge=2, le=_MOST, multiple_of=2)
    qk_norm: Literal[True] = True
    cross_attn_norm: Literal[True] = True
    eps: float = Field(1e-6, gt=0)

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def task(self) -> Task:
        """The declaration of the task."""
        return TASKS[self.model_type]

    @property
    def first_frame_share(self) -> float:
        """Share of samples whose first latent frame is given clean where nothing else is said; 0 where none can be."""
        return 0.0 if self.force_2_1_time_embedding else self.task.first_frame_share

    @property
    def task_in_words(self) -> str:
        """The task as the user says it, for messages."""
        return f"predictor.model_type is {self.model_type}"

    @property
    def image_dim(self) -> int:
        """Width of the image features; 0 without images."""
        return self.img_dim or 0

    @property
    def image_tokens(self) -> int:
        """Tokens in front of the text's, of all features that enter there; 0 without images."""
        return self.task.context_tokens(self.feature_sizes())

    @property
    def side_blocks(self) -> dict[int, int]:
        """Side blocks, by the block that takes their hint."""
        return {block: number for number, block in enumerate(self.vace_layers or ())}

    @property
    def side_channels(self) -> int:
        """Channels of the side blocks' context; 0 without."""
        return sum(feature.shape(self.feature_sizes())[0] for feature in self.task.entering(Entry.SIDE_BLOCKS))

    @property
    def noise_channels(self) -> int:
        """Channels of the noisy latents, which are what a sampler denoises."""
        return self.in_dim - self.condition_channels

    @property
    def condition_channels(self) -> int:
        """Channels of the task's features behind the noisy ones; 0 where there are none."""
        return self.task.channels(self.feature_sizes())

    def num_tokens(self, latent: tuple[int, int, int]) -> int:
        """Tokens of one sample with all of its features, given F, H, W of its latents: also those nobody predicts."""
        (frames, *sides), (of_frames, *of_sides) = latent, self.patch_size
        frames = frames // of_frames + self.task.leading_frames
        return frames * math.prod(side // patch for side, patch in zip(sides, of_sides, strict=True))

    def feature_shapes(self, latent: tuple[int, int, int]) -> dict[str, Shape]:
        """Shapes of one sample's features by name, optional ones too, given F, H, W of its latents."""
        sizes = self.feature_sizes(latent)
        return {feature.name: feature.shape(sizes) for feature in self.task.features}

    def stored_shapes(self, latent: tuple[int, int, int]) -> dict[str, Shape]:
        """Shapes of one sample's features in stores by name, given F, H, W of its latents."""
        sizes = self.feature_sizes(latent)
        return {feature.name: (feature.stored or feature.shape)(sizes) for feature in self.task.stored}

    def feature_sizes(self, latent: tuple[int, int, int] = (1, 1, 1)) -> Sizes:
        """Sizes that shapes of features are made of, given F, H, W of latents."""
        return Sizes(self.out_dim, latent, self.image_dim, self.clip_token_len or 0)

    def differing_fields(self, other: WanConfig) -> list[str]:
        """Fields in which weights of the two models differ.

        Those of `_OF_A_RUN` are none of them: how far captions are padded, how finely images are cut and how many
        timesteps a sample has is a run's choice, and Hugging Face folders do not record it. (The learned positions of
        flf2v have a row for each image token; weights with another number of them differ in a tensor's shape.)
        """
        fields = (name for name in WanConfig.model_fields if name not in _OF_A_RUN)
        return [name for name in fields if getattr(self, name) != getattr(other, name)]

    @model_validator(mode="after")
    def _heads_fit(self) -> WanConfig:
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must give an even whole head width"
            )
        if min(self.patch_size) < 1 or max(self.patch_size) > _MOST_OF_A_PATCH:
            raise ValueError(f"patch_size {self.patch_size} must be of numbers from 1 to {_MOST_OF_A_PATCH}")
        return self

    @model_validator(mode="after")
    def _task_fits(self) -> WanConfig:
        task, name_of_task = self.task, self.model_type
        for name in dict.fromkeys(name for other in TASKS.values() for name in other.sizes):
            value = getattr(self, name)
            if value is not None and name not in task.sizes:
                raise ValueError(f"{name} {value} has no effect in {name_of_task} models; remove it")
        if task.latent_channels not in (None, self.out_dim):
            raise ValueError(f"out_dim of {name_of_task} models is {task.latent_channels}, not {self.out_dim}")
        if self.force_2_1_time_embedding and not task.first_frame_share:
            raise ValueError(
                f"force_2_1_time_embedding has no effect in {name_of_task} models, which have one timestep a sample; "
                "remove it"
            )
        layers = self.vace_layers
        if layers and (list(layers) != sorted(set(layers)) or layers[0] != 0 or layers[-1] >= self.num_layers):
            raise ValueError(
                f"vace_layers {list(layers)} must be rising numbers from 0 to {self.num_layers - 1}, 0 among them"
            )
        missing = [name for name in task.sizes if getattr(self, name) in (None, ())]
        if missing:
            released = " and ".join(f"{name} {value}" for name, value in task.sizes.items())
            raise ValueError(f"{name_of_task} models need {' and '.join(missing)}; the released ones have {released}")
        added = self.condition_channels
        if added and self.in_dim != self.out_dim + added:
            raise ValueError(
                f"in_dim of {name_of_task} models with out_dim {self.out_dim} is {self.out_dim + added} "
                f"({self.out_dim} noisy, {task.channels_in_words(self.feature_sizes())} channels), not {self.in_dim}"
            )
        more = self.in_dim - self.out_dim
        others = [other for other in TASKS.values() if more and other.channels(self.feature_sizes()) == more]
        if not added and self.out_dim == 16 and others:
            of_others = named(others, " and ")
            raise ValueError(f"in_dim {self.in_dim} is that of {of_others} models, and model_type is {name_of_task}")
        return self


WAN_1_3B = WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = WanConfig(hidden_size=5120, ffn_dim=13824, num_heads=40, num_layers=40)


def of_task(text_to_video: WanConfig, task: Task, **sizes: object) -> WanConfig:
    """A model of the size of one of text to video and of another task, with the task's released sizes or others."""
    own = {**task.sizes, **sizes}
    shape = {**text_to_video.model_dump(), TASK_FIELD: task.name, **own}
    of_images = (own.get(name, 0) for name in ("img_dim", "clip_token_len"))
    image_dim, image_tokens = (size if isinstance(size, int) else 0 for size in of_images)
    added = task.channels(Sizes(text_to_video.out_dim, (1, 1, 1), image_dim, image_tokens))
    return WanConfig.model_validate(shape | {"in_dim": text_to_video.out_dim + added})


WAN_I2V_1_3B = of_task(WAN_1_3B, I2V)
WAN_I2V_14B = of_task(WAN_14B, I2V)
WAN_FLF2V_14B = of_task(WAN_14B, FLF2V)
WAN_TI2V_5B = WanConfig(
    model_type=TI2V.name, in_dim=48, out_dim=48, hidden_size=3072, ffn_dim=14336, num_heads=24, num_layers=30
)
WAN_VACE_14B = of_task(WAN_14B, VACE, vace_layers=tuple(range(0, 40, 5)))
PUBLISHED = {
    "Wan2.1 T2V 1.3B": WAN_1_3B,
    "Wan2.1 T2V 14B": WAN_14B,
    "Wan2.1 Fun-InP 1.3B": WAN_I2V_1_3B,
    "Wan2.1 I2V 14B": WAN_I2V_14B,
    "Wan2.1 FLF2V 14B": WAN_FLF2V_14B,
    "Wan2.1 SpeedControl 1.3B": of_task(WAN_1_3B, SPEEDCONTROL),
    **{
        f"Wan2.1 {task.title} {size}": of_task(model, task)
        for task in (FUN_CONTROL, FUN_CONTROL_REF, FUN_CAMERA)
        for size, model in (("1.3B", WAN_1_3B), ("14B", WAN_14B))
    },
    "Wan2.1 VACE 1.3B": of_task(WAN_1_3B, VACE),
    "Wan2.1 VACE 14B": WAN_VACE_14B,
    "Wan2.2 I2V A14B": of_task(WAN_14B, WAN22_I2V),
    "Wan2.2 TI2V 5B": WAN_TI2V_5B,
}
"""Published models by name; of those with one shape the first: Wan2.2's text-to-video experts are Wan2.1's T2V 14B, and
the 14B of Fun-InP is I2V's."""
