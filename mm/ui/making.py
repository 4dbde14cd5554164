"""A clip from the page's values: made in this process, and written with the run.yaml that makes it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.api.generation import generate_videos
from mm.api.model import load_model
from mm.api.saved_video import save_video
from mm.config.base import parse
from mm.config.model import Precision
from mm.config.rules.generation import check_generation
from mm.config.run.file import whole_file
from mm.config.run.generation import GenerationRun, GenerationSections
from mm.config.run.listed import LISTS
from mm.config.run.origins import Origins
from mm.config.tasks.task import ListName
from mm.device.backend import DeviceKind, select
from mm.generate.pipeline import to_frames
from mm.ui.models import Model
from mm.wan.model import WanModel

RUN_FILE, CLIP_FILE, AGAIN = "run.yaml", "clip.mp4", "again"
QUALITY = 8  # of a clip to be looked at


@dataclass(frozen=True)
class Asked:
    """Values of the page.

    Attributes:
        prompt, negative_prompt: the latter is the release's where it is None.
        files: what was given beside them, by list: the paths of one line.
        columns: the task's numbers. strength: with a video that the clip is made from.
        text_only: a model that sees frames is shown none.
        num_frames, height, width, steps, guidance_scale, shift, solver, seed, fps: as in run.yaml.
        weights: other weights than the model's, None for its own. adapter, adapter_strength: a LoRA on them.
    """

    prompt: str
    negative_prompt: str | None = None
    files: Mapping[ListName, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[str, float] = field(default_factory=dict)
    strength: float | None = None
    text_only: bool = False
    num_frames: int = 81
    height: int = 480
    width: int = 832
    steps: int = 50
    guidance_scale: float = 5.0
    shift: float = 3.0
    solver: str = "unipc"
    seed: int = 42
    fps: int = 16
    weights: str | None = None
    adapter: str | None = None
    adapter_strength: float = 1.0

    def differs(self, other: Asked) -> dict[str, tuple[Any, Any]]:
        """Values that two clips do not share, by name."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


@dataclass(frozen=True)
class Made:
    """A clip that was made.

    Attributes:
        folder: of its files. model: its name. asked: what it was made of.
    """

    folder: Path
    model: str
    asked: Asked

    @property
    def clip(self) -> Path:
        """The clip."""
        return self.folder / CLIP_FILE

    @property
    def command(self) -> str:
        """Command that makes the clip again, into a folder beside it."""
        return f"mm run {self.folder / RUN_FILE}"


class Maker:
    """Makes clips one after the other; the transformer of the last one stays loaded.

    Args:
        outputs: a folder, in which each clip gets one. device: None takes the best there is.
        precision: of the transformer.
    """

    def __init__(self, outputs: Path, device: DeviceKind | None = None, precision: Precision = "bf16") -> None:
        self._outputs = outputs
        self._device = device
        self._precision = precision
        self._loaded: tuple[tuple[object, ...], WanModel] | None = None

    def make(
        self, model: Model, asked: Asked, on_step: Callable[[Tensor], object] = lambda preview: None
    ) -> tuple[Made, Tensor]:
        """Make a clip.

        Args:
            model: with what. asked: what. on_step: called after every step with the first frame that it predicts, uint8
                [H, W, 3].

        Returns:
            What was written, and the frames, uint8 [F, H, W, 3].

        Raises:
            MMError: what the rules of a generation and `mm.generate_videos` raise.
        """
        folder = self._new_folder()
        made = Made(folder, model.name, asked)
        try:
            run = self._described(model, asked, folder)
            check_generation(run)
            (folder / RUN_FILE).write_text(whole_file(run), encoding="utf-8")
            [frames] = self._frames(model, run, asked, on_step)
            save_video(frames, made.clip, asked.fps, QUALITY)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return made, frames

    def _new_folder(self) -> Path:
        self._outputs.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = self._outputs / f"{number:04d}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                continue
            return folder.absolute()

    def _described(self, model: Model, asked: Asked, folder: Path) -> GenerationRun:
        """The generation as its sections; the lists are written as files of one line."""
        lists = {name: _write_line(folder / f"{name}.txt", ", ".join(paths)) for name, paths in asked.files.items()}
        columns = {name: _write_line(folder / f"{name}.txt", f"{value:g}") for name, value in asked.columns.items()}
        adapters = [] if asked.adapter is None else [{"path": asked.adapter, "strength": asked.adapter_strength}]
        file, encoders, shape = folder / RUN_FILE, model.encoders, model.wan.model_dump(mode="json")
        values: dict[str, Any] = {
            "generation": {"seed": asked.seed, "device": self._device},
            "model": {
                "weights": asked.weights or str(model.folder / "transformer"),
                "adapters": adapters,
                "precision": self._precision,
                "shape": {name: value for name, value in shape.items() if value is not None},
            },
            "encoders": {
                "vae": {"from_pretrained": str(encoders.vae), "precision": encoders.visual_dtype},
                "text": {"from_pretrained": str(encoders.text_encoder), "precision": encoders.text_dtype},
                "tokenizer": {"from_pretrained": str(encoders.tokenizer), "model_max_length": model.wan.text_len},
                "image": None if encoders.image_encoder is None else {"from_pretrained": str(encoders.image_encoder)},
            },
            "inputs": {
                "prompts": _write_line(folder / "prompts.txt", asked.prompt),
                **lists,
                "columns": columns,
                "negative_prompt": asked.negative_prompt,
                "last_frame": len(asked.files.get("images", ())) > 1 and model.wan.task.with_last_frame is not None,
                "strength": asked.strength,
                "text_only": asked.text_only,
            },
            "sampling": {
                "solver": asked.solver,
                "steps": asked.steps,
                "shift": asked.shift,
                "guidance_scale": asked.guidance_scale,
            },
            "output": {
                "path": str(folder / AGAIN),
                "num_frames": asked.num_frames,
                "height": asked.height,
                "width": asked.width,
                "fps": asked.fps,
            },
        }
        return GenerationRun.described(parse(GenerationSections, values, str(file)), Origins(file=str(file)))

    def _frames(
        self, model: Model, run: GenerationRun, asked: Asked, on_step: Callable[[Tensor], object]
    ) -> list[Tensor]:
        vae = model.encoders.load_vae(select(self._device).device)
        given: dict[str, Any] = {name: [_one_or_all(asked.files[name])] for name in LISTS if name in asked.files}
        return generate_videos(
            self._transformer(model, run),
            [asked.prompt],
            replace(model.encoders, vae=vae),
            **given,
            text_only=asked.text_only,
            columns={name: [value] for name, value in asked.columns.items()},
            negative_prompt=asked.negative_prompt,
            size=run.output.size,
            steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            shift=asked.shift,
            solver=run.sampling.solver,
            strength=asked.strength,
            seed=asked.seed,
            on_step=lambda clean: on_step(to_frames(vae.decode(clean[:1, :, :1]))[0, 0]),
        )

    def _transformer(self, model: Model, run: GenerationRun) -> WanModel:
        key = (run.model.weights, run.model.adapters)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # two would not fit
            loaded = load_model(
                str(run.model.weights),
                dtype=self._precision,
                device=self._device,
                task=model.wan.task.name,
                adapters=[(adapter.path, adapter.strength) for adapter in run.model.adapters],
            )
            self._loaded = (key, loaded)
        return self._loaded[1]


def _one_or_all(paths: tuple[str, ...]) -> Any:
    return paths[0] if len(paths) == 1 else list(paths)


def _write_line(file: Path, line: str) -> str:
    """A list of one line; returns its path."""
    file.write_text(line.replace("\n", " ") + "\n", encoding="utf-8")
    return str(file)
