"""The numbers of docs/versions.md are those of the code and of the package, and do what the page says."""

import hashlib
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

import mm
from mm.checkpoint.formats.mindspeed import CHECKPOINT_VERSION
from mm.checkpoint.manifest import Manifest
from mm.checkpoint.record import WeightsRecord
from mm.data.recipe import FORMAT_VERSION, Recipe, check_recipe, load_recipe, save_recipe
from mm.errors import DataError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "versions.md").read_text()
SETUP = (ROOT / "setup.py").read_text()
RECIPE = Recipe(
    vae="v", text_encoder="t", tokenizer="k", height=64, width=64, num_frames=9, min_num_frames=None, frame_interval=1,
    vae_dtype="fp32", text_dtype="fp32", tile_size=None, tile_stride=None, max_text_tokens=32, seed=1,
)  # fmt: skip


def test_numbers_of_files() -> None:
    (schema,) = get_args(Manifest.model_fields["schema_version"].annotation)
    (record,) = get_args(WeightsRecord.model_fields["schema_version"].annotation)
    in_code = [("manifest.json", "schema_version", str(schema)), ("mm_record.json", "schema_version", str(record))]
    in_code += [("model_optim_rng.pt", "checkpoint_version", str(CHECKPOINT_VERSION))]
    in_code += [("recipe.json", "format_version", str(FORMAT_VERSION))]
    assert re.findall(r"^\| `(\S+)`[^|]*\| `(\w+)` \| ([\d.]+) \|", PAGE, re.MULTILINE) == in_code


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Manifest, {"step": 1, "world_size": 1, "versions": {}, "scalars": {}, "files": {}, "tensors": {}}),
        (
            WeightsRecord,
            {
                "step": 1,
                "consumed_samples": 1,
                "skipped_steps": 0,
                "replaced_samples": 0,
                "seed": 1,
                "versions": {},
                "files": {},
            },
        ),
    ],
)
def test_other_numbers_of_checkpoints_are_refused(kind: type[Manifest] | type[WeightsRecord], values: dict) -> None:
    number = kind(**values).schema_version
    for other in (number - 1, number + 1):
        with pytest.raises(ValidationError, match="schema_version"):
            kind(**values, schema_version=other)  # read_manifest and read_record say it as CKPT-012
    with pytest.raises(ValidationError, match="later"):
        kind(**values, later=1)


@pytest.mark.parametrize("number", [1, FORMAT_VERSION + 1])
def test_feature_stores_of_other_numbers_are_read_and_not_added_to(tmp_path: Path, number: int) -> None:
    save_recipe(tmp_path, RECIPE.model_copy(update={"format_version": number}))
    found = load_recipe(tmp_path)
    assert found.format_version == number
    with pytest.raises(DataError, match="format_version"):
        check_recipe(tmp_path, found, RECIPE.model_dump(), "")  # as extraction into the store does
    assert found.key != RECIPE.key


def test_versions_that_it_runs_with() -> None:
    rows = dict(re.findall(r"^\| (Python|torch|megatron-core) \| (.*?) \|$", PAGE, re.MULTILINE))
    lowest, below = re.search(r'python_requires=">=3\.(\d+),<3\.(\d+)"', SETUP).groups()
    assert rows["Python"] == f"3.{lowest} to 3.{int(below) - 1}"
    torch_from, torch_below = re.search(r'"torch>=2\.(\d+)\.0,<2\.(\d+)"', SETUP).groups()
    assert int(torch_below) == int(torch_from) + 1
    assert rows["torch"].split()[0] == f"2.{torch_from}"
    assert rows["megatron-core"].split()[0] == re.search(r'"megatron-core==([\d.]+)"', SETUP)[1]


def test_the_license_is_the_published_text() -> None:
    """Its SHA-256, of https://www.apache.org/licenses/LICENSE-2.0.txt."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert 'license="Apache-2.0"' in SETUP
    assert "[LICENSE](LICENSE)" in (ROOT / "README.md").read_text()


def test_the_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", mm.__version__)
    assert mm.__version__ not in SETUP
