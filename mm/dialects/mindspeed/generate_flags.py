"""Flags of the generation command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from mm.config.run.generation import TeaCacheModel
from mm.dialects.mindspeed.mesh_flags import MeshFlags


class GenerateFlags(MeshFlags):
    """Generate one clip for each prompt of a file. A flag that is given wins over the same value in the json file."""

    may_be_empty = frozenset({"negative_prompt"})
    groups: ClassVar[Mapping[str, str]] = {
        "load": "files",
        "prompt": "what is asked for",
        "lora": "LoRA",
        "negative_prompt": "what is asked for",
        "save_path": "clips",
        "seed": "sampling",
        "input_size": "clips",
        "sample_solver": "sampling",
        "micro_batch_size": "batches",
        "device_memory_limit": "memory",
        "no_progress_bar": "logging",
    }

    mm_model: str = Field(description="inference_model.json")
    load: str | None = Field(None, description="transformer weights; default: predictor.from_pretrained of the json")
    low_noise: str | None = Field(
        None, description="weights of the expert for little noise, of models that are two; default: from the json"
    )
    prompt: str | None = Field(None, description="text file, one prompt a line; default: from the json")
    image: str | None = Field(
        None, description="text file, one image a line, or first and last with a comma between; default: from the json"
    )
    video: str | None = Field(None, description="text file, one video a line; default: from the json")
    control: str | None = Field(
        None, description="text file, one video a line that clips follow frame by frame; default: from the json"
    )
    reference: str | None = Field(
        None, description="text file, images of what is to be seen, a line a prompt; default: from the json"
    )
    camera: str | None = Field(
        None, description="text file, one pose file a line, or a direction and a speed; default: from the json"
    )
    mask: str | None = Field(
        None, description="text file, one mask a line, white where the video is made anew; default: from the json"
    )
    input_video: str | None = Field(
        None, description="text file, one video a line that clips of models which see --video begin as, with --strength"
    )
    columns: list[str] = Field(
        [], description="NAME=FILE: numbers that the task takes, one a line for each prompt; default: from the json"
    )
    strength: float | None = Field(
        None, description="share of the steps taken from a given video, above 0 to 1; default: from the json"
    )
    text_only: bool = Field(False, description="a model that sees frames is shown none")
    vace_scale: float | None = Field(
        None, description="factor on what the side blocks add; default: from the json, else 1"
    )
    lora: list[str] = Field([], description="adapter files to add to the weights; default: from the json")
    lora_strength: list[float] = Field([], description="factor on each adapter of --lora; default: 1")
    negative_prompt: str | None = Field(
        None, description="default: from the json, else that of the Wan2.1 release for the task"
    )
    save_path: str | None = Field(None, description="folder for the clips; default: from the json")
    overwrite: bool = Field(False, description="replace clips that exist; otherwise they are an error")
    seed: int | None = Field(None, ge=0, description="seed of the initial noise; default: from the json")
    input_size: list[int] = Field([], description="frames, height and width in pixels; default: from the json")
    fps: int | None = Field(None, description="frames a second of the clips; default: from the json")
    sample_solver: Literal["unipc", "euler", "dpm++"] | None = Field(
        None, description="sampler; default: from the json"
    )
    num_inference_steps: int | None = Field(None, ge=1, description="sampler steps; default: from the json")
    flow_shift: float | None = Field(None, gt=0, description="shift of the noise levels; default: from the json")
    guidance_scale: float | None = Field(
        None, ge=0, description="1 leaves the negative prompt out; default: from the json"
    )
    batched_guidance: bool = Field(False, description="both prompts of guidance in one pass of twice the batch")
    sample_attention: Literal["exact", "sage"] | None = Field(
        None, description="attention of the video's tokens, exact or by SageAttention; default: from the json"
    )
    tea_cache_l1_thresh: float | None = Field(
        None, gt=0, description="TeaCache: predicted change up to which the blocks are left out; default: from the json"
    )
    tea_cache_model_id: TeaCacheModel | None = Field(
        None, description="TeaCache: the model whose prediction is used; default: from the json"
    )
    sliding_window_size: int | None = Field(
        None, ge=1, description="latent frames that the transformer sees at a time; default: from the json, else all"
    )
    sliding_window_stride: int | None = Field(
        None, ge=1, description="latent frames between the beginnings of two windows; default: from the json"
    )
    micro_batch_size: int = Field(1, ge=1, description="prompts in one forward")
    device_memory_limit: str | None = Field(
        None, description="device memory that generation may take, 24GiB; blocks that do not fit wait in host memory"
    )
    device_memory_buffer: str | None = Field(
        None, description="what is left free of --device-memory-limit; default: 512MiB"
    )
    staying_parameters: int | None = Field(
        None, ge=0, description="transformer parameters that stay on the device, in place of --device-memory-limit"
    )
    host_memory_limit: str | None = Field(
        None, description="host memory for blocks that wait, 64GiB; what does not fit is read from its files each time"
    )
    fp8_weights: Literal["scaled", "unscaled"] | None = Field(
        None, description="weights of the blocks' linears in e4m3, scaled for each output channel or cast alone"
    )
    no_progress_bar: bool = Field(False, description="log lines only")

    @field_validator("columns")
    @classmethod
    def _names_and_files(cls, value: list[str]) -> list[str]:
        if not all(re.fullmatch(r"\w+=.+", word) for word in value):
            raise ValueError("it takes words such as NAME=FILE")
        return value

    @field_validator("input_size")
    @classmethod
    def _three_numbers(cls, value: list[int]) -> list[int]:
        if len(value) not in (0, 3):
            raise ValueError("it takes three numbers: frames, height and width")
        return value
