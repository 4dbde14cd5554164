"""Adapters in MindSpeed-MM's checkpoints: its keys, alpha beside them, and its own training saves."""

import argparse
import json

import pytest
import torch
from lora_example import CONFIG, adapter
from safetensors.torch import load_file, save_file

from mm.checkpoint.weights import open_weights
from mm.cli.convert import main
from mm.cli.entry import run
from mm.errors import CheckpointError, DataError
from mm.lora.adapter import Adapter, Update
from mm.lora.convert import read_any
from mm.lora.mindspeed import write_mindspeed

MM_NAMES = {  # the published key map
    "self_attn.q": "self_attn.proj_q", "self_attn.k": "self_attn.proj_k", "self_attn.v": "self_attn.proj_v",
    "self_attn.o": "self_attn.proj_out", "cross_attn.q": "cross_attn.proj_q", "cross_attn.k": "cross_attn.proj_k",
    "cross_attn.v": "cross_attn.proj_v", "cross_attn.o": "cross_attn.proj_out", "ffn.0": "ffn.0", "ffn.2": "ffn.2",
}  # fmt: skip


def ours():
    return Adapter({name: Update(*plain) for name, plain in adapter().items()}, {"base_model": "x"})


def their_state():
    """PEFT's keys over MindSpeed-MM's names."""
    state = {}
    for name, (a, b, _) in adapter().items():
        _, block, linear = name.split(".", 2)
        module = f"blocks.{block}.{MM_NAMES[linear]}"
        state |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
    return state


def test_the_file_is_what_mindspeed_mm_loads(tmp_path):
    write_mindspeed(tmp_path / "mm", ours())
    assert (tmp_path / "mm" / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    content = torch.load(tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
    assert content["checkpoint_version"] == 3.0
    assert content["model"].keys() == their_state().keys()
    assert all(torch.equal(content["model"][name], value) for name, value in their_state().items())
    assert [path.name for path in (tmp_path / "mm" / "release").iterdir()] == ["mp_rank_00"]
    again = read_any(tmp_path / "mm")
    assert again.adapted() == ours().adapted()  # r and alpha of every linear
    assert again.texts == {"base_model": "x"}
    assert all(torch.equal(again.parameters()[name], value) for name, value in ours().parameters().items())


def training_save(root, state, **extra):
    file = root / "iter_0000300" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save({"model": state, "checkpoint_version": 3.0, "iteration": 300, **extra}, file)
    (root / "latest_checkpointed_iteration.txt").write_text("300")


@pytest.mark.parametrize("alpha", [16, None])
def test_a_training_save_is_read_with_the_alpha_of_its_arguments(tmp_path, caplog, alpha):
    extra = {} if alpha is None else {"args": argparse.Namespace(lora_r=8, lora_alpha=alpha)}
    training_save(tmp_path / "run", their_state(), **extra)
    found = read_any(tmp_path / "run")
    assert {u.alpha / u.rank for u in found.updates.values()} == {
        1.0 if alpha is None else alpha / u.rank for u in found.updates.values()
    }
    assert ("does not say alpha" in caplog.text) == (alpha is None)


def test_modes_lead_there_and_back(tmp_path):
    words = ["--mode", "lora_to_comfyui", "--source_path", str(tmp_path / "mm"), "--target_path"]
    write_mindspeed(tmp_path / "mm", ours())
    assert run(main, [*words, str(tmp_path / "a.safetensors")]) == 0
    back = ["--mode", "lora_to_mm", "--source_path", str(tmp_path / "a.safetensors"), "--target_path"]
    assert run(main, [*back, str(tmp_path / "mm2")]) == 0
    files = [tmp_path / folder / "release" / "mp_rank_00" / "model_optim_rng.pt" for folder in ("mm", "mm2")]
    first, second = (torch.load(file, weights_only=True)["model"] for file in files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_any(tmp_path / "mm2").adapted() == ours().adapted()
    words = ["--mode", "lora_to_hf", "--source_path", str(tmp_path / "mm2"), "--target_path"]
    assert run(main, [*words, str(tmp_path / "b.safetensors")]) == 0
    assert len(load_file(tmp_path / "b.safetensors")) == len(first)
    assert run(main, [*back, str(tmp_path / "mm2")]) == 74


def test_adapters_are_no_model_and_a_model_is_no_adapter(tmp_path):
    write_mindspeed(tmp_path / "mm", ours())
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path / "mm")
    assert caught.value.id == "CKPT-084"
    training_save(tmp_path / "run", {"head.modulation": torch.ones(1)})
    with pytest.raises(DataError) as refused:
        read_any(tmp_path / "run")
    assert refused.value.id == "DATA-090"


def test_inspect_tells_an_adapter(tmp_path, capsys):
    write_mindspeed(tmp_path / "mm", ours())
    save_file({f"diffusion_model.{k}": v for k, v in plain_comfyui().items()}, tmp_path / "x.safetensors")
    for path in (tmp_path / "mm", tmp_path / "x.safetensors"):
        assert run(main, ["--mode", "inspect", "--source_path", str(path), "--json_output"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["format"] == "a LoRA adapter"
        assert found["num_tensors"] == 2 * len(adapter())
        assert found["model"].startswith(f"{len(adapter())} linears, r 2, 3, 4, alpha ")
        assert found["num_parameters"] == sum(a.numel() + b.numel() for a, b, _ in adapter().values())
    assert len(adapter()) == 10 * CONFIG.num_layers


def plain_comfyui():
    parts = {}
    for name, (a, b, alpha) in adapter().items():
        parts |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(alpha)}
    return parts


KEY = "blocks.0.self_attn.proj_q.lora_A.default.weight"
BAD = {
    "half": (lambda s: s.pop(KEY), "DATA-091"),
    "unknown": (lambda s: s.update({"blocks.0.surprise.lora_A.default.weight": torch.ones(1, 1)}), "DATA-091"),
    "base": (lambda s: s.update({"blocks.0.ffn.0.base_layer.weight": torch.ones(1, 1)}), "DATA-091"),
    "shape": (lambda s: s.update({KEY: torch.ones(9, 24)}), "DATA-092"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_plain_lora_is_refused(tmp_path, bad):
    change, identifier = BAD[bad]
    state = their_state()
    change(state)
    training_save(tmp_path, state)
    with pytest.raises(DataError) as caught:
        read_any(tmp_path)
    assert caught.value.id == identifier


def test_alpha_is_found_where_earlier_versions_wrote_it(tmp_path):
    write_mindspeed(tmp_path / "mm", ours())
    (tmp_path / "mm" / "mm_lora.json").rename(tmp_path / "mm" / "release" / "mm_lora.json")
    assert read_any(tmp_path / "mm").adapted() == ours().adapted()


def test_alpha_of_a_release_is_not_that_of_a_later_training_save(tmp_path):
    write_mindspeed(tmp_path / "mm", ours())
    training_save(tmp_path / "mm", their_state(), args=argparse.Namespace(lora_alpha=16))
    assert {how.alpha for how in read_any(tmp_path / "mm").adapted().values()} == {16.0}
    assert read_any(tmp_path / "mm" / "release").adapted() == ours().adapted()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"folder": "release", "alpha": {}, "texts": {}}', '{"alpha": 1, "texts": {}}']
)
def test_a_damaged_record_is_refused(tmp_path, text):
    write_mindspeed(tmp_path / "mm", ours())
    (tmp_path / "mm" / "mm_lora.json").write_text(text)
    with pytest.raises((CheckpointError, DataError)) as caught:
        read_any(tmp_path / "mm")
    assert caught.value.id == ("DATA-092" if "{}, " in text else "CKPT-021")


SPLITS = {"pipeline": ((3, 2, 2),), "virtual": ((2, 1), (3, 1)), "thirteen stages": ((1,) * 13,)}


def of_blocks(count):
    """PEFT's keys over MindSpeed-MM's names for a model of so many blocks, every value another."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"blocks.{block}.{module}.lora_{half}.default.weight": torch.randn(shape, generator=generator)
        for block in range(count)
        for module in ("self_attn.proj_q", "ffn.0")
        for half, shape in (("A", (2, 6)), ("B", (6, 2)))
    }


def pipeline_save(root, split, *, leave_out=(), **extra):
    """Files as the ranks of a pipeline write them: blocks counted from 0, chunk v of rank p is stage v PP + p."""
    sizes = [size for row in split for size in row]
    state = of_blocks(sum(sizes))
    for rank in range(len(split[0])):
        models = {}
        for chunk in range(len(split)):
            place = chunk * len(split[0]) + rank
            start = sum(sizes[:place])
            models["model" if len(split) == 1 else f"model{chunk}"] = {
                name.replace(f"blocks.{block}.", f"blocks.{block - start}."): state[name]
                for block in range(start, start + sizes[place])
                for name in state
                if name.startswith(f"blocks.{block}.")
            }
        if rank not in leave_out:
            file = root / "iter_0000300" / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True)
            torch.save({**models, "checkpoint_version": 3.0, "iteration": 300, **extra}, file)
    (root / "latest_checkpointed_iteration.txt").write_text("300")
    return state


def arguments(ranks):
    return argparse.Namespace(lora_r=2, lora_alpha=8, pipeline_model_parallel_size=ranks)


@pytest.mark.parametrize("split", SPLITS)
def test_a_save_over_a_pipeline_is_that_of_one_file(tmp_path, split):
    state = pipeline_save(tmp_path / "cut", SPLITS[split], args=arguments(len(SPLITS[split][0])))
    training_save(tmp_path / "whole", state, args=argparse.Namespace(lora_r=2, lora_alpha=8))
    cut, whole = read_any(tmp_path / "cut"), read_any(tmp_path / "whole")
    assert cut.adapted() == whole.adapted()
    assert list(cut.parameters()) == list(whole.parameters())
    assert all(torch.equal(cut.parameters()[name], value) for name, value in whole.parameters().items())
    count = sum(size for row in SPLITS[split] for size in row)
    last = cut.parameters()[f"blocks.{count - 1}.self_attn.q.lora_B"]
    assert torch.equal(last, state[f"blocks.{count - 1}.self_attn.proj_q.lora_B.default.weight"])


def test_a_pipeline_with_a_rank_missing(tmp_path):
    for name, missing in (("middle", 1), ("last", 2)):
        pipeline_save(tmp_path / name, SPLITS["pipeline"], leave_out=(missing,), args=arguments(3))
        with pytest.raises(CheckpointError) as caught:
            read_any(tmp_path / name)
        assert caught.value.id == "CKPT-041"


@pytest.mark.parametrize("change", ["no blocks", "not from 0", "a hole"])
def test_stages_that_do_not_count(tmp_path, change):
    pipeline_save(tmp_path, SPLITS["pipeline"])
    file = tmp_path / "iter_0000300" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=True)
    new = {"no blocks": {}, "not from 0": {"blocks.0.": "blocks.2."}, "a hole": {"blocks.1.": "blocks.5."}}[change]
    model = {} if change == "no blocks" else content["model"]
    for before, after in new.items():
        model = {name.replace(before, after): value for name, value in model.items()}
    torch.save({**content, "model": model}, file)
    with pytest.raises(CheckpointError) as caught:
        read_any(tmp_path)
    assert caught.value.id == "CKPT-043"
