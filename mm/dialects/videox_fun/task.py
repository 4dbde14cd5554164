"""The task that a script's mode and its model mean, and the clips that its flags ask for."""

from __future__ import annotations

from typing import Any

from mm.config.model import WanConfig
from mm.config.run.shapes import FrameRule, RatioBuckets, TokenLength
from mm.config.tasks.task import Source, Task
from mm.config.unread import UNREAD, UnreadError, built
from mm.dialects.videox_fun.flags import VideoxFlags
from mm.dialects.videox_fun.reading import Reading
from mm.dialects.videox_fun.scripts import SCRIPTS, Script

_SIDE = 16  # VideoX-Fun rounds sides down to multiples of it
_FRAMES = 4  # of a latent frame
_CROPPED = 0.1  # share of clips that --random_frame_crop makes shorter


def task_of(script: Script, flags: Any, shape: WanConfig, reading: Reading) -> Task:
    """The task; keeps CFG-344 for a mode that the script or the model has not, CFG-345 for flags of a reference image
    that contradict the model.

    Raises:
        UnreadError: where it is not known.
    """
    mode: str | None = flags.train_mode
    meant = script.modes.get(mode or "")
    if meant is None:
        said = "--train_mode is missing" if mode is None else f"--train_mode is {mode}"
        if script.is_control and mode in (None, "control"):
            said += ", and control alone trains no model that there is"
        reading.wrong("CFG-344", f"{said}.", f"{script.path} takes {', '.join(script.modes)}.")
        raise UnreadError
    task = next((task for task in meant if task.trains == shape.task.name), None)
    if task is None:
        model = f"--pretrained_model_name_or_path, which is of {shape.task.title}"
        found = f"--train_mode={mode} trains no model like that of {model}."
        reading.wrong("CFG-344", found, _other_mode(shape.task))
        raise UnreadError
    if script.is_control:
        _references_fit(flags, task, reading)
    return task


def _other_mode(task: Task) -> str:
    found = [
        f"--train_mode={mode} of {script.path}"
        for script in SCRIPTS.values()
        for mode, meant in script.modes.items()
        if task.name in (one.trains for one in meant) and "_lora" not in script.path
    ]
    return f"Give {' or '.join(found)}." if found else "No script of VideoX-Fun trains it here; mm train does."


def _references_fit(flags: Any, task: Task, reading: Reading) -> None:
    takes = bool(task.made_by(Source.REFERENCE_IMAGE))
    full, ref = flags.add_full_ref_image_in_self_attention, flags.control_ref_image
    if takes != full:
        found = f"--add_full_ref_image_in_self_attention is {'given' if full else 'missing'}, and the model has "
        found += f"{'a' if takes else 'no'} ref_conv."
        reading.wrong("CFG-345", found, "Remove it." if full else "Add it: the model was trained with it.")
    if takes != (ref == "random"):
        needed = "random" if takes else "first_frame"
        found = f"--control_ref_image is {ref}, and models of {task.title} were trained with {needed}."
        reading.wrong("CFG-345", found, f"Give --control_ref_image={needed}.")


def clip_of(script: Script, flags: VideoxFlags, task: Task, reading: Reading) -> dict[str, Any]:
    """Values of the section `clip`, each of which may be unread; keeps CFG-341 for flags without effect.

    Raises:
        UnreadError: where nothing is known of its size.
    """
    shorter = task.fewest_latent_frames > 1
    values: dict[str, Any] = {
        "num_frames": flags.video_sample_n_frames,
        "frame_interval": flags.video_sample_stride,
        "min_num_frames": 1 + _FRAMES * shorter,
        "frames": FrameRule(shorter_share=_CROPPED if flags.random_frame_crop is True else 0.0),
    }
    _bucket_flags_have_effect(flags, reading)
    return values | _size_of(script, flags, reading)


def _bucket_flags_have_effect(flags: VideoxFlags, reading: Reading) -> None:
    if flags.training_with_video_token_length and not flags.random_hw_adapt:
        found = "--training_with_video_token_length has no effect without --random_hw_adapt."
        reading.wrong("CFG-341", found, "Give both, or remove it.")
    if flags.enable_bucket:
        return
    for field in ("random_hw_adapt", "random_ratio_crop"):
        if getattr(flags, field):
            reading.wrong("CFG-341", f"--{field} has no effect without --enable_bucket.", "Add it, or remove the flag.")


def _size_of(script: Script, flags: VideoxFlags, reading: Reading) -> dict[str, Any]:
    video, image = flags.video_sample_size, flags.image_sample_size
    if flags.fix_sample_size is not None:
        if len(flags.fix_sample_size) != 2:
            reading.wrong("CFG-341", "--fix_sample_size takes two numbers.", "Give height and width.")
            return {"height": UNREAD, "width": UNREAD}
        height, width = (side // _SIDE * _SIDE for side in flags.fix_sample_size)
        return {"height": height, "width": width}
    if not flags.enable_bucket:
        return {"height": video // _SIDE * _SIDE, "width": video // _SIDE * _SIDE}
    ratio = {"random_ratio": flags.random_ratio_crop}
    share = {"full_share": script.full_share} if flags.random_hw_adapt else {}
    if not (flags.random_hw_adapt and flags.training_with_video_token_length):
        varied = {"vary_side": flags.random_hw_adapt}
        sides = {"rule": "ratio_buckets", "side": video, "image_side": image}
        return {"shape": built(RatioBuckets, {**sides, **varied, **share, **ratio})}
    least, most = sorted((video, image))
    if video > image:
        reading.notes.append(
            f"--video_sample_size {video} and --image_sample_size {image}: sides from {least} to {most}"
        )
    sides = {"min_side": least, "max_side": most, "token_side": flags.token_sample_size}
    half = {"token_side_share": 0.5} if script.is_control else {}
    return {"shape": built(TokenLength, {"rule": "token_length", **sides, **half, **share, **ratio})}
