"""The training command on the embedded default: accumulation, precision, metrics, refusals."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published_names import diffusers_to_native
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from training_runs import WEIGHTS, bits, run

from mm.cli import plot as plot_command
from mm.config.model import WAN_1_3B, WanConfig, of_task
from mm.config.tasks.registry import TASKS
from mm.diffusion.flow import FlowMatching
from mm.errors import CheckpointError, ConfigError, DataError, NumericsError
from mm.train import closed_step
from mm.train.flops import train_flops
from mm.wan.model import WanModel

FIELDS = [
    "step", "loss", "loss_hex", "grad_norm", "grad_norm_hex", "lr", "consumed_samples", "tokens_per_s", "tflops",
    "peak_memory_gb", "step_time_s", "skipped", "tokens", "token_pairs", "timesteps", "sample_losses", "loss_mean",
]  # fmt: skip


def test_metrics_of_every_step(demo: Path, tmp_path: Path) -> None:
    rows = run(demo, tmp_path, train_iters=3, lr_warmup_iters=2)
    assert [list(row) for row in rows] == [FIELDS] * 3
    assert [row["lr"] for row in rows] == [0.0, 5e-4, 1e-3]
    assert [row["consumed_samples"] for row in rows] == [4, 8, 12]
    for row in rows:
        assert float.fromhex(row["loss_hex"]) == row["loss"]
        assert float.fromhex(row["grad_norm_hex"]) == row["grad_norm"]
        tokens = 4 * 3 * 4 * 4  # samples x latent frames x patches
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_time_s"])
    assert list((tmp_path / "tensorboard").glob("events*"))
    plot_command.main(["--run", str(tmp_path)])
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_accumulation_equals_one_large_batch(demo: Path, tmp_path: Path) -> None:
    whole = run(demo, tmp_path / "a", train_iters=3, micro_batch_size=8)
    parts = run(demo, tmp_path / "b", train_iters=3, micro_batch_size=2, global_batch_size=8)
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_the_seed_decides_and_nothing_else(demo: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = run(demo, tmp_path / "a", train_iters=2)
    torch.manual_seed(2)
    assert bits(run(demo, tmp_path / "b", train_iters=2, num_workers=2)) == bits(first)
    assert bits(run(demo, tmp_path / "c", train_iters=2, seed=5)) != bits(first)


def test_steps_take_the_noise_that_readers_drew(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:  # a step draws for itself what it is not given
        steps = closed_step.step_batches
        patch.setattr(
            closed_step, "step_batches", lambda *args, **options: steps(*args, **{**options, "with_noise": False})
        )
        expected = bits(run(demo, tmp_path / "a", train_iters=3))
    monkeypatch.setattr(FlowMatching, "draw_noise", None)
    assert bits(run(demo, tmp_path / "b", train_iters=3, num_workers=1)) == expected


def test_masters_keep_the_weights_that_bf16_would_round(demo: Path, tmp_path: Path) -> None:
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    content["predictor"]["dtype"] = "bf16"
    (tmp_path / "m.json").write_text(json.dumps(content))
    run(demo, tmp_path / "run", train_iters=1, bf16=True, lr=1e-12, weight_decay=0, mm_model=tmp_path / "m.json")
    saved = load_file(tmp_path / "run" / "iter_0000001" / "shard-00000-of-00001.safetensors")
    source = load_file(demo / WEIGHTS / "diffusion_pytorch_model.safetensors")
    rounded = 0
    for name, tensor in source.items():
        master = saved[f"model.{diffusers_to_native(name)}"]
        assert master.dtype == torch.float32
        assert (master - tensor).abs().max() <= 1e-10  # the step itself moves a weight by at most lr
        rounded += int(not torch.equal(tensor, tensor.bfloat16().float()))
    assert rounded > 50


def test_a_loss_that_is_not_finite_changes_no_weight(demo: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_bytes((demo / WEIGHTS / "config.json").read_bytes())
    tensors = load_file(demo / WEIGHTS / "diffusion_pytorch_model.safetensors")
    tensors["blocks.1.ffn.net.2.bias"][3] = math.inf
    save_file(tensors, weights / "diffusion_pytorch_model.safetensors")
    with pytest.raises(NumericsError, match="NUM-001") as caught:
        run(demo, tmp_path / "run", train_iters=2, load=weights)
    assert caught.value.exit_code == 17
    assert "videos/" in str(caught.value)
    assert not list((tmp_path / "run").glob("iter_*"))


@pytest.mark.parametrize(
    ("flags", "error", "expected"),
    [
        ({"load": "nowhere"}, DataError, "DATA-020"),
        ({"device": "npu"}, ConfigError, "CFG-030"),
        ({"tensor_model_parallel_size": 2}, ConfigError, "CFG-032"),
        ({"global_batch_size": 6}, ConfigError, "CFG-021"),
    ],
)
def test_refusals(demo: Path, tmp_path: Path, flags: dict, error: type, expected: str) -> None:
    with pytest.raises(error, match=expected):
        run(demo, tmp_path / "run", train_iters=1, **flags)
    assert not list(tmp_path.glob("run/iter_*"))


def test_a_weight_too_many_and_one_too_few(demo: Path, tmp_path: Path) -> None:
    tensors = load_file(demo / WEIGHTS / "diffusion_pytorch_model.safetensors")
    del tensors["blocks.0.norm2.weight"]
    tensors["blocks.4.norm2.weight"] = torch.zeros(128)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_bytes((demo / WEIGHTS / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="CKPT-011") as caught:
        run(demo, None, train_iters=1, load=tmp_path)
    assert "blocks.0.norm3.weight" in str(caught.value)
    assert "blocks.4.norm3.weight" in str(caught.value)


def test_from_scratch(demo: Path, tmp_path: Path) -> None:
    rows = run(demo, tmp_path, train_iters=2, load=None, init_from_scratch=True)
    # Wan's head starts at zero: the first prediction is 0, so the loss is the target's mean square, near 2
    assert 1.5 < rows[0]["loss"] < 2.5


def test_flops_are_the_counted_ones_plus_attention() -> None:
    """torch counts matrix products but not the CPU's attention, so what it counts must equal the linear terms."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    config = WanConfig(text_len=6, text_dim=8, hidden_size=32, ffn_dim=48, num_heads=2, num_layers=1)
    tokens, d, c = 12, 32, 6
    block = WanTransformerBlock(32, 48, 2, cross_attn_norm=True)
    rotary = WanRotaryPosEmbed(16, (1, 1, 1), 64)(torch.zeros(1, 16, 1, 3, 4))
    with FlopCounterMode(display=False) as counter:
        block(torch.zeros(1, tokens, d), torch.zeros(1, c, d), torch.zeros(1, 6, d), rotary)
    attention = 4 * tokens * tokens * d + 4 * tokens * c * d
    assert train_flops(config, tokens) == 3 * (counter.get_total_flops() + attention)


def test_flops_of_a_block_with_images() -> None:
    """diffusers tells the images by what is in front of 512 text tokens."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    shape = {"text_dim": 8, "hidden_size": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 1}
    config = WanConfig(model_type="flf2v", in_dim=36, img_dim=8, clip_token_len=3, **shape)
    tokens, d, c = 12, 32, 512 + 6
    block = WanTransformerBlock(32, 48, 2, cross_attn_norm=True, added_kv_proj_dim=32)
    rotary = WanRotaryPosEmbed(16, (1, 1, 1), 64)(torch.zeros(1, 16, 1, 3, 4))
    with FlopCounterMode(display=False) as counter:
        block(torch.zeros(1, tokens, d), torch.zeros(1, c, d), torch.zeros(1, 6, d), rotary)
    attention = 4 * tokens * tokens * d + 4 * tokens * c * d
    assert train_flops(config, tokens) == 3 * (counter.get_total_flops() + attention)


@pytest.mark.parametrize(
    ("task", "sizes"),
    [("vace", {"vace_layers": (0, 2)}), ("fun_control_ref", {"img_dim": 8, "clip_token_len": 3})],
)
def test_flops_of_a_model_with_all_that_its_blocks_see(task: str, sizes: dict[str, Any]) -> None:
    """Of the model itself; what is outside of blocks is counted by hand and taken off."""
    shape = WanConfig(text_len=6, text_dim=8, hidden_size=32, ffn_dim=48, num_heads=2, num_layers=3, freq_dim=8)
    config, size = of_task(shape, TASKS[task], **sizes), (2, 6, 8)
    model = WanModel(config)
    features = {name: torch.zeros(1, *each) for name, each in config.feature_shapes(size).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.velocity(torch.zeros(1, 16, *size), torch.zeros(1), torch.zeros(1, 6, 8), **features)
    of_modules = {name.removeprefix("WanModel."): sum(each.values()) for name, each in counter.flop_counts.items()}
    of_blocks = sum(flops for name, flops in of_modules.items() if re.fullmatch(r"(vace_)?blocks\.\d+", name))
    assert of_blocks > 0
    tokens, d, c = config.num_tokens(size), 32, 6 + config.image_tokens
    attention = (3 + len(config.side_blocks)) * (4 * tokens * tokens * d + 4 * tokens * c * d)
    assert train_flops(config, tokens) == 3 * (of_blocks + attention)


def test_flops_of_the_published_shape() -> None:
    assert train_flops(WAN_1_3B, 32_760) == pytest.approx(0.849e15, rel=1e-3)
