"""`mm generate` and `generate_videos` with weights that wait outside of the device."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_runs import LAYERZERO, failure, generate, generate_here
from kept_frames import keeping_frames, largest_difference
from ranks import run_ranks

import mm
import mm.generate.held
import mm.generate.render
import mm.generate.run
from mm.checkpoint.weights import open_weights
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter
from mm.lora.targets import linears_of
from mm.residency.hold import HeldWeights
from mm.wan.encoders import TextEncoder


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[HeldWeights]:
    """Where the weights of each transformer were."""
    found: list[HeldWeights] = []

    def kept(*words: Any, **more: Any) -> HeldWeights:
        found.append(hold(*words, **more))
        return found[-1]

    hold = mm.generate.held.hold_weights
    monkeypatch.setattr(mm.generate.held, "hold_weights", kept)
    return found


def test_clips_are_those_of_a_model_on_the_device(workplace: Path, weights: Path, held: list[HeldWeights]) -> None:
    waiting = ["--staying-parameters", "0", "--host-memory-limit", "2500KiB"]
    with keeping_frames(mm.generate.run):
        generate(weights, "--save-path", "plain")
        generate(weights, "--save-path", "waiting", *waiting)
        generate(weights, "--save-path", "fp8", *waiting, "--fp8-weights", "scaled")
    plain, streamed, fp8 = held
    assert plain.stream is None
    assert streamed.stream is not None and streamed.stream.out_of_turn == 0 and streamed.plan.from_files
    assert fp8.device_bytes < streamed.device_bytes < plain.device_bytes
    assert largest_difference(Path("plain"), Path("waiting")) == 0
    assert largest_difference(Path("plain"), Path("fp8")) > 0
    said = [json.loads(Path(folder, "video_0000.json").read_text()) for folder in ("plain", "waiting", "fp8")]
    assert said[0] == said[1]
    assert said[2]["transformer"]["fp8"] == "scaled"
    assert said[2]["transformer"]["fingerprint"] != said[0]["transformer"]["fingerprint"]


WAITING = {
    "host": ["--staying-parameters", "0"],
    "files": ["--staying-parameters", "0", "--host-memory-limit", "2500KiB"],
}


def write_lora(path: str, weights: Path, seed: int = 2) -> str:
    """An adapter of some linears of every block that moves clips."""
    sizes = linears_of(open_weights(weights / "transformer").shapes())
    source = torch.Generator().manual_seed(seed)
    updates = {
        name: Update(torch.randn(4, columns, generator=source), 0.1 * torch.randn(rows, 4, generator=source), 8.0)
        for name, (rows, columns) in sizes.items()
        if name.endswith(("self_attn.q", "ffn.2"))
    }
    write_adapter(Path(path), Adapter(updates), "peft")
    return path


def test_a_lora_is_added_to_weights_that_wait(workplace: Path, weights: Path, held: list[HeldWeights]) -> None:
    """Also to those that are read from files again in each forward."""
    Path("prompts.txt").write_text("a red disc")
    lora = ["--lora", write_lora("lora.safetensors", weights), "--lora-strength", "0.5"]
    with keeping_frames(mm.generate.run):
        generate(weights, "--save-path", "without")
        generate(weights, "--save-path", "plain", *lora)
        for name, words in WAITING.items():
            generate(weights, "--save-path", name, *lora, *words)
    assert largest_difference(Path("without"), Path("plain")) > 5
    assert held[-1].plan.from_files and held[-2].stream is not None and not held[-2].plan.from_files
    for name in WAITING:
        assert largest_difference(Path("plain"), Path(name)) == 0
        said = [json.loads(Path(folder, "video_0000.json").read_text()) for folder in ("plain", name)]
        assert said[0] == said[1] and said[0]["lora"]


@pytest.mark.nightly
@pytest.mark.parametrize("words", [["--context-parallel-size", "2"], ["--tensor-model-parallel-size", "2"]])
def test_a_lora_and_weights_that_wait_on_two_processes(workplace: Path, weights: Path, words: list[str]) -> None:
    Path("prompts.txt").write_text("a red disc")
    lora, folder = ["--lora", write_lora("lora.safetensors", weights)], str(weights / "transformer")
    run_ranks(2, generate_here, str(workplace), folder, [*words, *lora, "--save-path", "plain"])
    for name, more in WAITING.items():
        run_ranks(2, generate_here, str(workplace), folder, [*words, *lora, *more, "--save-path", name])
        assert largest_difference(Path("plain"), Path(name)) == 0


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (["--device-memory-limit", "much", "--host-memory-limit", "lots"], ["CFG-371", "CFG-371"]),
        (["--device-memory-limit", "1GiB", "--staying-parameters", "5"], ["CFG-372"]),
        (["--device-memory-buffer", "1GiB", "--host-memory-limit", "1GiB"], ["CFG-372", "CFG-372"]),
        (["--device-memory-limit", "1MiB", "--device-memory-buffer", "0B"], ["CFG-373"]),
        (["--staying-parameters", "0", "--host-memory-limit", "10KiB"], ["CFG-374"]),
        ([*LAYERZERO, "--fp8-weights", "scaled"], ["CFG-375"]),
    ],
)
def test_limits_that_cannot_be(workplace: Path, weights: Path, capfd: Any, words: list[str], ids: list[str]) -> None:
    Path("zero.yaml").write_text("zero3_size: 1\n")
    assert failure(capfd, "--load", str(weights / "transformer"), *words)[1] == ids
    assert not list(Path().glob("clips/*"))


def test_the_text_encoder_has_left_before_the_transformer_comes(
    workplace: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[Any] = []
    alive: list[int] = []
    load, hold = TextEncoder.from_pretrained, mm.generate.held.hold_weights

    def loaded(*words: Any, **more: Any) -> TextEncoder:
        encoder = load(*words, **more)
        encoders.extend(weakref.ref(parameter) for parameter in encoder.model.parameters())
        return encoder

    def counted(*words: Any, **more: Any) -> Any:
        gc.collect()
        alive.append(sum(reference() is not None for reference in encoders))
        return hold(*words, **more)

    monkeypatch.setattr(TextEncoder, "from_pretrained", loaded)
    monkeypatch.setattr(mm.generate.held, "hold_weights", counted)
    generate(weights)
    assert encoders and alive == [0]


def test_the_api_takes_the_same(weights: Path) -> None:
    def velocity(**more: Any) -> torch.Tensor:
        model = mm.load_model(weights / "transformer", dtype="fp32", device="cpu", **more)
        source = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return model.velocity(
                torch.randn(1, 16, 3, 4, 6, generator=source),
                torch.tensor([500.0]),
                torch.randn(1, 8, model.config.text_dim, generator=source),
            )

    expected = velocity()
    for asked in (
        mm.Residency(staying_parameters=0),
        mm.Residency(staying_parameters=0, host_limit="2500KiB"),
        mm.Residency(device_limit="2GiB"),
    ):
        assert torch.equal(velocity(residency=asked), expected)
    with pytest.raises(mm.errors.ConfigError, match="CFG-372"):
        velocity(residency=mm.Residency(host_limit="1GiB"))
