"""Trains the tiny models of the Wan family for a short while and judges what they have learned, on their pixels.

    python benchmarks/family_learning.py --out FOLDER                    # all rows
    python benchmarks/family_learning.py --out FOLDER --rows control vace

The demo's text-to-video model is trained as in the quickstart and widened to the row's model; features of the row's
clips (`learning_clips.py`) are extracted and trained on; 16 clips are generated. Commands are those of a user and are
printed; frames are judged before a codec. FOLDER gets a sheet for each row, conditions above clips, and figures.json;
what is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import learning_clips as clips
import numpy as np
import torch
from learning_clips import Lesson, Question
from learning_sheet import write_sheet

from mm import Encoders, generate_videos, load_model
from mm.cli import convert, extract, train
from mm.cli import demo as demo_command
from mm.config.data import data_source_line
from mm.config.tasks.registry import FEATURE_TASKS, TASKS
from mm.demo.clips import FPS, NUM_FRAMES, SIZE, Frames
from mm.demo.components import MODEL_NAMES, encoders_of, load_vae, write_variant
from mm.demo.measure import Measurement, measure_clip
from mm.demo.video import write_video
from mm.poses import direction_rows
from mm.wan.encoders import VideoEncoder

TEXT_LEN = 32
BASE_STEPS = 1200
LEAST = 14  # of 16


@dataclass(frozen=True)
class Row:
    """One model and what it is to learn.

    Attributes:
        task: of its features. lessons, questions: what it is trained on, and asked. steps: of training.
        dropped: shares of samples that are trained without a condition. captions_dropped: without their caption.
        counted: what at least 14 of 16 clips must show: "colour", "direction".
        below_vae: most decibels that kept pixels may be below those of the VAE alone, on average.
    """

    task: str
    lessons: Callable[[], Iterable[Lesson]]
    questions: Callable[[], Iterable[Question]]
    steps: int
    counted: tuple[str, ...]
    dropped: dict[str, float] = field(default_factory=dict)
    captions_dropped: float = 0.0
    below_vae: float | None = None


ROWS = {
    "control": Row(
        "fun_control",
        clips.control_lessons,
        clips.control_questions,
        steps=400,
        counted=("direction", "colour"),
        dropped={"start": 0.7, "image": 0.7, "control": 0.1},
        captions_dropped=0.1,
    ),
    "reference": Row(
        "fun_control_ref",
        clips.reference_lessons,
        clips.reference_questions,
        steps=500,
        counted=("colour", "direction"),
        dropped={"start": 0.1, "image": 0.1, "control": 0.1, "reference": 0.1},
        captions_dropped=0.1,
    ),
    "camera": Row(
        "fun_camera",
        clips.camera_lessons,
        clips.camera_questions,
        steps=400,
        counted=("direction", "colour"),
    ),
    "inp": Row(
        "fun_inp",
        clips.inpainting_lessons,
        clips.inp_questions,
        steps=500,
        counted=("colour", "direction"),
        dropped={"image": 0.8},  # of the first frame, which is masked in part: a clip is made without
        below_vae=1.0,
    ),
    "vace": Row(
        "vace", clips.inpainting_lessons, clips.vace_questions, 500, counted=("colour", "direction"), below_vae=1.0
    ),
}


@dataclass(frozen=True)
class Judged:
    """A question, the clip that answers it and what that shows.

    Attributes:
        kept, by_vae: decibels of the pixels that were to be kept, and of the same behind the VAE alone.
    """

    question: Question
    frames: Frames
    seen: Measurement
    kept: float | None = None
    by_vae: float | None = None

    def hit(self, what: str) -> bool:
        """Tell whether the clip has the colour or the direction that it should."""
        return bool(getattr(self.seen, what) == getattr(self.question.expected, what))


def main(words: list[str] | None = None) -> None:
    """Train and judge rows; the exit code is 1 when one does not reach what it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args(words)
    base = train_base(args.out)
    figures = {}
    for name in args.rows:
        judged = learn(ROWS[name], args.out, base)
        figures[name] = figures_of(judged)
        write_sheet(judged, args.out / f"{name}.webp")
        print(f"{name}: {json.dumps(figures[name])}", flush=True)
        (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if all(reached(ROWS[name], found) for name, found in figures.items()) else 1)


def run(command: Any, *words: object) -> None:
    """Run one of `mm`'s commands, and say which."""
    texts = [str(word) for word in words]
    print("mm", command.__name__.rpartition(".")[2], *texts, flush=True)
    command.main(texts)


def train_base(home: Path, steps: int = BASE_STEPS) -> Path:
    """The demo's text-to-video model after the quickstart's training; `home` gets the demo, and `base`."""
    if not (home / "demo").exists():
        run(demo_command, "--out", home / "demo", "--clips-per-caption", clips.VARIANTS)
    if not (home / "base").exists():
        configs = home / "demo" / "configs"
        run(extract, *_extraction(configs))
        start = home / "demo" / "weights" / MODEL_NAMES["t2v"] / "transformer"
        run(train, *_training(configs, start, home / "base", steps))
    return home / "base"


def learn(row: Row, home: Path, base: Path) -> list[Judged]:
    """Train a row's model from weights of text to video, and ask it; `home` has the demo, and gets what is made."""
    return ask(row, home / "demo", teach(row, home, widened(row, home, base), row.steps))


def teach(row: Row, home: Path, start: Path, steps: int) -> Path:
    """Train a row's model from weights on the row's lessons; returns the run's folder."""
    configs, run_folder = home / "demo" / "configs" / row.task, home / f"run_{row.task}"
    write_lessons(row, home / "demo", configs)
    run(extract, *_extraction(configs))
    run(train, *_training(configs, start, run_folder, steps))
    return run_folder


def widened(row: Row, home: Path, base: Path) -> Path:
    """Weights of the row's model that begin as those of `base`, with zeros for channels that it has not.

    `mm convert --mode widen` does so for released sizes; the tiny image encoder has others.
    """
    whole, target = home / "base_hf", home / f"widened_{row.task}"
    if not whole.exists():
        run(convert, "--mode", "convert_to_hf", "--source_path", base, "--target_path", whole)
    if not target.exists():
        write_variant(target, TASKS[FEATURE_TASKS[row.task].trains], whole)
    return target


def write_lessons(row: Row, demo: Path, configs: Path) -> None:
    """The row's clips as a data set beside the demo's, and its values in the demo's files."""
    folder = demo / f"dataset_{row.task}"
    if (folder / "data.json").exists():
        return
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    listed = []
    for index, lesson in enumerate(row.lessons()):
        path = f"videos/{index:04d}.mp4"
        write_video(folder / path, lesson.frames, FPS)
        beside = {role: _write_beside(folder, role, index, what) for role, what in lesson.beside.items()}
        listed.append({"path": path, "cap": lesson.caption, "num_frames": NUM_FRAMES, "fps": FPS,
                       "resolution": {"height": SIZE, "width": SIZE}, **beside})  # fmt: skip
    (configs / "data.txt").write_text(data_source_line(folder, "data.json") + "\n")
    dropping = {"cfg": row.captions_dropped, "condition_dropout": row.dropped}
    _change(configs / "feature_data.json", ("dataset_param", "preprocess_parameters"), dropping)
    _change(configs / "pretrain_model.json", ("predictor",), {"text_len": TEXT_LEN})
    (folder / "data.json").write_text(json.dumps(listed))


def _write_beside(folder: Path, role: str, index: int, what: Frames | str) -> str:
    (folder / role).mkdir(exist_ok=True)
    if isinstance(what, str):
        rows = direction_rows(what, NUM_FRAMES, clips.CAMERA_SPEED).tolist()
        lines = (" ".join(f"{number:.9g}" for number in row) for row in rows)
        (folder / role / f"{index:04d}.txt").write_text("\n" + "\n".join(lines) + "\n")
        return f"{role}/{index:04d}.txt"
    write_video(folder / role / f"{index:04d}.mp4", what, FPS)
    return f"{role}/{index:04d}.mp4"


def _change(file: Path, place: tuple[str, ...], values: dict[str, Any]) -> None:
    content = json.loads(file.read_text())
    section = content
    for key in place:
        section = section[key]
    section.update(values)
    file.write_text(json.dumps(content, indent=4) + "\n")


def _extraction(configs: Path) -> list[object]:
    names = {"--mm-data": "data.json", "--mm-model": "model_wan.json", "--mm-tool": "tools.json"}
    return [word for flag, name in names.items() for word in (flag, configs / name)]


def _training(configs: Path, load: Path, save: Path, steps: int) -> list[object]:
    return ["--mm-data", configs / "feature_data.json", "--mm-model", configs / "pretrain_model.json",
            "--load", load, "--save", save, "--train-iters", steps,
            "--lr", "2e-3", "--min-lr", "2e-5", "--lr-decay-style", "cosine", "--lr-warmup-iters", min(100, steps // 4),
            "--micro-batch-size", 16, "--num-workers", 0, "--log-interval", 50]  # fmt: skip


def ask(row: Row, demo: Path, weights: Path) -> list[Judged]:
    """The questions, the clips that the model makes of them, and what those show."""
    questions = list(row.questions())
    inputs: dict[str, Any] = {name: [of.inputs[name] for of in questions] for name in questions[0].inputs}
    found = generate_videos(
        load_model(weights, dtype="fp32", text_len=TEXT_LEN),
        [question.caption for question in questions],
        Encoders.of(demo / "weights" / MODEL_NAMES[encoders_of(FEATURE_TASKS[row.task]).name], text_dtype="fp32"),
        **inputs,
        size=(NUM_FRAMES, SIZE, SIZE),
        steps=20,
        guidance_scale=1.0,
        batch_size=16,
    )
    vae = VideoEncoder(load_vae())
    return [judge(question, frames.numpy(), vae) for question, frames in zip(questions, found, strict=True)]


def judge(question: Question, frames: Frames, vae: VideoEncoder) -> Judged:
    """What a clip shows where it was to be made, and how near the rest is to what was given."""
    seen = measure_clip(clips.only(frames, question.made))
    if question.answer is None or question.made is None:
        return Judged(question, frames, seen)
    pixels = torch.from_numpy(question.answer).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(pixels)).clamp(-1, 1)[0].permute(1, 2, 3, 0)
    kept, given = ~question.made, question.answer
    by_vae = decibels((again.numpy()[:, kept] + 1) * 127.5, given[:, kept])
    return Judged(question, frames, seen, decibels(frames[:, kept], given[:, kept]), by_vae)


def decibels(found: np.ndarray, given: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pixels in 0..255."""
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - given).mean()))


def figures_of(judged: list[Judged]) -> dict[str, Any]:
    """Counts, and decibels of what was to be kept: on average and at least, and on average of the VAE alone."""
    found: dict[str, Any] = {what: sum(one.hit(what) for one in judged) for what in ("colour", "direction")}
    kept = [one.kept for one in judged if one.kept is not None]
    by_vae = [one.by_vae for one in judged if one.by_vae is not None]
    if kept:
        found |= {"kept_db": float(np.mean(kept)), "least_db": min(kept), "vae_db": float(np.mean(by_vae))}
    return {name: round(value, 1) for name, value in found.items()}


def reached(row: Row, figures: dict[str, Any]) -> bool:
    """Tell whether the figures of a row are those that it must reach."""
    enough = all(figures[what] >= LEAST for what in row.counted)
    return enough and (row.below_vae is None or figures["vae_db"] - figures["kept_db"] <= row.below_vae)


if __name__ == "__main__":
    main()
