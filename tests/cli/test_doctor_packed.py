"""What `mm doctor` says of runs that pack samples into sequences."""

import json
from pathlib import Path
from typing import Any

import pytest
from mixed_store import write_mixed

from mm.cli import doctor
from mm.config.flags import as_words
from mm.errors import ConfigError

WEIGHTS = "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"
TOKENS = 3 * 4 * 4
"""Of the embedded default's clips."""


def words(demo: Path, **flags: Any) -> list[str]:
    files = {"mm_data": demo / "configs" / "feature_data.json", "mm_model": demo / "configs" / "pretrain_model.json"}
    sizes = {"micro_batch_size": 1, "global_batch_size": 8, "lr": 1e-3, "train_iters": 4, "load": demo / WEIGHTS}
    return as_words({**files, **sizes, "json_output": True, **flags})


def dry_run(demo: Path, capsys: pytest.CaptureFixture[str], **flags: Any) -> Any:
    doctor.main(words(demo, dry_run=True, **flags))
    return json.loads(capsys.readouterr().out)


@pytest.mark.nightly
def test_a_dry_run_packs_as_many_clips_as_fit(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sequences of two clips, four of them in a step of eight; with interleaved stages a multiple of PP."""
    whole, packed, longer = (
        dry_run(demo, capsys, world_size=4, context_parallel_size=2, pipeline_model_parallel_size=2, **budget)
        for budget in ({}, {"pack": 2 * TOKENS + 1}, {"pack": 3 * TOKENS})
    )
    assert [report["samples"] for report in (whole, packed, longer)] == [1, 2, 3]
    assert [report["rank_tokens"] for report in (whole, packed, longer)] == [TOKENS // 2, TOKENS, 3 * TOKENS // 2]
    sent = [{(row["axis"], row["operation"]): row for row in report["traffic"]} for report in (whole, packed, longer)]
    assert [of["pp", "send"]["calls"] for of in sent] == [8, 4, 3]
    assert sent[0]["ulysses", "all-to-all"]["bytes"] == sent[1]["ulysses", "all-to-all"]["bytes"], "as many tokens"
    assert sent[0]["ulysses", "all-to-all"]["calls"] == 2 * sent[1]["ulysses", "all-to-all"]["calls"]
    assert packed["peak"]["activations"] == pytest.approx(2 * whole["peak"]["activations"], rel=0.25)
    interleaved = dry_run(
        demo, capsys, world_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
        pack=3 * TOKENS,
    )  # fmt: skip
    assert interleaved["bubble"] == pytest.approx(1 / (2 * 4 + 1)), "four sequences, not three"


@pytest.mark.nightly
def test_a_sample_that_is_longer_than_a_sequence(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="CFG-207: A sample of these latents has 64 tokens, more than --pack 50"):
        doctor.main(words(demo, dry_run=True, pack=50, latent_size=[4, 8, 8]))
    with pytest.raises(ConfigError, match="CFG-127: features: DATA-077: 2 samples with latents") as caught:
        doctor.main(words(demo, pack=60, mm_data=write_mixed(demo, tmp_path)))
    assert [problem.message.split(":")[0] for problem in caught.value.problems] == ["features"]
    assert not json.loads(capsys.readouterr().out)["ready"]


@pytest.mark.nightly
def test_samples_of_several_sizes_may_cross_a_packed_pipeline(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"mm_data": write_mixed(demo, tmp_path), "world_size": 2, "pipeline_model_parallel_size": 2}
    doctor.main(words(demo, **flags, pack=100))
    found = {row["check"]: row["verdict"] for row in json.loads(capsys.readouterr().out)["findings"]}
    assert found["features"] == "ok"
