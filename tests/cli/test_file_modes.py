"""The umask alone decides who may read and write what the program makes, in every stage."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from extracted import extract

from mm.cli import convert, doctor_data, generate, plot, score, train
from mm.cli import demo as demo_command
from mm.config.flags import as_words

TINY = "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.nightly
@pytest.mark.parametrize("mask", [0o002, 0o077, 0o027])
def test_all_that_is_written_has_the_mode_of_the_umask(mask: int, tmp_path: Path) -> None:
    home, run, lora = tmp_path / "demo", tmp_path / "run", tmp_path / "lora"
    configs = home / "configs"
    data, model = configs / "feature_data.json", configs / "pretrain_model.json"
    training = {
        "mm_data": data, "mm_model": model, "lr": 1e-3, "train_iters": 1, "num_workers": 0, "no_progress_bar": True
    }  # fmt: skip
    adapters = {"load_base_model": home / TINY, "lora_r": 2, "lora_alpha": 2, "lora_target_modules": ["q"]}
    with umask(mask):
        demo_command.main(["--out", str(home)])
        extract(configs)
        doctor_data.main(
            as_words({"mm_data": data, "mm_model": model, "output": tmp_path / "checked", "num_workers": 1})
        )
        train.main(as_words({**training, "load": home / TINY, "save": run, "ema_decay": 0.9}))
        train.main(as_words({**training, **adapters, "save": lora}))
        conversions = [
            ("convert_to_mm", run, "mm"), ("convert_to_hf", run, "hf"), ("convert_to_native", run, "native"),
            ("lora_to_hf", lora, "adapters/a.safetensors"), ("lora_to_mm", lora, "lora_mm"),
            ("zero_to_bf16", run, "bf16"),
        ]  # fmt: skip
        for mode, source, target in conversions:
            convert.main(as_words({"mode": mode, "source_path": source, "target_path": tmp_path / target}))
        (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
        clips = {"save_path": tmp_path / "clips" / "new", "prompt": tmp_path / "prompts.txt", "num_inference_steps": 1}
        generate.main(as_words({"mm_model": configs / "inference_model.json", **clips, "no_progress_bar": True}))
        score.main(as_words({"videos": clips["save_path"], "prompts": clips["prompt"], "sheet": tmp_path / "s.png"}))
        plot.main([str(run)])
    found = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(found) > 120
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path, mode in found.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert not wrong
