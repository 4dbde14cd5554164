"""What generation refuses before it writes a clip: configurations, parts, weights, prompts, layouts and adapters."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from generation_runs import EXAMPLES, LAYERZERO, contents, failure, settings
from safetensors.torch import save_file

from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter
from mm.wan.model import WanModel


@pytest.mark.parametrize(
    ("section", "change", "code", "ids"),
    [
        ("predictor", {"num_heads": 2}, 64, ["CFG-065"]),
        ("predictor", {"num_layers": 3, "ffn_dim": 256}, 64, ["CFG-065", "CFG-065"]),
        ("pipeline_config", {"input_size": [8, 32, 40]}, 64, ["CFG-060", "CFG-061"]),
        ("ae", {"from_pretrained": "nowhere"}, 65, ["DATA-040"]),
        ("text_encoder", {"from_pretrained": "nowhere"}, 65, ["DATA-040"]),
        ("tokenizer", {"from_pretrained": "nowhere"}, 65, ["DATA-043"]),
        ("ae", {"tiling_param": {"tile_size": [8, 8], "tile_stride": [4, 4]}}, 64, ["CFG-005"]),
    ],
)
def test_configurations_that_cannot_work(workplace, weights, capfd, section, change, code, ids):
    values = settings(weights)
    values[section] |= change
    Path("model.json").write_text(json.dumps(values))
    assert failure(capfd, "--load", str(weights / "transformer")) == (code, ids)
    assert not Path("clips").exists() or not contents("clips")


def test_parts_of_different_models(workplace, weights, capfd):
    values = settings(weights)
    values["predictor"] |= {"text_dim": 32}
    Path("model.json").write_text(json.dumps(values))
    model = WanModel(WanModel.from_pretrained(weights / "transformer").config.model_copy(update={"text_dim": 32}))
    model.init_weights(0)
    Path("other").mkdir()
    save_file(model.state_dict(), "other/model.safetensors")
    Path("other/config.json").write_text(json.dumps(model.config.model_dump(mode="json")))
    assert failure(capfd, "--load", "other") == (64, ["CFG-066"])


def test_a_vae_of_another_stride(workplace, weights, capfd):
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True]
    )
    vae.save_pretrained("vae")
    values = settings(weights)
    values["ae"]["from_pretrained"] = "vae"
    Path("model.json").write_text(json.dumps(values))
    assert failure(capfd, "--load", str(weights / "transformer")) == (65, ["DATA-055"])
    assert contents("clips") == {}


def test_weights_that_are_not_there(workplace, weights, capfd):
    assert failure(capfd, "--load", "nowhere")[0] in (65, 74)
    Path("empty").mkdir()
    assert failure(capfd, "--load", "empty")[0] in (65, 74)
    assert failure(capfd) == (64, ["CFG-062"])


def test_prompts_that_are_not_there(workplace, weights, capfd):
    assert failure(capfd, "--load", str(weights / "transformer"), "--prompt", "no.txt") == (65, ["DATA-053"])
    assert not Path("clips").exists()


def test_layouts_that_cannot_work(workplace, weights, capfd):
    load = ["--load", str(weights / "transformer")]
    assert failure(capfd, *load, "--tensor-model-parallel-size", "3") == (64, ["CFG-032", "CFG-033"])
    assert failure(capfd, *load, *LAYERZERO) == (64, ["CFG-001"])
    Path("zero.yaml").write_text("param_dtype: bf16\n")
    assert failure(capfd, *load, *LAYERZERO) == (64, ["CFG-045", "CFG-045"])
    assert failure(capfd, *load, "--pipeline-model-parallel-size", "2") == (64, ["CFG-008"])
    assert not Path("clips").exists()


def test_adapters_that_cannot_work(workplace, weights, capfd):
    load = ["--load", str(weights / "transformer")]
    assert failure(capfd, *load, "--lora", "a", "--lora-strength", "1", "2") == (64, ["CFG-122"])
    assert failure(capfd, *load, "--lora-strength", "1") == (64, ["CFG-122"])
    update = Update(torch.zeros(2, 64), torch.zeros(64, 2), 1.0)
    write_adapter(Path("other.safetensors"), Adapter({"blocks.0.self_attn.q": update}), "peft")
    assert failure(capfd, *load, "--lora", "other.safetensors") == (65, ["DATA-093"])


def test_a_script_hands_on_the_exit_code(workplace, weights):
    environment = os.environ | {"MM_MODEL": "model.json", "LOAD_PATH": str(weights / "transformer"), "PROMPT": "no.txt"}
    script = str(EXAMPLES / "1.3b/t2v/inference.sh")
    result = subprocess.run(["bash", script, "--device", "cpu"], env=environment, capture_output=True, text=True)
    assert result.returncode == 65
    assert "error DATA-053" in result.stderr
    assert "Traceback" not in result.stderr
