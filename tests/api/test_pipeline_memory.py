"""Host memory that loading a pipeline takes beside what stays: no more than one shard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released import COMMON, write_common_files
from safetensors.torch import save_file

from mm.config.model import WanConfig
from mm.wan.config_json import wan_config_to_original
from mm.wan.model import whole_shapes

WIDE = WanConfig(
    model_type="t2v", text_dim=64, in_dim=16, hidden_size=512, ffn_dim=2048, num_heads=4, num_layers=8, freq_dim=32
)
SHARDS = 8
LOAD = """
import sys, threading, time, torch
from mm import ModelConfig, WanVideoPipeline
import mm.api

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) * 1024

def configs():
    id = "Wan-AI/Wan2.1-T2V-1.3B"
    patterns = "diffusion_pytorch_model*.safetensors", "models_t5*.pth", "Wan2.1_VAE.pth"
    return [ModelConfig(model_id=id, origin_file_pattern=pattern) for pattern in patterns]

before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
pipe = WanVideoPipeline.from_pretrained(
    torch_dtype=torch.float32, device="cpu", model_configs=configs(), local_model_path=sys.argv[1], skip_download=True
)
stays = anonymous()
done = True
thread.join()
print(peak - before, stays - before)
"""


@pytest.mark.nightly
def test_one_shard_at_most(tmp_path: Path) -> None:
    write_common_files(tmp_path)
    home, source = tmp_path / COMMON, torch.Generator().manual_seed(0)
    shapes = whole_shapes(WIDE)
    names = list(shapes)
    for index in range(SHARDS):
        part = {name: torch.randn(shapes[name], generator=source) for name in names[index::SHARDS]}
        save_file(part, home / f"diffusion_pytorch_model-{index + 1:05d}-of-{SHARDS:05d}.safetensors")
    (home / "config.json").write_text(json.dumps(wan_config_to_original(WIDE)))
    sizes = [file.stat().st_size for file in home.glob("*.safetensors")]
    words = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    peak, stays = map(int, done.stdout.split())
    assert stays > sum(sizes) * 0.9  # the weights themselves: the measure sees them
    assert peak - stays < max(sizes), (peak, stays, sizes)
