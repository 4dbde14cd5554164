"""A folder as VideoX-Fun's users have it, made of the embedded default: scripts, config, models, data."""

import json
import re
import shlex
from pathlib import Path
from string import Template

from mm.config.tasks.registry import FEATURE_TASKS
from mm.demo.components import MODEL_NAMES, encoders_of

ROOT = Path(__file__).parents[1]
DATA = "datasets/internal_datasets"
ENCODERS = ("vae", "text_encoder", "tokenizer", "image_encoder")


def home(demo: Path, folder: Path, models: dict[str, str]) -> Path:
    """A folder with scripts, config, a data set with control files, and tiny models of tasks by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("scripts", "config"):
        (folder / name).symlink_to(ROOT / name)
    for model, task in models.items():
        write_model(demo, folder / model, task)
    (folder / DATA).mkdir(parents=True)
    for theirs, ours in (("train", "videos"), ("control", "control"), ("poses", "poses"), ("masks", "masks")):
        (folder / DATA / theirs).symlink_to(demo / "dataset" / ours)
    write_metadata(demo, folder / DATA / "metadata.json")
    return folder


def write_model(demo: Path, model: Path, task: str) -> None:
    """A model's folder: the transformer at its root, as VideoX-Fun has it, and encoders in diffusers' layout."""
    model.mkdir(parents=True)
    for file in (demo / "weights" / MODEL_NAMES[task] / "transformer").iterdir():
        (model / file.name).symlink_to(file)
    encoders = demo / "weights" / MODEL_NAMES[encoders_of(FEATURE_TASKS[task]).name]
    for name in ENCODERS:
        if (encoders / name).exists():
            (model / name).symlink_to(encoders / name)


def write_metadata(demo: Path, file: Path, control: str = "control", num_rows: int | None = None) -> None:
    rows = json.loads((demo / "dataset" / "data.json").read_text())[:num_rows]
    ending = ".txt" if control == "poses" else ".mp4"
    listed = []
    for row in rows:
        name = Path(row["path"]).name
        beside = f"{control}/{Path(name).stem}{ending}"
        listed.append({"file_path": f"train/{name}", "control_file_path": beside, "text": row["cap"], "type": "video"})
    file.write_text(json.dumps(listed))


def commands_in(guide: str) -> list[tuple[dict[str, str], list[str]]]:
    """Every command line of a guide's shell blocks that starts a python file: exported variables, and its words."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        exported: dict[str, str] = {}
        for line in filter(None, map(str.strip, lines)):
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").partition("=")
                exported[name] = " ".join(shlex.split(value, comments=True))
            elif ".py" in line:
                found.append((exported, shlex.split(Template(line).substitute(exported))))
    return found
