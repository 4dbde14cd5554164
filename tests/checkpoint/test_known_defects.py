"""Defects that converters and loaders of other programs have had. docs/checkpoints.md lists them with the tests that
would find them here; those are in this file that no other test would find."""

import re
from pathlib import Path

import pytest
import torch
from conversions import REPO, assert_same_bits
from loaded import load_into
from test_mm_pipeline import NUM_LAYERS, original, pipeline, whole  # noqa: F401  (fixtures)
from test_store import assert_holds, names, pieces_for
from test_store_ranks import as_ranks

from mm.checkpoint.store import find_latest, save, whole_piece
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig
from mm.errors import CheckpointError
from mm.wan.model import WanModel

DOCS = REPO / "docs" / "checkpoints.md"
SMALL = {"hidden_size": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "text_dim": 12, "freq_dim": 8}
IMAGES = {"in_dim": 36, "img_dim": 10, "model_type": "i2v", "clip_token_len": 5}


def test_every_test_that_the_page_names_is_there():
    found = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?(?:\[[^]]*\])?`", DOCS.read_text())
    assert len([test for _, test in found if test]) > 30
    for file, test in found:
        path = Path(REPO / file)
        assert path.exists(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"


def test_an_input_layer_that_is_too_narrow_is_not_padded(tmp_path):
    """A text-to-video model is no start for one with images: its patches have fewer channels, and parts are missing."""
    narrow = WanModel(WanConfig(**SMALL))
    for value in narrow.parameters():
        torch.nn.init.ones_(value)
    pieces = [whole_piece(f"model.{name}", value.detach()) for name, value in narrow.named_parameters()]
    save(tmp_path / "run", 1, pieces, {})
    model = WanModel(WanConfig(**SMALL, **IMAGES))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"CKPT-011.*18 missing.*patch_embedding.weight is \[24, 16, "):
        load_into(model, open_weights(tmp_path / "run"))
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_the_order_in_which_a_folder_is_listed_is_no_matter(original, pipeline, tmp_path, monkeypatch):  # noqa: F811
    listed = Path.glob

    def backwards(self, pattern, **options):
        return iter(sorted(listed(self, pattern, **options), reverse=True))

    expected = open_weights(original)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", backwards)
        source = open_weights(pipeline)
        found = {name: source.read(name).clone() for name in source.shapes()}
    assert len({name.split(".")[1] for name in found if name.startswith("blocks.")}) == NUM_LAYERS
    assert_same_bits(found, {name: expected.read(name) for name in expected.shapes()})


@pytest.mark.parametrize("before", ["release", "1000000", "1\n", ""])
def test_the_tracker_holds_the_step_and_nothing_of_what_was_there(tmp_path, before):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text(before)
    save(tmp_path, 5, pieces_for(5), {})
    assert tracker.read_bytes() == b"5"
    assert find_latest(tmp_path, "strict") == tmp_path / "iter_0000005"


def test_old_checkpoints_are_deleted_once_by_one_of_the_ranks(tmp_path, caplog):
    def steps(comm):
        for step in range(1, 6):
            save(tmp_path, step, pieces_for(step) if comm.rank == 0 else [], {}, comm, keep_latest=2)

    as_ranks(4, steps)
    assert names(tmp_path) == ["iter_0000004", "iter_0000005", "latest_checkpointed_iteration.txt"]
    assert_holds(find_latest(tmp_path), 5)
    assert "could not be deleted" not in caplog.text


def test_names_that_only_look_like_checkpoints(tmp_path):
    """A step is what the whole name says; a file, a prefix, an ending or another number of digits is none."""
    save(tmp_path, 3, pieces_for(3), {})
    for name in ("old-iter_0000900", "iter_0000900-copy", "iter_900", "iter_00000900", "ckpt-900", "iter_000090x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text((tmp_path / "iter_0000003" / "manifest.json").read_text())
    (tmp_path / "iter_0000900.safetensors").write_bytes(b"")
    (tmp_path / "iter_0000901").write_bytes(b"")
    assert find_latest(tmp_path, "strict") == tmp_path / "iter_0000003"
    save(tmp_path, 4, pieces_for(4), {}, keep_latest=1)
    assert not (tmp_path / "iter_0000003").exists()
    assert len(names(tmp_path)) == 2 + 6 + 2, "something of another name was deleted"
