"""Models of a folder that the page offers, and what each takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mm.api.encoders import Encoders
from mm.api.model import config_of
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig
from mm.errors import MMError

DEPTH = 3


@dataclass(frozen=True)
class Model:
    """A model in the layout of diffusers.

    Attributes:
        name: its path below the folder that was looked through. folder: of `transformer`.
        home: of its encoders. wan: its transformer's shape.
    """

    name: str
    folder: Path
    home: Path
    wan: WanConfig

    @property
    def encoders(self) -> Encoders:
        """Encoders in the precisions that `mm.Encoders` has by default."""
        return Encoders.of(self.home)


def find_models(root: Path, encoders: Path | None = None, depth: int = DEPTH) -> tuple[list[Model], list[str]]:
    """Models below a folder, by name, and of each other one in that layout the reason why it is not offered.

    Args:
        root: the folder. encoders: those of models that are a transformer alone.
        depth: folders that are looked into, one inside of the other.
    """
    models, reasons = [], []
    encoders = None if encoders is None else encoders.absolute()
    for folder in _folders(root.absolute(), depth):
        name = str(folder.relative_to(root.absolute())) if folder != root.absolute() else folder.name
        try:
            wan = config_of(open_weights(folder / "transformer"))
        except MMError as error:
            reasons.append(f"{name}: {error}")
            continue
        model = Model(name, folder, folder if (folder / "vae").is_dir() or encoders is None else encoders, wan)
        lacking = [part for part in ("vae", "text_encoder", "tokenizer") if not (model.home / part).is_dir()]
        if lacking:
            lent = "; --encoders FOLDER lends them" if encoders is None else ""
            reasons.append(f"{name}: {model.home} has no {', '.join(lacking)}{lent}")
        else:
            models.append(model)
    return models, reasons


def _folders(root: Path, depth: int) -> list[Path]:
    if (root / "transformer").is_dir():
        return [root]
    if not depth or not root.is_dir():
        return []
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [found for path in inside for found in _folders(path, depth - 1)]
