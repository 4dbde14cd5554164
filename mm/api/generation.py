"""Videos from strings, images and videos, as frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mm.api.arguments import ImageInput, VideoInput, image_of, video_of
from mm.api.encoders import Encoders, name_of
from mm.api.generation_rules import Asked, generation_problems
from mm.api.model import load_model
from mm.config.run.generation import NEGATIVE_PROMPT
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import Source, Task
from mm.diffusion.samplers import Solver
from mm.errors import ConfigError, raise_all
from mm.generate.fit import require_image_encoder_fits, require_text_fits, require_vae_fits
from mm.generate.sampling import ClipConditions, ClipPlan, SamplerSettings, decode, encode_prompts, sample
from mm.generate.sources import EarlyFeatures, Given
from mm.wan.model import WanModel


def generate_videos(
    model: WanModel | str | Path,
    prompts: str | Sequence[str],
    encoders: Encoders | str | Path | None = None,
    *,
    images: Sequence[ImageInput | Sequence[ImageInput]] | None = None,
    videos: Sequence[VideoInput] | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
    negative_prompt: str | None = None,
    size: tuple[int, int, int] = (81, 480, 832),
    steps: int = 50,
    guidance_scale: float = 5.0,
    shift: float = 3.0,
    solver: Solver = "unipc",
    strength: float | None = None,
    batched_guidance: bool = False,
    batch_size: int = 1,
    seed: int = 42,
) -> list[Tensor]:
    """Generate a video for each prompt as `mm generate` does, and write nothing.

    Args:
        model: from `load_model`, or a model's folder in the diffusers layout, whose transformer is loaded in bf16.
        prompts: what the videos show.
        encoders: the encoders, or the folder that has them; None takes those beside the transformer of `model`.
        images: for models with given frames, of each prompt: one, or (first, last). Files, Pillow's, uint8 [H, W, 3].
        videos: what the videos are made from, of each prompt: files or uint8 [F, H, W, 3]; needs `strength`.
        columns: the task's numbers by name, one for each prompt.
        negative_prompt: what guidance leads away from; None is the Wan2.1 release's for the task.
        size: frames (4k + 1), height and width (multiples of 16).
        steps, shift, solver: of the sampler; shift 3 for 480p and 5 for 720p are usual.
        guidance_scale: of classifier-free guidance; exactly 1 leaves the negative prompt out.
        strength: with `videos`, the share of the steps that are taken, above 0 to 1.
        batched_guidance: both prompts in one pass of twice the batch.
        batch_size: prompts that go through the transformer together.
        seed: with a prompt's number it decides the noise.

    Returns:
        For each prompt its frames, uint8 [F, H, W, 3], on the CPU.

    Raises:
        ConfigError: CFG-060, CFG-061, CFG-063, CFG-120, CFG-121, CFG-123 and CFG-200 for arguments, all at once;
            CFG-064 and CFG-066 for encoders of another model.
        DataError: DATA-001 to DATA-007, DATA-086, DATA-087 and DATA-110 for images and videos, DATA-040 to DATA-043
            for encoders, DATA-055 and DATA-056 for the VAE's and the transformer's output.
    """
    beside = model if isinstance(model, (str, Path)) else None
    loaded = load_model(model) if isinstance(model, (str, Path)) else model
    asked = Asked(
        tuple([prompts] if isinstance(prompts, str) else prompts),
        None if images is None else tuple(tuple(one) if isinstance(one, (list, tuple)) else (one,) for one in images),
        None if videos is None else tuple(videos),
        columns or {},
        strength,
        batch_size,
    )
    task = _row_task(loaded.config.task, asked)
    settings = SamplerSettings(solver, steps, shift, guidance_scale, batched_guidance, strength=strength or 1.0)
    plan = ClipPlan(loaded.config, next(loaded.parameters()).device, task.frames, size, seed, settings)
    raise_all(ConfigError, list(generation_problems(asked, plan, task)))
    negative = task.negative + NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    return _generate(loaded, asked, plan, _encoders(encoders, beside), None if guidance_scale == 1 else negative)


def _encoders(given: Encoders | str | Path | None, beside: str | Path | None) -> Encoders:
    place = beside if given is None else given
    if place is None:
        raise ConfigError("CFG-200", "A model that is loaded has no encoders beside it.", "Give encoders=.")
    return place if isinstance(place, Encoders) else Encoders.of(place)


def _row_task(task: Task, asked: Asked) -> Task:
    """The task whose frames are given: the model's, or, where there is a last one too, that of both."""
    both = task.with_last_frame is not None and asked.images is not None and any(len(of) > 1 for of in asked.images)
    return TASKS[task.with_last_frame] if both and task.with_last_frame is not None else task


def _generate(model: WanModel, asked: Asked, plan: ClipPlan, encoders: Encoders, negative: str | None) -> list[Tensor]:
    """Each encoder is on the device only while it is needed; the VAE stays."""
    given = [_given(asked, index, plan) for index in range(len(asked.prompts))]
    texts, without = _encode_texts(asked.prompts, negative, plan, encoders)
    early = _early_features(given, plan, encoders)
    vae = encoders.load_vae(plan.device)
    require_vae_fits(name_of(encoders.vae, "VAE"), vae, plan.wan)
    found: list[Tensor] = []
    for start in range(0, len(texts), asked.batch_size):
        conditions = [
            ClipConditions(index, texts[index], early[index], given[index], _video(asked, index, plan))
            for index in range(start, min(start + asked.batch_size, len(texts)))
        ]
        latents = sample(model, vae, plan, conditions, without)
        found += decode(vae, latents, plan.size, name_of(encoders.vae, "VAE"))
    return found


def _given(asked: Asked, index: int, plan: ClipPlan) -> Given:
    """Images and numbers of a prompt."""
    _, height, width = plan.size
    of_prompt = asked.images[index] if asked.images is not None else ()
    frames = tuple(image_of(image, f"An image of prompt {index}", height, width) for image in of_prompt)
    return Given(frames, {name: float(numbers[index]) for name, numbers in asked.columns.items()})


def _video(asked: Asked, index: int, plan: ClipPlan) -> Tensor | None:
    return None if asked.videos is None else video_of(asked.videos[index], f"The video of prompt {index}", plan.size)


def _encode_texts(
    prompts: Sequence[str], negative: str | None, plan: ClipPlan, encoders: Encoders
) -> tuple[list[Tensor], Tensor | None]:
    encoder = encoders.load_text_encoder(plan.device, plan.wan.text_len)
    if encoder.max_length > plan.wan.text_len:
        found = f"The text encoder gives up to {encoder.max_length} tokens, more than the model's {plan.wan.text_len}."
        raise ConfigError("CFG-064", found, "Load it with that max_length, or the model with another text_len.")
    texts, without = encode_prompts(encoder, prompts, negative)
    for features in texts[:1]:
        require_text_fits(name_of(encoders.text_encoder, "text encoder"), features, plan.wan)
    return texts, without


def _early_features(given: Sequence[Given], plan: ClipPlan, encoders: Encoders) -> list[dict[str, Tensor]]:
    encoder = None
    if plan.wan.task.made_by(Source.IMAGE_ENCODER):
        encoder = encoders.load_image_encoder(plan.device)
        require_image_encoder_fits(name_of(encoders.image_encoder, "image encoder"), encoder, plan.wan)
    early = EarlyFeatures(plan.wan.task, encoder)
    return [early.of(of_prompt) for of_prompt in given]
