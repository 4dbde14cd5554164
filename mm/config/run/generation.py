"""A generation: what is generated with which model, and how that is cut over the processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.data import TEMPORAL_STRIDE
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, mesh_layout
from mm.config.model import Precision, WanConfig
from mm.config.run.encoders import EncodersSection, TileBlend, VideoEncoderSection
from mm.config.run.listed import LISTS, Listed, Shown, lists_of, sees_images
from mm.config.run.mesh import MeshRun
from mm.config.run.parallel import MeshSection
from mm.config.run.residency import Residency
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import ListName, Task

DeviceName = Literal["cpu", "cuda", "npu"]
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Of the Wan2.1 release, which its models are meant to be used with: wan/configs/shared_config.py for text alone. Tasks
put something before it (`Task.negative`)."""


def latent_size(size: tuple[int, int, int], latent_pixels: int) -> tuple[int, int, int]:
    """(F, H, W) of the latents of a clip of so many frames, rows and columns; a latent pixel is as high as so many."""
    frames, height, width = size
    return (frames - 1) // TEMPORAL_STRIDE + 1, height // latent_pixels, width // latent_pixels


TeaCacheModel = Literal["Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P"]
"""Models for which TeaCache's authors have fitted how much steps differ."""


class GenerationSection(Section):
    """Generation: the chance, and the device.

    Attributes:
        seed: with the prompt's index it decides the initial noise. device: None takes the best there is.
    """

    seed: int = Field(42, ge=0)
    device: DeviceName | None = None


class GenerationVideoEncoder(VideoEncoderSection):
    """The video VAE, which encodes what is given and decodes the clips.

    Attributes:
        tile_blend: the way in which tiles are put together, where any are used; None takes diffusers'.
    """

    tile_blend: TileBlend | None = None


class GenerationEncoders(EncodersSection):
    """All encoders."""

    vae: GenerationVideoEncoder


class AdapterFile(Section):
    """One adapter: its file (`docs/lora.md`) and the factor on its update."""

    path: str = Field(min_length=1)
    strength: float = 1.0


class LowNoiseExpert(Section):
    """The expert for little noise, of the other one's shape.

    Attributes:
        weights: in any known format. adapters: added to them, in this order.
        boundary: noise level from which on the other expert is asked; None for what the weights' folder records.
        guidance_scale: of this one; None for the other one's.
    """

    weights: str = Field(min_length=1)
    adapters: tuple[AdapterFile, ...] = ()
    boundary: float | None = Field(None, gt=0, lt=1)
    guidance_scale: float | None = Field(None, ge=0)


class TransformerSection(Section):
    """The transformer.

    Attributes:
        shape: sizes, and the task that its weights are for. precision: of parameters and activations.
        weights: in any known format. adapters: added to them, in this order.
        low_noise: the second of two experts, for little noise; None where there is one transformer.
    """

    shape: WanConfig
    precision: Precision
    weights: str | None = Field(None, min_length=1)
    adapters: tuple[AdapterFile, ...] = ()
    low_noise: LowNoiseExpert | None = None


class SamplingSection(Section):
    """Sampling: the integration of the velocity.

    Attributes:
        solver: the sampler. steps: evaluations of the model for each prompt; twice as many with guidance.
        shift: of the noise levels; 3 for 480p and 5 for 720p are usual.
        guidance_scale: of classifier-free guidance; exactly 1 leaves the negative prompt out.
        batched_guidance: both prompts in one pass of twice the batch instead of two passes.
        solver_order: of UniPC and DPM++; None takes 2. solver_type: of UniPC alone; None takes bh2.
        attention: of the video's tokens to each other: exact, or by SageAttention in 8 bits.
        tea_cache_threshold: change, predicted from the time modulation, up to which what the blocks added at an earlier
            step is added again; None runs them at every step.
        tea_cache_model: the model whose prediction is used.
        window_size, window_stride: latent frames that the transformer sees at a time, and between the beginnings of
            two such windows; None shows it the whole clip.
    """

    solver: Literal["unipc", "euler", "dpm++"] = "unipc"
    steps: int = Field(50, ge=1)
    shift: float = Field(gt=0)
    guidance_scale: float = Field(5.0, ge=0)
    batched_guidance: bool = False
    solver_order: Literal[1, 2, 3] | None = None
    solver_type: Literal["bh1", "bh2"] | None = None
    attention: Literal["exact", "sage"] = "exact"
    tea_cache_threshold: float | None = Field(None, gt=0)
    tea_cache_model: TeaCacheModel | None = None
    window_size: int | None = Field(None, ge=1)
    window_stride: int | None = Field(None, ge=1)

    @property
    def tea_cache(self) -> tuple[float, TeaCacheModel] | None:
        """Threshold and model of TeaCache, where both are given."""
        if self.tea_cache_threshold is None or self.tea_cache_model is None:
            return None
        return self.tea_cache_threshold, self.tea_cache_model

    @property
    def windows(self) -> tuple[int, int] | None:
        """Size and stride of windows, where both are given."""
        if self.window_size is None or self.window_stride is None:
            return None
        return self.window_size, self.window_stride

    @property
    def guided(self) -> bool:
        """True where the negative prompt takes part."""
        return self.guidance_scale != 1


class InputsSection(Section):
    """Inputs of clips, line by line.

    Attributes:
        prompts: a text file, one prompt a line.
        images: a text file, one image a line for each prompt, or two with a comma between (first, last).
        videos: a text file, one video a line for each prompt; the clips are made from these.
        input_videos: the same where the model sees `videos`; the clips begin as these.
        controls: a text file, one video a line for each prompt, which the clips follow frame by frame.
        references: a text file, images of what is to be seen, a line for each prompt, with commas between.
        cameras: a text file, one pose file a line for each prompt, or a direction and a speed: `Left 0.02`.
        masks: a text file, one video or image a line for each prompt, white where `videos` are to be made anew.
        columns: text files, one number a line for each prompt, by the names of the columns that the task declares.
        negative_prompt: what guidance leads away from; None is the Wan2.1 release's for the task.
        last_frame: a model that sees the first frame alone is given the last one too.
        strength: with videos that clips begin as, the share of the steps that are taken, above 0 (the given clip) to 1
            (a new one).
        strength_steps: with videos, the steps that a strength leaves: the last ones, or all, closer to each other; None
            takes the last.
        start_frame: with videos, the first frame that is taken of them.
        text_only: a model that sees frames is shown none.
        vace_scale: a factor on what side blocks add; None is 1.
    """

    prompts: str = Field(min_length=1)
    images: str | None = Field(None, min_length=1)
    videos: str | None = Field(None, min_length=1)
    controls: str | None = Field(None, min_length=1)
    references: str | None = Field(None, min_length=1)
    cameras: str | None = Field(None, min_length=1)
    masks: str | None = Field(None, min_length=1)
    input_videos: str | None = Field(None, min_length=1)
    columns: dict[str, str] = Field(default_factory=dict)
    negative_prompt: str | None = None
    last_frame: bool = False
    strength: float | None = None
    strength_steps: Literal["last", "all"] | None = None
    start_frame: int | None = Field(None, ge=0)
    text_only: bool = False
    vace_scale: float | None = None

    @property
    def lists(self) -> dict[ListName, str]:
        """The lists that are given beside prompts and numbers, with their files."""
        files = {name: getattr(self, name) for name in LISTS}
        return {name: file for name, file in files.items() if file is not None}

    def num_evaluated(self, steps: int) -> int:
        """Steps that are taken of so many."""
        if self.strength is None or self.strength_steps == "all":
            return steps
        return int(steps * self.strength)

    @property
    def shown(self) -> Shown:
        """Way in which a model with given frames is told them."""
        return Shown(masked=self.masks is not None, nothing=self.text_only)

    @property
    def settings(self) -> dict[str, float]:
        """Features that are numbers which are set, by name (`Source.SETTING`)."""
        return {} if self.vace_scale is None else {"vace_scale": self.vace_scale}


class ClipsSection(Section):
    """The clips.

    Attributes:
        path: their folder. overwrite: replace clips that exist, whatever made them; otherwise they are an error.
        num_frames: 4k + 1. height, width: pixels. fps: frames a second.
    """

    path: str = Field(min_length=1)
    overwrite: bool = False
    num_frames: int
    height: int
    width: int
    fps: int = Field(16, ge=1, le=240)

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.num_frames, self.height, self.width


class BatchSection(Section):
    """Prompts in one forward."""

    size: int = Field(1, ge=1)


class CollectiveSection(Section):
    """Time that a collective may wait."""

    timeout_minutes: int = Field(30, ge=1)


class ProgressSection(Section):
    """Progress: a bar, or none."""

    progress_bar: bool = True


class GenerationSections(Section):
    """All that describes a generation, and all that its run.yaml holds."""

    generation: GenerationSection
    model: TransformerSection
    encoders: GenerationEncoders
    inputs: InputsSection
    sampling: SamplingSection
    output: ClipsSection
    batch: BatchSection = BatchSection()
    parallel: MeshSection = MeshSection()
    residency: Residency = Residency()
    supervision: CollectiveSection = CollectiveSection()
    logging: ProgressSection = ProgressSection()


class GenerationRun(GenerationSections, MeshRun):
    """A generation."""

    sections: ClassVar = GenerationSections

    @property
    def mesh(self) -> MeshSection:
        """Section of the mesh."""
        return self.parallel

    @property
    def wan(self) -> WanConfig:
        """The transformer."""
        return self.model.shape

    @property
    def dtype(self) -> str:
        """Dtype of the parameters."""
        return self.model.precision

    @property
    def zero(self) -> ZeroConfig | None:
        """Layer-zero's section, or None."""
        return self.parallel.layerzero

    @property
    def layout(self) -> Layout:
        """Layout of the processes, once the rules have accepted them."""
        return mesh_layout(self)

    @property
    def row_task(self) -> Task:
        """The task whose roles a row gives: the model's, or, where the last frame is given too, that of both frames."""
        task = self.wan.task
        return TASKS[task.with_last_frame] if task.with_last_frame and self.inputs.last_frame else task

    @property
    def row_lists(self) -> Mapping[ListName, Listed]:
        """The lists that the model takes."""
        return lists_of(self.row_task, self.inputs.shown)

    @property
    def sees_images(self) -> bool:
        """True where the image encoder is asked."""
        return sees_images(self.wan.task, frozenset(self.inputs.lists), self.inputs.shown)

    @property
    def task(self) -> str:
        """Task in one word: its name, or what it is called from given videos."""
        from_video = None if self.inputs.videos is None else self.wan.task.with_video
        return from_video or self.row_task.name

    @property
    def guided(self) -> bool:
        """True where the negative prompt takes part in any step."""
        low = self.model.low_noise
        return self.sampling.guided or (low is not None and low.guidance_scale not in (None, 1))

    @property
    def negative_text(self) -> str:
        """The negative prompt, given or of the release; an empty one is a prompt, too."""
        given = self.inputs.negative_prompt
        return self.row_task.negative + NEGATIVE_PROMPT if given is None else given
