"""config.json of the Wan family in each system's words: written, read again with and without the tensors beside it, and
taken by diffusers' classes where it has the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from mm.config.model import WanConfig, of_task
from mm.config.tasks.registry import TASKS
from mm.errors import DataError
from mm.wan.config_json import infer_config, read_config, wan_config_to_diffusers, wan_config_to_original
from mm.wan.model import whole_shapes
from mm.wan.names import native_to_diffusers

BASE = WanConfig(text_dim=24, hidden_size=256, ffn_dim=96, num_heads=2, num_layers=4, freq_dim=32)
SMALL = {"img_dim": 40, "vace_layers": (0, 2)}
WIDE = BASE.model_copy(update={"in_dim": 48, "out_dim": 48})


def of(task: str) -> WanConfig:
    declared = TASKS[task]
    sizes = {name: SMALL[name] for name in declared.sizes if name in SMALL}
    return of_task(BASE if declared.latent_channels is None else WIDE, declared, **sizes)


def write(folder: Path, values: dict[str, object]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "config.json"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("words", [wan_config_to_original, wan_config_to_diffusers])
def test_what_is_written_is_read_again(task: str, words, tmp_path: Path) -> None:
    config = of(task)
    path = write(tmp_path, words(config))
    assert read_config(path, whole_shapes(config)) == config
    if (task, words) != ("flf2v", wan_config_to_original):  # whose number of tokens the released models fix
        assert read_config(path) == config


@pytest.mark.parametrize("task", ["fun_control", "vace", "wan22_i2v", "ti2v"])
def test_diffusers_has_the_model(task: str) -> None:
    config = of(task)
    cls = WanVACETransformer3DModel if task == "vace" else WanTransformer3DModel
    with torch.device("meta"):
        theirs = cls.from_config(wan_config_to_diffusers(config)).state_dict()
    assert {n: tuple(v.shape) for n, v in theirs.items() if not n.endswith("norm_added_q.weight")} == {
        native_to_diffusers(name): shape for name, shape in whole_shapes(config).items()
    }


@pytest.mark.parametrize("task", TASKS)
def test_the_tensors_tell_the_task(task: str, tmp_path: Path) -> None:
    config = of(task)
    found = infer_config(whole_shapes(config), tmp_path)
    assert found == config.model_copy(update={"clip_token_len": found.clip_token_len})


RELEASED = {
    "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": 5120, "eps": 1e-06, "ffn_dim": 13824,
    "freq_dim": 256, "in_dim": 36, "model_type": "i2v", "num_heads": 40, "num_layers": 40, "out_dim": 16,
    "text_len": 512,
}  # fmt: skip
"""Wan2.2-I2V-A14B's, which is word for word that of Wan2.1-I2V-14B."""


def test_the_tensors_say_what_a_file_leaves_open(tmp_path: Path) -> None:
    path = write(tmp_path, RELEASED)
    for task in ("i2v", "wan22_i2v"):
        config = of_task(WanConfig(hidden_size=5120, ffn_dim=13824, num_heads=40, num_layers=40), TASKS[task])
        assert read_config(path, whole_shapes(config)) == config


@pytest.mark.parametrize(
    ("task", "change", "id", "words"),
    [
        ("fun_control_ref", {"add_ref_conv": False}, None, "fun_control"),  # and its tensors are then one too many
        ("fun_camera", {"in_dim_control_adapter": 6}, "DATA-026", "in_dim_control_adapter"),
        ("fun_camera", {"in_dim": 48}, "DATA-026", "48 input channels"),
        ("vace", {"vace_layers": [0, 4]}, "DATA-027", "rising numbers from 0 to 3"),
        ("vace", {"vace_layers": [1, 2]}, "DATA-027", "0 among them"),
        ("ti2v", {"out_dim": 16, "in_dim": 16}, "DATA-027", "out_dim of ti2v models is 48"),
    ],
)
def test_files_that_contradict_themselves(task: str, change: dict, id: str | None, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, wan_config_to_original(of(task)) | change)
    if id is None:
        assert read_config(path, whole_shapes(of(task))).model_type == words
        return
    with pytest.raises(DataError, match=words) as caught:
        read_config(path)
    assert caught.value.id == id
