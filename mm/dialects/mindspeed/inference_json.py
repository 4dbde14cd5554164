"""inference_model.json: what to generate, with MindSpeed-MM's names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mm.config.base import Section
from mm.config.model import Precision, WanConfig
from mm.config.run.encoders import TileBlend
from mm.config.run.generation import TeaCacheModel
from mm.dialects.mindspeed.encoder_json import AutoencoderConfig, TextEncoderConfig, TokenizerConfig

Solver = Literal["unipc", "euler", "dpm++"]
SCHEDULERS: dict[Solver, str] = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
"""Samplers by their short names, with their diffusers classes."""


class VaeSection(AutoencoderConfig):
    """The `ae` section: the VAE's folder, the precision and, to save memory, the tiles it works in.

    Attributes:
        tile_blend: each tile is faded into its neighbours (as diffusers does), or all are weighted by masks.
    """

    tile_blend: TileBlend | None = None

    @model_validator(mode="after")
    def _tiles_cover_the_frame(self) -> VaeSection:
        if self.tiling_param is not None:
            if not self.enable_tiling:
                raise ValueError("tiling_param has no effect while enable_tiling is false")
            for size, stride in zip(self.tiling_param.tile_size, self.tiling_param.tile_stride, strict=True):
                if stride > size:
                    raise ValueError(f"tiles of {size} every {stride} latent pixels leave gaps")
        return self


class InferencePredictor(WanConfig):
    """The `predictor` section: the transformer's shape, precision and, unless `--load` says it, its weights."""

    model_id: Literal["wandit"] = "wandit"
    from_pretrained: str | None = Field(None, min_length=1)
    dtype: Precision

    def wan(self) -> WanConfig:
        """The transformer's shape alone."""
        return WanConfig.model_validate({name: getattr(self, name) for name in WanConfig.model_fields})


class ImageEncoderSection(Section):
    """The `image_encoder` section: the folder of CLIP's visual half in the transformers layout, and its precision."""

    model_id: Literal["CLIPVisionModel"] = "CLIPVisionModel"
    hub_backend: Literal["hf"] = "hf"
    from_pretrained: str = Field(min_length=1)
    dtype: Precision


class LoraSection(Section):
    """One adapter: its file (`docs/lora.md`) and the factor on its update."""

    path: str = Field(min_length=1)
    strength: float = 1.0


class LowNoiseSection(Section):
    """The `low_noise` section: the second of two experts, for little noise; `predictor` and `--load` say the other.

    Attributes:
        from_pretrained: its weights. lora: adapters that are added to them.
        boundary: noise level from which on the other expert is asked; what model_index.json beside the weights' folder
            has, where it is not said.
        guidance_scale: of this expert; the other one's where it is not said.
    """

    from_pretrained: str = Field(min_length=1)
    lora: tuple[LoraSection, ...] = ()
    boundary: float | None = Field(None, gt=0, lt=1)
    guidance_scale: float | None = Field(None, ge=0)


class InferenceDiffusion(Section):
    """The `diffusion` section: how the velocity is integrated.

    Attributes:
        model_id: the sampler, under the name of its diffusers class.
        num_inference_steps: evaluations of the model for each prompt; twice as many with guidance.
        flow_shift: of the noise levels; 3 for 480p and 5 for 720p are usual.
        guidance_scale: of classifier-free guidance; exactly 1 leaves the negative prompt out.
        batched_guidance: both prompts in one pass of twice the batch instead of two passes.
        solver_order: of UniPC and DPM++; 2 where it is not said. solver_type: of UniPC alone; bh2 where it is not said.
        attention: of the video's tokens to each other: exact, or by SageAttention in 8 bits.
        tea_cache_l1_thresh: change up to which what the blocks added at an earlier step is added again.
        tea_cache_model_id: the model whose prediction of that change is used.
        sliding_window_size, sliding_window_stride: latent frames that the transformer sees at a time, and between the
            beginnings of two such windows.
    """

    model_id: Literal["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"] = (
        "UniPCMultistepScheduler"
    )
    num_inference_steps: int = Field(50, ge=1)
    flow_shift: float = Field(gt=0)
    guidance_scale: float = Field(5.0, ge=0)
    batched_guidance: bool = False
    solver_order: Literal[1, 2, 3] | None = None
    solver_type: Literal["bh1", "bh2"] | None = None
    attention: Literal["exact", "sage"] = "exact"
    tea_cache_l1_thresh: float | None = Field(None, gt=0)
    tea_cache_model_id: TeaCacheModel | None = None
    sliding_window_size: int | None = Field(None, ge=1)
    sliding_window_stride: int | None = Field(None, ge=1)

    @property
    def solver(self) -> Solver:
        """The sampler's short name."""
        return next(solver for solver, name in SCHEDULERS.items() if name == self.model_id)


class PipelineSection(Section):
    """The `pipeline_config` section.

    Attributes:
        input_size: frames, height and width of the clips in pixels.
        dual_image: a model that sees the first frame alone is given the last one too.
        strength: video to video: the share of the steps that are taken, above 0 (the given clip) to 1 (a new one).
        strength_steps: the steps that a strength leaves: the last ones, or all, closer to each other.
        start_frame: the first frame that is taken of the given videos.
        text_only: a model that sees frames is shown none.
        vace_scale: a factor on what side blocks add; None is 1.
    """

    input_size: tuple[int, int, int]
    dual_image: bool = False
    strength: float | None = None
    strength_steps: Literal["last", "all"] | None = None
    start_frame: int | None = Field(None, ge=0)
    text_only: bool = False
    vace_scale: float | None = None


class InferenceModel(Section):
    """inference_model.json.

    Attributes:
        prompt: a text file, one prompt a line.
        image: a text file, one image a line for each prompt, or two with a comma between (first, last).
        video: a text file, one video a line for each prompt; the clips are made from these.
        input_video: the same where the model sees `video`; the clips begin as these.
        control: a text file, one video a line for each prompt, which the clips follow frame by frame.
        reference: a text file, images of what is to be seen, a line for each prompt, with commas between.
        camera: a text file, one pose file a line for each prompt, or a direction and a speed.
        mask: a text file, one video or image a line for each prompt, white where `video` is to be made anew.
        columns: text files, one number a line for each prompt, by the names of the columns that the task declares.
        negative_prompt: what guidance leads away from; None is the Wan2.1 release's for the task.
        save_path: folder for the clips. fps: frames a second of the clips.
        lora: adapters that are added to the transformer's weights, in this order.
        low_noise: the expert for little noise, where there are two.
        seed: with the prompt's index it decides the initial noise.
    """

    pipeline_class: Literal["WanPipeline"] = "WanPipeline"
    prompt: str = Field(min_length=1)
    image: str | None = Field(None, min_length=1)
    video: str | None = Field(None, min_length=1)
    control: str | None = Field(None, min_length=1)
    reference: str | None = Field(None, min_length=1)
    camera: str | None = Field(None, min_length=1)
    mask: str | None = Field(None, min_length=1)
    input_video: str | None = Field(None, min_length=1)
    columns: dict[str, str] = Field(default_factory=dict)
    negative_prompt: str | None = None
    save_path: str = Field(min_length=1)
    fps: int = Field(16, ge=1, le=240)
    seed: int = Field(42, ge=0)
    pipeline_config: PipelineSection
    ae: VaeSection
    tokenizer: TokenizerConfig
    text_encoder: TextEncoderConfig
    image_encoder: ImageEncoderSection | None = None
    predictor: InferencePredictor
    lora: tuple[LoraSection, ...] = ()
    low_noise: LowNoiseSection | None = None
    diffusion: InferenceDiffusion
