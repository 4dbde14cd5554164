"""Videos from strings, images and videos, as frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.api.arguments import (
    CameraInput,
    ImageInput,
    MaskInput,
    VideoInput,
    camera_of,
    image_of,
    mask_of,
    picture_of,
    video_of,
)
from mm.api.encoders import Encoders, name_of
from mm.api.experts import AnyModel, Experts, device_of_model, has_two_experts, load_experts
from mm.api.generation_rules import Asked, generation_problems
from mm.api.model import load_model
from mm.config.run.generation import NEGATIVE_PROMPT
from mm.config.run.listed import LISTS, begins_as, sees_images
from mm.config.run.residency import Residency
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import ListName, Task
from mm.diffusion.samplers import Solver
from mm.errors import ConfigError, raise_all
from mm.generate.fit import require_image_encoder_fits, require_text_fits, require_vae_fits
from mm.generate.pipeline import OnStep, Velocity
from mm.generate.sampling import (
    ClipConditions,
    ClipPlan,
    SamplerSettings,
    SamplingOptions,
    decode,
    encode_prompts,
    sample,
)
from mm.generate.sources import EarlyFeatures, Given, kind_of_clip


def generate_videos(
    model: AnyModel | Experts | str | Path,
    prompts: str | Sequence[str],
    encoders: Encoders | str | Path | None = None,
    *,
    images: Sequence[ImageInput | Sequence[ImageInput] | None] | None = None,
    videos: Sequence[VideoInput | None] | None = None,
    controls: Sequence[VideoInput] | None = None,
    references: Sequence[ImageInput | Sequence[ImageInput] | None] | None = None,
    cameras: Sequence[CameraInput] | None = None,
    masks: Sequence[MaskInput | None] | None = None,
    input_videos: Sequence[VideoInput] | None = None,
    text_only: bool = False,
    vace_scale: float | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
    negative_prompt: str | None = None,
    size: tuple[int, int, int] = (81, 480, 832),
    steps: int = 50,
    guidance_scale: float | tuple[float, float] = 5.0,
    shift: float = 3.0,
    solver: Solver = "unipc",
    strength: float | None = None,
    batched_guidance: bool = False,
    options: SamplingOptions | None = None,
    batch_size: int = 1,
    seed: int = 42,
    noise: Sequence[Tensor] | None = None,
    on_step: OnStep = lambda clean: None,
    residency: Residency | None = None,
) -> list[Tensor]:
    """Generate a video for each prompt as `mm generate` does, and write nothing.

    Args:
        model: from `load_model` or `load_experts`, a diffusers folder, of which bf16 is made, or one on processes.
        prompts: what the videos show.
        encoders: the encoders, or the folder that has them; None takes those beside the transformer of `model`.
        images: for models with given frames, of each prompt: one, or (first, last). Files, Pillow's, uint8 [H, W, 3].
        videos: what the videos begin as, of each prompt: files or uint8 [F, H, W, 3]; needs `strength`. With `masks`,
            and for models with side blocks, what is edited; then `input_videos` is what they begin as.
        controls: what the videos follow frame by frame. references: what is to be seen in them; several where models
            have side blocks. cameras: pose files, directions such as "Left 0.02", or rows [poses, 19].
        masks: white where `videos` are made anew: files, uint8 [F, H, W] or [H, W]. None in a list stands for nothing.
        text_only: a model that sees frames is shown none. vace_scale: a factor on what side blocks add.
        columns: the task's numbers by name, one for each prompt. size: frames (4k + 1), height and width (16 n).
        negative_prompt: what guidance leads away from; None is the Wan2.1 release's for the task.
        steps, shift, solver: of the sampler; shift 3 for 480p and 5 for 720p are usual. residency: as for `load_model`.
        guidance_scale: 1 leaves the negative prompt out; of two experts one for both, or (high, low).
        batched_guidance: both prompts in one pass of twice the batch. options: of sampling.
        strength: of what videos begin as, the share of the steps that are taken, above 0 to 1.
        batch_size: prompts that go through the transformer together. seed: with a prompt's number, of the noise.
        noise: other noise for each prompt, [C, latent frames with those in front, H, W]. on_step: `OnStep`.

    Returns:
        For each prompt its frames, uint8 [F, H, W, 3], on the CPU.

    Raises:
        ConfigError: CFG-060, CFG-061, CFG-063, CFG-120, CFG-121, CFG-123, CFG-200, CFG-280, CFG-306, CFG-321 to CFG-323
            for arguments, all at once; CFG-250 to CFG-258, CFG-281: conditions; CFG-064, CFG-066: encoders; CFG-371 to
            CFG-374: residency.
        DataError: DATA-001 to DATA-007, DATA-086, DATA-087 and DATA-110 for images and videos, DATA-040 to DATA-043
            for encoders, DATA-055 and DATA-056 for the VAE's and the transformer's output.
    """
    loaded = _loaded(model, residency, size, batch_size * (1 + batched_guidance))
    asked = Asked(
        tuple([prompts] if isinstance(prompts, str) else prompts),
        _lists(images, videos, controls, references, cameras, masks, input_videos),
        columns or {},
        strength,
        batch_size,
        text_only,
        {} if vace_scale is None else {"vace_scale": vace_scale},
        None if noise is None else tuple(noise),
    )
    task = _row_task(loaded.config.task, asked)
    settings = _settings((solver, steps, shift), guidance_scale, loaded, batched_guidance, strength, options)
    plan = ClipPlan(loaded.config, device_of_model(loaded), task.frames, size, seed, settings)
    raise_all(ConfigError, list(generation_problems(asked, plan, task)))
    negative = task.negative + NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    around = _encoders(encoders, model), negative if settings.guides else None
    return _generate(loaded.velocity if isinstance(loaded, Experts) else loaded, asked, plan, *around, on_step)


def _settings(
    integration: tuple[Solver, int, float],
    guidance_scale: float | tuple[float, float],
    model: AnyModel | Experts,
    batched: bool,
    strength: float | None,
    options: SamplingOptions | None,
) -> SamplerSettings:
    """Settings of the arguments of `generate_videos`; `integration` are its solver, steps and shift.

    Raises:
        ConfigError: CFG-200 for two scales and one transformer.
    """
    boundary = model.boundary if isinstance(model, Experts) else None
    if isinstance(guidance_scale, tuple) and boundary is None:
        found = f"guidance_scale is {guidance_scale}, and the model is one transformer."
        raise ConfigError("CFG-200", found, "Give one number.")
    scale, low = guidance_scale if isinstance(guidance_scale, tuple) else (guidance_scale, None)
    return SamplerSettings(
        *(*integration, scale, batched),
        strength=strength or 1.0,
        options=options or SamplingOptions(),
        boundary=boundary,
        low_guidance_scale=low,
    )


def _loaded(
    model: AnyModel | Experts | str | Path, residency: Residency | None, clip: tuple[int, int, int], batch_size: int
) -> AnyModel | Experts:
    if isinstance(model, (str, Path)):
        load = load_experts if has_two_experts(Path(model)) else load_model
        return load(model, residency=residency, clip=clip, batch_size=batch_size)
    if residency is not None:
        found = "residency has no effect on a model that is loaded."
        raise ConfigError("CFG-372", found, "Give it to load_model, or leave it out.")
    return model


def _encoders(given: Encoders | str | Path | None, model: AnyModel | Experts | str | Path) -> Encoders:
    beside = model if isinstance(model, (str, Path)) else None
    place = beside if given is None else given
    if place is None:
        raise ConfigError("CFG-200", "A model that is loaded has no encoders beside it.", "Give encoders=.")
    return place if isinstance(place, Encoders) else Encoders.of(place)


def _lists(*given: Sequence[Any] | None) -> dict[ListName, tuple[tuple[Any, ...], ...]]:
    """Lists that are given, in the order of `LISTS`, with the values of each prompt."""
    pairs = zip(LISTS, given, strict=True)
    return {name: tuple(map(_several, values)) for name, values in pairs if values is not None}


def _several(given: Any) -> tuple[Any, ...]:
    """Values of a list that one prompt is given."""
    return () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _row_task(task: Task, asked: Asked) -> Task:
    """The task whose frames are given: the model's, or, where there is a last one too, that of both."""
    both = task.with_last_frame is not None and any(len(of) > 1 for of in asked.lists.get("images", ()))
    return TASKS[task.with_last_frame] if both and task.with_last_frame is not None else task


def _generate(
    model: Velocity,
    asked: Asked,
    plan: ClipPlan,
    encoders: Encoders,
    negative: str | None,
    on_step: OnStep,
) -> list[Tensor]:
    """Each encoder is on the device only while it is needed; the VAE stays."""
    given = [_given(asked, index, plan) for index in range(len(asked.prompts))]
    texts, without = _encode_texts(asked.prompts, negative, plan, encoders)
    early = _early_features(given, asked, plan, encoders)
    vae = encoders.load_vae(plan.device)
    require_vae_fits(name_of(encoders.vae, "VAE"), vae, plan.wan)
    found: list[Tensor] = []
    alike = groupby(range(len(texts)), lambda index: kind_of_clip(plan.wan.task, given[index]))
    for indices in (list(run) for _, run in alike):
        for start in range(0, len(indices), asked.batch_size):
            batch = indices[start : start + asked.batch_size]
            conditions = [
                ClipConditions(index, texts[index], early[index], given[index], asked.noise_of(index))
                for index in batch
            ]
            latents = sample(model, vae, plan, conditions, without, on_step=on_step)
            found += decode(vae, latents, plan.size, name_of(encoders.vae, "VAE"))
    encoders.leave(vae)
    return found


def _given(asked: Asked, index: int, plan: ClipPlan) -> Given:
    """Inputs of a prompt's clip, as values."""
    frames, height, width = plan.size
    of_prompt = {name: given[index] for name, given in asked.lists.items()}
    several = any(media.kind == "images" for media in plan.wan.task.media)

    def pixels(image: ImageInput) -> Tensor:
        return image_of(image, f"An image of prompt {index}", height, width)

    def video(given: Sequence[VideoInput]) -> Tensor | None:
        what = f"A video of prompt {index}"
        return next((video_of(one, what, plan.size) for one in given), None)

    begins = begins_as(plan.wan.task, asked.shown)
    edited = () if begins == "videos" else of_prompt.get("videos", ())
    about = f"The mask of prompt {index}", next(iter(edited), None), plan.size
    return Given(
        images=tuple(map(pixels, of_prompt.get("images", ()))),
        columns={name: float(numbers[index]) for name, numbers in asked.columns.items()},
        begins_as=video(of_prompt.get(begins, ())),
        video=video(edited),
        mask=next((mask_of(one, *about) for one in of_prompt.get("masks", ())), None),
        control=video(of_prompt.get("controls", ())),
        references=tuple(
            picture_of(image, f"A reference of prompt {index}") if several else pixels(image)
            for image in of_prompt.get("references", ())
        ),
        camera=next((camera_of(one, frames) for one in of_prompt.get("cameras", ())), None),
        settings=asked.settings,
        text_only=asked.text_only,
    )


def _encode_texts(
    prompts: Sequence[str], negative: str | None, plan: ClipPlan, encoders: Encoders
) -> tuple[list[Tensor], Tensor | None]:
    encoder = encoders.load_text_encoder(plan.device, plan.wan.text_len)
    if encoder.max_length > plan.wan.text_len:
        found = f"The text encoder gives up to {encoder.max_length} tokens, more than the model's {plan.wan.text_len}."
        raise ConfigError("CFG-064", found, "Load it with that max_length, or the model with another text_len.")
    texts, without = encode_prompts(encoder, prompts, negative)
    encoders.leave(encoder)
    for features in texts[:1]:
        require_text_fits(name_of(encoders.text_encoder, "text encoder"), features, plan.wan)
    return texts, without


def _early_features(
    given: Sequence[Given], asked: Asked, plan: ClipPlan, encoders: Encoders
) -> list[dict[str, Tensor]]:
    encoder = None
    if sees_images(plan.wan.task, frozenset(asked.lists), asked.shown):
        encoder = encoders.load_image_encoder(plan.device)
        require_image_encoder_fits(name_of(encoders.image_encoder, "image encoder"), encoder, plan.wan)
    early = EarlyFeatures(plan.wan, encoder)
    found = [early.of(of_prompt) for of_prompt in given]
    if encoder is not None:
        encoders.leave(encoder)
    return found
