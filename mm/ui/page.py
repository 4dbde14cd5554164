"""The page, in Gradio: choose a model, say what a clip shows, watch it being made, compare two, copy the command."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr
from PIL import Image
from torch import Tensor

from mm.config.run.listed import LISTS, Shown, begins_as, every_list_of
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import ListName, Task
from mm.errors import MMError
from mm.ui.making import Asked, Made, Maker
from mm.ui.models import Model

TITLE = "Wan clips"
_LABELS: dict[ListName, str] = {
    "images": "Images: the first frame, perhaps the last",
    "videos": "Video that the clip is made from",
    "controls": "Video that the clip follows",
    "references": "Images of what is to be seen",
    "cameras": "Camera: a direction and a speed (Left 0.02), or a pose file",
    "masks": "Mask: white where the video is made anew",
    "input_videos": "Video that the clip begins as, beside the one that is edited",
}
_SEVERAL = ("images", "references")
_WRITTEN = ("cameras",)
"""Lists of which several files, or a line of text, are given."""
_COLUMNS = {column.name: column for task in TASKS.values() for column in task.columns}


@dataclass(frozen=True)
class Step:
    """One step of the clip that is being made, with the first frame that it predicts."""

    number: int
    of: int
    preview: Image.Image


class StoppedError(Exception):
    """The clip is not wanted any more."""


def making(make: Callable[[Callable[[Tensor], object]], Made], steps: int) -> Iterator[Step | Made | MMError]:
    """The steps of a clip as they are done, and the clip or the error at the end; closing the iterator stops it.

    Args:
        make: makes the clip, and calls what it is given after every step. steps: of the sampler.
    """
    told: queue.Queue[Step | Made | MMError | BaseException] = queue.Queue()
    stopped = threading.Event()
    done = iter(range(1, steps + 1))

    def on_step(preview: Tensor) -> None:
        if stopped.is_set():
            raise StoppedError
        told.put(Step(next(done, steps), steps, Image.fromarray(preview.numpy())))

    def work() -> None:
        try:
            told.put(make(on_step))
        except BaseException as error:  # handed to whoever waits
            told.put(error)

    thread = threading.Thread(target=work, name="clip")
    thread.start()
    try:
        while True:
            found = told.get()
            if isinstance(found, StoppedError):
                return
            if isinstance(found, BaseException) and not isinstance(found, MMError):
                raise found
            yield found
            if not isinstance(found, Step):
                return
    finally:
        stopped.set()
        thread.join()


def build_page(models: Sequence[Model], reasons: Sequence[str], maker: Maker) -> gr.Blocks:
    """The page.

    Args:
        models: that are offered, one or more. reasons: why others are not. maker: of clips.
    """
    by_name = {model.name: model for model in models}
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}")
        for reason in reasons:
            gr.Markdown(f"Not offered: {reason}")
        with gr.Row():
            with gr.Column():
                inputs = _inputs(models[0], list(by_name))
            with gr.Column():
                with gr.Row():
                    start = gr.Button("Make the clip", variant="primary", elem_id="make")
                    stop = gr.Button("Stop", elem_id="stop")
                said = gr.Markdown("", elem_id="said")
                preview = gr.Image(
                    label="Its first frame so far", interactive=False, height=240, elem_id="preview", buttons=[]
                )
                latest = _shown("The latest clip", "latest")
            with gr.Column():
                kept = _shown("A clip that was kept", "kept")
                keep = gr.Button("Keep the latest clip here", elem_id="keep")
                differences = gr.Markdown("", elem_id="differences")
        made, beside = gr.State(None), gr.State(None)
        names = list(inputs)

        def run(*values: Any) -> Iterator[tuple[Any, ...]]:
            given = dict(zip(names, values, strict=True))
            model = by_name[given["model"]]
            yield "Loading the model", None, *[gr.skip()] * 3
            try:
                asked = asked_of(given, model.wan.task)
            except ValueError as error:
                yield str(error), None, *[gr.skip()] * 3
                return
            for found in making(lambda on_step: maker.make(model, asked, on_step)[0], asked.steps):
                if isinstance(found, Step):
                    yield f"Step {found.number} of {found.of}", found.preview, *[gr.skip()] * 3
                elif isinstance(found, Made):
                    yield f"Made {found.clip}", None, str(found.clip), found.command, found
                else:
                    yield "\n\n".join(map(str, found.problems)), None, *[gr.skip()] * 3

        event = start.click(run, list(inputs.values()), [said, preview, *latest, made], concurrency_limit=1)
        stop.click(lambda: "Stopped", None, said, cancels=[event])
        event.then(_difference, [made, beside], differences)
        keep.click(_kept, made, [*kept, beside]).then(_difference, [made, beside], differences)
        inputs["model"].change(
            lambda name: _visible(by_name[name].wan.task), inputs["model"], [inputs[name] for name in _OF_TASKS]
        )
    return page


_NUMBERS = (
    "num_frames",
    "height",
    "width",
    "fps",
    "steps",
    "guidance_scale",
    "shift",
    "seed",
    "adapter_strength",
)
"""Places that must have a number."""
_OF_TASKS = (*LISTS, *_COLUMNS, "strength", "text_only")
"""Places that some models alone have a use for."""


def _inputs(model: Model, names: list[str]) -> dict[str, Any]:
    """Places for all values, by name."""
    shown = _takes(model.wan.task)
    found: dict[str, Any] = {"model": gr.Dropdown(names, value=model.name, label="Model", elem_id="model")}
    found["prompt"] = gr.Textbox(lines=3, label="Prompt", elem_id="prompt")
    found["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="that of the release for the task")
    for name in LISTS:
        if name in _WRITTEN:
            found[name] = gr.Textbox(label=_LABELS[name], visible=name in shown, elem_id=name)
        else:
            count: Literal["multiple", "single"] = "multiple" if name in _SEVERAL else "single"
            found[name] = gr.File(label=_LABELS[name], file_count=count, visible=name in shown, elem_id=name)
    for name_of_column, column in _COLUMNS.items():
        middle = (column.lowest + column.highest) / 2
        found[name_of_column] = gr.Slider(
            column.lowest, column.highest, middle, label=name_of_column, visible=name_of_column in shown
        )
    label = "How much of the video is made anew"
    found["strength"] = gr.Slider(0.05, 1, 0.7, step=0.05, label=label, visible="strength" in shown)
    found["text_only"] = gr.Checkbox(False, label="Show the model no frames", visible="text_only" in shown)
    with gr.Row():
        for size, value in (("num_frames", 81), ("height", 480), ("width", 832), ("fps", 16)):
            found[size] = gr.Number(value, precision=0, label=size.replace("_", " "), elem_id=size)
    with gr.Row():
        found["steps"] = gr.Number(50, precision=0, minimum=1, label="steps", elem_id="steps")
        found["guidance_scale"] = gr.Number(5.0, label="guidance scale", elem_id="guidance_scale")
        found["shift"] = gr.Number(3.0, label="shift: 3 for 480p, 5 for 720p", elem_id="shift")
        found["solver"] = gr.Dropdown(["unipc", "euler"], value="unipc", label="solver")
        found["seed"] = gr.Number(42, precision=0, label="seed", elem_id="seed")
    with gr.Accordion("Other weights", open=False):
        found["weights"] = gr.Textbox(label="Weights in place of the model's: a file, a folder or a run's checkpoints")
        found["adapter"] = gr.Textbox(label="LoRA: a file, a folder or a run's checkpoints")
        found["adapter_strength"] = gr.Number(1.0, label="Factor on the LoRA")
    return found


def _shown(label: str, name: str) -> list[Any]:
    """A clip with the command that makes it again."""
    return [
        gr.Video(label=label, interactive=False, loop=True, autoplay=True, elem_id=name),
        gr.Textbox(label="Its command", interactive=False, buttons=["copy"], elem_id=f"{name}-command"),
    ]


def _takes(task: Task) -> frozenset[str]:
    """Names of the places that models of a task have a use for."""
    others = ("strength", *["text_only"] * task.with_mask)
    return frozenset({*every_list_of(task), *(column.name for column in task.columns), *others})


def _visible(task: Task) -> list[Any]:
    return [gr.update(visible=name in _takes(task)) for name in _OF_TASKS]


def asked_of(given: Mapping[str, Any], task: Task) -> Asked:
    """Values of the page as what is asked for; of places that the model has no use for nothing is taken.

    Raises:
        ValueError: for a number that is not there.
    """
    shown = _takes(task)
    lacking = [name for name in _NUMBERS if given[name] is None]
    if lacking:
        raise ValueError(f"There is no number for {', '.join(lacking)}.")
    nothing = "text_only" in shown and bool(given["text_only"])
    files = {name: _paths(given[name]) for name in LISTS if name in shown and given[name]}
    return Asked(
        prompt=given["prompt"],
        negative_prompt=given["negative_prompt"] or None,
        files=files,
        columns={name: float(given[name]) for name in _COLUMNS if name in shown},
        strength=given["strength"] if begins_as(task, Shown("masks" in files, nothing)) in files else None,
        text_only=nothing,
        weights=given["weights"] or None,
        adapter=given["adapter"] or None,
        solver=given["solver"],
        **{name: given[name] for name in _NUMBERS},
    )


def _paths(given: Any) -> tuple[str, ...]:
    return (str(given),) if isinstance(given, str) else tuple(map(str, given))


def _kept(found: Made | None) -> tuple[Any, ...]:
    return (None, "", None) if found is None else (str(found.clip), found.command, found)


def _difference(latest: Made | None, kept: Made | None) -> str:
    """The values that two clips do not share, as a table."""
    if latest is None or kept is None:
        return ""
    rows = dict(latest.asked.differs(kept.asked))
    if latest.model != kept.model:
        rows = {"model": (latest.model, kept.model), **rows}
    if not rows:
        return "Both clips are of the same values."
    lines = [f"| {name} | {mine} | {theirs} |" for name, (mine, theirs) in rows.items()]
    return "\n".join(["| | latest | kept |", "| --- | --- | --- |", *lines])
