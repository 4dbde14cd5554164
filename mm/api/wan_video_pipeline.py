"""A pipeline that people who script DiffSynth-Studio know: models from files, one call for a clip.

The call's parameters are that system's; what computes is `mm.api.generation`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mm.api.divided import Degrees, divided, require_alike
from mm.api.encoders import Encoders
from mm.api.experts import AnyModel, Experts
from mm.api.generation import generate_videos
from mm.api.held_transformer import HeldTransformer, Holding
from mm.api.model import config_of
from mm.api.model_config import ModelConfig, device_of, loading_problems
from mm.api.pipeline_parameters import BOUNDARY, ClipParameters, fitted, fitted_video
from mm.api.pipeline_parts import Parts, find_parts
from mm.api.pipeline_values import memory_problems, value_problems
from mm.checkpoint.comm import Comm
from mm.checkpoint.expert_band import recorded_boundary
from mm.config.base import parse
from mm.config.model import Precision
from mm.config.place import process_place
from mm.config.rules.residency import residency_problems
from mm.config.run.encoders import Tiles
from mm.config.run.generation import latent_size
from mm.config.run.listed import Shown, begins_as
from mm.config.run.residency import Residency
from mm.config.tasks.task import Source
from mm.device.backend import Backend, select
from mm.errors import ConfigError, raise_all
from mm.poses import direction_rows
from mm.wan.encoders import DTYPES, TextEncoder, VideoEncoder
from mm.wan.image_encoder import ImageEncoder
from mm.wan.model import WanModel

log = logging.getLogger(__name__)

_TOKENIZER = ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.3B", origin_file_pattern="google/*")
_PRECISIONS: dict[torch.dtype, Precision] = {dtype: name for name, dtype in DTYPES.items()}


class WanVideoPipeline:
    """A transformer of the Wan family, or two experts, with encoders.

    Attributes:
        vae, text_encoder, image_encoder: the encoders; no image encoder where none was given.
        device, torch_dtype: where and in what they compute.
    """

    def __init__(self, parts: Parts, backend: Backend, how: Holding, *, encoders_wait: bool = False) -> None:
        """Load what `find_parts` has found; see `from_pretrained`.

        Args:
            parts: the models. backend: the device. how: transformers are held.
            encoders_wait: on the CPU until they are needed.
        """
        self.device, self.torch_dtype = backend.device, how.dtype
        self._backend, self._how, self._encoders_wait = backend, how, encoders_wait
        room = how.room(len(parts.transformers))
        self._transformers = [HeldTransformer(source, how, room) for source in parts.transformers]
        self._boundary = recorded_boundary(parts.transformers[-1].path)
        place, precision = torch.device("cpu") if encoders_wait else self.device, _PRECISIONS[how.dtype]
        self.text_encoder: TextEncoder = parts.load_text_encoder(precision, place, self.dit.config.text_len)
        self.vae: VideoEncoder = parts.load_vae(precision, place)
        self.image_encoder: ImageEncoder | None = parts.load_image_encoder(precision, place)

    @property
    def dit(self) -> WanModel:
        """The transformer, of two experts that for much noise; on several processes this one's part of it."""
        return self._transformers[0].model

    @property
    def dit2(self) -> WanModel | None:
        """The expert for little noise, as `dit`; None where there is one transformer."""
        return self._transformers[1].model if len(self._transformers) > 1 else None

    @classmethod
    def from_pretrained(
        cls,
        *,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        model_configs: Sequence[ModelConfig] = (),
        tokenizer_config: ModelConfig = _TOKENIZER,
        local_model_path: str | Path = "./models",
        skip_download: bool = False,
        redirect_common_files: bool = True,
        use_usp: bool = False,
        ulysses_degree: int = 1,
        ring_degree: int = 1,
        tensor_degree: int = 1,
    ) -> WanVideoPipeline:
        """Find, check and load models; what each file is, its content tells. One tensor at a time is read.

        Args:
            torch_dtype: of weights and arithmetic; what must be fp32 in the transformer stays so.
            device: "cuda", "npu" or "cpu"; None takes the best there is.
            model_configs: of the transformer, the VAE, the text encoder and, for models that see images, the image
                encoder; of Wan2.2's A14B models both transformers, that for much noise first.
            tokenizer_config: of the tokenizer's folder.
            local_model_path: the folder of models, `owner/name` below it.
            skip_download: use what is there, and fetch nothing.
            redirect_common_files: files that many releases hold alike are taken from one of them.
            use_usp: the processes that torchrun has started make each clip together, as Ulysses does.
            ulysses_degree, ring_degree, tensor_degree: the same in other ways; their product is that of processes.

        Raises:
            ConfigError: CFG-030 for the device, CFG-400 to CFG-404 for the models, CFG-409 for torch_dtype, CFG-446 for
                what is none of these, or waits where or as nothing can, CFG-440 and CFG-441 for degrees; what
                `mm.api.divided.divided` raises.
            CheckpointError, DataError: what opening and loading them raises.
        """
        if torch_dtype not in _PRECISIONS:
            names = ", ".join(str(known) for known in _PRECISIONS)
            raise ConfigError("CFG-409", f"torch_dtype is {torch_dtype}.", f"Use one of {names}.")
        configs = (*model_configs, tokenizer_config)
        raise_all(ConfigError, list(loading_problems(configs, device, torch_dtype)))
        where = process_place()
        degrees = Degrees.asked(use_usp, ulysses_degree, ring_degree, tensor_degree, where.world_size)
        kind, number = (None, 0) if device is None else device_of(device) or (None, 0)
        if degrees is not None and ":" not in str(device):
            number = where.local_rank
        sharing = 1 if degrees is None else degrees.processes
        backend = select(kind, number, sharing)
        folder = Path(local_model_path)
        parts = find_parts(
            model_configs, tokenizer_config, folder, may_download=not skip_download, shared=redirect_common_files
        )
        waits = any(
            config.offload_device is not None and str(config.offload_device) == "cpu" for config in model_configs
        )
        fp8 = any(config.offload_dtype == torch.float8_e4m3fn for config in model_configs)
        processes = None
        if degrees is not None and sharing > 1:
            config = config_of(parts.transformers[0])
            processes = divided(degrees, config, _PRECISIONS[torch_dtype], backend, where)
        return cls(parts, backend, Holding(backend, torch_dtype, fp8, processes), encoders_wait=waits)

    def enable_vram_management(
        self,
        vram_limit: float | None = None,
        vram_buffer: float = 0.5,
        num_persistent_param_in_dit: int | None = None,
    ) -> None:
        """Let blocks of the transformer wait in host memory, from where they are copied one ahead of the computation.

        Encoders wait on the CPU from now on, and are on the device only while they are needed.

        Args:
            vram_limit: GiB of the device that generation may take; None for what is free. What cannot be kept becomes
                the least that is possible, with a warning.
            vram_buffer: GiB of it that are left free. num_persistent_param_in_dit: parameters that stay on the device,
                in place of a limit.

        Raises:
            ConfigError: CFG-446 for limits that make no sense, CFG-374 where the host has no room.
        """
        raise_all(ConfigError, list(memory_problems(vram_limit, vram_buffer, num_persistent_param_in_dit)))
        limit, values = self._limit(vram_limit), dict[str, Any]()
        if num_persistent_param_in_dit is not None:
            values = {"staying_parameters": num_persistent_param_in_dit}
        elif limit is not None:
            values = {"device_limit": f"{limit}MiB", "device_buffer": f"{int(vram_buffer * 1024)}MiB"}
        residency = parse(Residency, values, "enable_vram_management")
        raise_all(ConfigError, list(residency_problems(residency, lambda field: field)))
        self._encoders_wait = True
        for encoder in (self.text_encoder, self.vae, self.image_encoder):
            if encoder is not None:
                encoder.to(torch.device("cpu"))
        for transformer in self._transformers:
            transformer.release()
        room = self._how.room(len(self._transformers))
        try:
            for transformer in self._transformers:
                transformer.hold(residency, room)
        finally:
            for transformer in self._transformers:
                transformer.restore()

    def _limit(self, asked: float | None) -> int | None:
        """MiB that a limit means: those that are free where nothing is said; None on the CPU."""
        if asked is not None:
            return int(asked * 1024)
        sizes = self._backend.total_and_free_bytes()
        return None if sizes is None else sizes[1] // 2**20

    def load_lora(self, module: WanModel, path: str | Path, alpha: float = 1.0) -> None:
        """Add a LoRA of any known format to the transformer's weights, in fp32 and rounded once.

        Args:
            module: `pipe.dit`, or `pipe.dit2`. path: a file, a folder or a run's checkpoints. alpha: a factor on it.

        Raises:
            ConfigError: CFG-408 for another module, CFG-446 for an alpha that is no number.
            DataError: DATA-090 to DATA-093 for a file that is none, or of another model.
            CheckpointError: CKPT-016 for one with values that are not finite. The weights stay as they were.
        """
        found = next((one for one in self._transformers if one.model is module), None)
        if found is None:
            named = "pipe.dit" if self.dit2 is None else "pipe.dit or pipe.dit2"
            raise ConfigError("CFG-408", f"load_lora is given {type(module).__name__}.", f"Give {named}.")
        raise_all(ConfigError, list(value_problems({"alpha": alpha})))
        found.load_lora(path, alpha)

    def __call__(self, prompt: str, negative_prompt: str = "", **parameters: Any) -> list[Image.Image]:
        """Make a clip.

        Args:
            prompt: what it shows. negative_prompt: what guidance leads away from.
            parameters: `mm.api.pipeline_parameters.ClipParameters`, which has them all with their defaults.

        Returns:
            Its frames. Pictures of another size are resized to the clip's; one of other proportions is warned about.

        Raises:
            ConfigError: CFG-063, CFG-321 to CFG-323, CFG-405 to CFG-407 and CFG-446 for parameters, all at once;
                CFG-404 for images and no image encoder; what `generate_videos` raises.
            DataError: what `generate_videos` raises, DATA-087 for a video that is too short.
        """
        task = self.dit.config.task
        prompts, processes = {"prompt": prompt, "negative_prompt": negative_prompt}, self._how.processes
        given = ClipParameters.of(parameters, task, prompts, experts=self.dit2 is not None)
        if processes is not None:
            given = _agreed(processes.comm, prompt, negative_prompt, given)
        if self.image_encoder is None and given.shows_images and task.made_by(Source.IMAGE_ENCODER):
            found = f"model_configs names no image encoder, whose features {task.title} models are given of images."
            raise ConfigError("CFG-404", found, "Add models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.")
        size = given.size(task)
        steps = _steps(given)
        shown = Shown(nothing=task.with_mask and given.input_image is None and given.end_image is None)
        videos = (
            (begins_as(task, shown), "input_video", given.input_video),
            ("videos", "vace_video", given.vace_video),
            ("controls", "control_video", given.control_video),
        )
        lists: dict[str, Any] = {
            name: [fitted_video(frames, word, size)] for name, word, frames in videos if frames is not None
        }
        several = given.vace_reference_image
        references = [several] if isinstance(several, Image.Image) else list(several or ())
        if given.reference_image is not None:
            references = [fitted(given.reference_image, "reference_image", size)]
        images = [
            fitted(image, name, size)
            for name, image in (("input_image", given.input_image), ("end_image", given.end_image))
            if image is not None
        ]
        masks = None if given.vace_video_mask is None else fitted_video(given.vace_video_mask, "vace_video_mask", size)
        [made] = generate_videos(
            self._model(given),
            [prompt],
            self._encoders(given),
            images=[images] if images else None,
            **lists,
            references=[references] if references else None,
            cameras=_cameras(given, size[0]),
            masks=None if masks is None else [masks[..., 0]],
            text_only=shown.nothing,
            vace_scale=given.vace_scale if task.made_by(Source.SETTING) else None,
            columns=None if given.motion_bucket_id is None else {"motion_bucket_id": [given.motion_bucket_id]},
            negative_prompt=negative_prompt,
            size=size,
            steps=given.num_inference_steps,
            guidance_scale=given.cfg_scale,
            shift=given.sigma_shift,
            solver="euler",
            strength=None if given.input_video is None else given.denoising_strength,
            batched_guidance=given.cfg_merge,
            options=given.options,
            noise=[self._noise(given.seed, size, len(references) if several is not None else 0)],
            on_step=lambda clean: next(steps, None),
        )
        next(steps, None)  # lets a bar close itself
        return [Image.fromarray(frame.numpy()) for frame in made]

    def _model(self, given: ClipParameters) -> AnyModel | Experts:
        first, *second = [transformer.velocity for transformer in self._transformers]
        if not second:
            return first
        boundary = given.switch_DiT_boundary or self._boundary
        if boundary is None:
            boundary = BOUNDARY
            log.warning(
                "Nothing says the noise level between the experts: switch_DiT_boundary is taken as %g, which Wan2.2's "
                "T2V-A14B was trained with; I2V-A14B was with 0.9.",
                boundary,
            )
        return Experts(first, second[0], boundary)

    def _encoders(self, given: ClipParameters) -> Encoders:
        (height, width), (down, right) = given.tile_size, given.tile_stride
        tiles = Tiles(size=(height, width), stride=(down, right)) if given.tiled else None
        vae = VideoEncoder(self.vae.vae, tiles, "masks")
        return Encoders(vae, self.text_encoder, image_encoder=self.image_encoder, wait=self._encoders_wait)

    def _noise(self, seed: int | None, size: tuple[int, int, int], in_front: int) -> Tensor:
        """Noise that DiffSynth-Studio draws from a seed, before it rounds it: latents in front are its last ones."""
        task = self.dit.config.task
        frames, height, width = latent_size(size, task.latent_pixels)
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        shape = (self.dit.config.noise_channels, frames + in_front, height, width)
        return torch.randn(shape, generator=generator).roll(in_front, dims=1)


def _agreed(comm: Comm, prompt: str, negative_prompt: str, given: ClipParameters) -> ClipParameters:
    """Parameters that every process has, with one seed; the bar is shown by the first alone.

    Raises:
        ConfigError: CFG-442 where processes were given different ones.
    """
    values = {field.name: getattr(given, field.name) for field in fields(given) if field.name != "progress_bar_cmd"}
    require_alike(comm, "the pipeline", {"prompt": prompt, "negative_prompt": negative_prompt, **values})
    seed = comm.broadcast_object(torch.Generator().seed() if given.seed is None else given.seed)
    quiet = given.progress_bar_cmd if comm.rank == 0 else lambda steps: steps
    return replace(given, seed=seed, progress_bar_cmd=quiet)


def _steps(given: ClipParameters) -> Iterator[int]:
    """The steps under a progress bar, begun: a bar is shown from the start."""
    wrap = given.progress_bar_cmd or tqdm
    steps = iter(wrap(range(given.num_inference_steps)))
    next(steps, None)
    return steps


def _cameras(given: ClipParameters, num_frames: int) -> list[Tensor] | None:
    if given.camera_control_direction is None:
        return None
    origin = given.camera_control_origin
    return [direction_rows(given.camera_control_direction, num_frames, given.camera_control_speed, origin)]
