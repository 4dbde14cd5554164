"""Recipe of a folder of features, so that features of other weights, sizes or rules are an error.

A recipe is saved as recipe.json in the store; its key stands in every feature file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from mm.config.base import Section
from mm.config.run.data import FeatureSet
from mm.config.run.extraction import ExtractionRun
from mm.config.run.shapes import FrameRule
from mm.config.storage import Location
from mm.config.tasks.registry import ALL_RECIPE_FIELDS, DEFAULT, FEATURE_TASKS, FeatureTaskName
from mm.data.files import write_atomically
from mm.data.remote.reading import load_section, require_bucket
from mm.errors import ConfigError, DataError

RECIPE_FILE = "recipe.json"
UNKNOWN = "unknown"  # features taken over from elsewhere
FORMAT_VERSION = 2  # raise it when the same recipe would give other features
CROP_RULE = "cover-bilinear-antialias-centre"
TEXT_CLEANING = "ftfy-html2-whitespace"

MAX_HEADER_BYTES = 100 * 2**20
_SAMPLE_BYTES = 4096
_PIECES = 256
_DIRECTORY_BYTES = 2**20
_FINGERPRINTED = (".json", ".safetensors", ".model")


class Recipe(Section):
    """Everything that decides what the features of a given video and caption are.

    Attributes:
        vae, text_encoder, tokenizer: fingerprints of their folders.
        height, width, num_frames, min_num_frames, frame_interval, crop: the clip.
        shape, frames: rules of `mm.config.run.shapes`, with all their values; None for one size and for frames as they
            come, which no recipe spells out.
        vae_dtype, text_dtype, tile_size, tile_stride: how it was encoded; tiles in latent pixels.
        text_cleaning, max_text_tokens: how captions were prepared.
        seed: decides starts of clips and choices between captions.
        task: what the features are for.
        image_encoder, condition_tile_size, condition_tile_stride: the fingerprint of the image encoder's folder, and
            the tiles of the latents that it is conditioned on; of tasks that declare them (`Task.recipe`).
    """

    format_version: int = FORMAT_VERSION
    task: FeatureTaskName = DEFAULT.name
    vae: str
    text_encoder: str
    tokenizer: str
    height: int | None = None
    width: int | None = None
    num_frames: int
    min_num_frames: int | None
    frame_interval: int
    crop: str = CROP_RULE
    vae_dtype: str
    text_dtype: str
    tile_size: tuple[int, int] | None
    tile_stride: tuple[int, int] | None
    text_cleaning: str = TEXT_CLEANING
    max_text_tokens: int = Field(ge=1)
    seed: int
    image_encoder: str | None = None
    condition_tile_size: tuple[int, int] | None = None
    condition_tile_stride: tuple[int, int] | None = None
    shape: dict[str, Any] | None = None
    frames: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that differ when any field does."""
        # without the fields of other tasks, so that a task that comes later changes no key
        unused = ALL_RECIPE_FIELDS - FEATURE_TASKS[self.task].recipe
        return hashlib.sha256(self.model_dump_json(exclude={*unused, *self.unsaid}).encode()).hexdigest()[:16]

    @property
    def unsaid(self) -> set[str]:
        """Fields that are spelled out only where they say something: they came later, and older keys hold."""
        return {name for name in ("shape", "frames") if getattr(self, name) is None}


def extraction_recipe(run: ExtractionRun) -> Recipe:
    """The recipe of one feature extraction.

    Raises:
        DataError: DATA-040 when a folder of weights is missing or has no file that says what it is.
    """
    encoders, clip = run.encoders, run.data.clip
    tiles, image = encoders.vae.tiles_of_clips(), encoders.image
    has_conditions = "condition_tile_size" in run.task.recipe
    condition_tiles = encoders.vae.tiles_of_conditions() if has_conditions else None
    return Recipe(
        task=run.task.name,
        vae=folder_fingerprint(Path(encoders.vae.from_pretrained)),
        text_encoder=folder_fingerprint(Path(encoders.text.from_pretrained)),
        tokenizer=folder_fingerprint(Path(encoders.tokenizer.from_pretrained)),
        height=clip.height,
        width=clip.width,
        num_frames=clip.num_frames,
        min_num_frames=clip.min_num_frames,
        frame_interval=clip.frame_interval,
        vae_dtype=encoders.vae.precision,
        text_dtype=encoders.text.precision,
        tile_size=tiles.size if tiles else None,
        tile_stride=tiles.stride if tiles else None,
        max_text_tokens=encoders.tokenizer.model_max_length,
        seed=run.extraction.seed,
        image_encoder=folder_fingerprint(Path(image.from_pretrained)) if image else None,
        condition_tile_size=condition_tiles.size if condition_tiles else None,
        condition_tile_stride=condition_tiles.stride if condition_tiles else None,
        shape=rule_values(clip.shape),
        frames=None if clip.frames == FrameRule() else rule_values(clip.frames),
    )


def rule_values(rule: Section | None) -> dict[str, Any] | None:
    """All values of a rule, as a recipe has them."""
    return None if rule is None else rule.model_dump(mode="json")


def expected_in_training(features: FeatureSet) -> dict[str, Any]:
    """The recipe's fields that a set of features decides; raises what `extraction_recipe` raises."""
    clip, tokenizer = features.clip, features.tokenizer
    expected: dict[str, Any] = {}
    if clip is not None:
        fields = ("height", "width", "num_frames", "frame_interval")
        expected = {name: getattr(clip, name) for name in fields} | {"shape": rule_values(clip.shape)}
    if tokenizer is not None:
        expected["tokenizer"] = folder_fingerprint(Path(tokenizer.from_pretrained))
        expected["max_text_tokens"] = tokenizer.model_max_length
    return expected


def save_recipe(store: Path, recipe: Recipe) -> None:
    """Write recipe.json; raises what `write_atomically` raises."""
    content = (recipe.model_dump_json(indent=1, exclude=recipe.unsaid) + "\n").encode()
    write_atomically(store / RECIPE_FILE, [content], len(content))


def load_recipe(store: Location) -> Recipe:
    """Read recipe.json.

    Raises:
        DataError: DATA-010 when it is missing or no recipe; of object storage what `mm.data.remote.client.attempt`
            raises.
    """
    try:
        return load_section(Recipe, store / RECIPE_FILE)
    except ConfigError as error:
        require_bucket(store)
        remedy = "Give the folder that feature extraction wrote (save_path), or extract the features again."
        raise DataError("DATA-010", f"{store} is no feature store: {error.problems[0].message}", remedy) from None


def check_recipe(store: Location, found: Recipe, expected: Mapping[str, Any], remedy: str) -> None:
    """Compare a store's recipe with what is expected of it.

    Args:
        store: the store, for the message.
        found: its recipe.
        expected: the fields that must agree.
        remedy: what to do when they do not.

    Raises:
        DataError: DATA-014 with every field that differs.
    """
    differences = [
        f"{name} is {getattr(found, name)}, expected {value}"
        for name, value in expected.items()
        if getattr(found, name) != value
    ]
    if differences:
        message = f"The features in {store} were made otherwise: {'; '.join(differences)}."
        raise DataError("DATA-014", message, remedy)


def folder_fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that change when a folder of weights or a tokenizer does.

    Taken are the names and contents of its JSON, safetensors and SentencePiece files, so a README may change. Of a
    safetensors file the whole header is taken and, of every tensor, 4 KiB at the start, the middle and the end: 11 GB
    of text encoder cost a few megabytes of reading, and training any tensor at all changes the result; only an edit
    of single numbers inside a large tensor could go unnoticed. Notes in a config.json about who wrote it
    (`_diffusers_version`, `transformers_version`) are left out. Of one file, an encoder of the original release, its
    size, its beginning and its end are taken, where `torch.save` has a checksum of every tensor, and pieces between.

    Raises:
        DataError: DATA-040 when the folder is missing or holds no such file, DATA-042 when one cannot be read.
    """
    files = [folder] if folder.is_file() else sorted(p for p in folder.glob("*") if p.suffix in _FINGERPRINTED)
    if not files:
        remedy = "Correct from_pretrained: the folder of this component in the diffusers layout."
        raise DataError("DATA-040", f"{folder} is missing or holds no model files.", remedy)
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(f"{file.name}:".encode() + _file_digest(file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{file} cannot be read ({error})."
            raise DataError("DATA-042", message, "Download or copy the file again.") from None
    return digest.hexdigest()[:16]


def _file_digest(file: Path) -> bytes:
    if file.suffix == ".safetensors":
        return _weights_digest(file)
    if file.suffix not in _FINGERPRINTED:
        return _pieces_digest(file)
    content = file.read_bytes()
    if file.name == "config.json":
        values = json.loads(content)
        kept = {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}
        content = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(content).digest()


def _pieces_digest(file: Path) -> bytes:
    """Digest of a file that `torch.save` wrote; its directory of checksums stands at its end."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        for offset in range(0, size, max(size // _PIECES, 1)):
            stream.seek(offset)
            digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(size - _DIRECTORY_BYTES, 0))
        digest.update(stream.read())
    return digest.digest()


def _weights_digest(file: Path) -> bytes:
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    with open(file, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {header_bytes} bytes")
        header = stream.read(header_bytes)
        digest.update(header)
        for name, entry in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            for offset in (begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES)):
                stream.seek(8 + header_bytes + offset)
                digest.update(stream.read(min(_SAMPLE_BYTES, end - offset)))
    return digest.digest()
