"""What is proposed to a run that is out of memory: legal, new, in the right order, and counted to need less."""

import itertools
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from translated import translated

from mm.config.base import parse
from mm.config.flags import parse_flags
from mm.config.layerzero import ZeroConfig
from mm.config.layout import layout_of
from mm.config.recompute import recompute_of
from mm.config.rules.training import check_training
from mm.config.run.training import TrainingRun
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.doctor.dry_run import DryRunJob, Report, dry_run
from mm.errors import ConfigError
from mm.lora.plan import plan_of
from mm.train.memory_advice import MemoryAdvice, advise
from mm.train.memory_breakdown import MemoryBreakdown
from mm.train.run import data_parallel_options, training_dtype

SHAPES: dict[str, dict[str, Any]] = {
    "1.3B": {"hidden_size": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    "14B": {"hidden_size": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "tiny": {"hidden_size": 96, "ffn_dim": 384, "num_heads": 12, "num_layers": 4, "text_dim": 16, "text_len": 8},
}
RECOMPUTE = "--recompute-granularity full --recompute-method"
LORA = "--lora-r 4 --lora-alpha 4 --lora-target-modules q k v o ffn.0 ffn.2 --load-base-model base"
LAYERZERO = "--layerzero --layerzero-config zero_config.yaml"
STEP = MemoryBreakdown("forward and backward", 3 * 10**9, 5 * 10**9, 5 * 10**9, 10**10, 4 * 10**10)
SPLITS = [
    STEP,
    MemoryBreakdown("forward and backward", 10**8, 10**9, 2 * 10**9, 3 * 10**9, 10**7),
    MemoryBreakdown("building the model", 10**9, parameters=10**9),
    MemoryBreakdown("building the model", 0),
    MemoryBreakdown("loading weights", 10**9, 10**9, 2 * 10**9, 10**9),
    MemoryBreakdown("the optimizer's update", 10**9, 10**9, 2 * 10**9, 3 * 10**9, 10**8, moments_to_come=4 * 10**9),
]


@cache
def command_line(words: str) -> TrainFlags:
    required = "--mm-data d.json --mm-model m.json --lr 1e-4 --train-iters 1"
    required += "" if "--lora" in words else " --init-from-scratch"
    return parse_flags(TrainFlags, shlex.split(f"{required} {words}"), program="mm train")


def request(
    words: str, world_size: int, zero3_size: int | None = None, shape: str = "tiny", **predictor: Any
) -> TrainingRun:
    """A run that the rules accept."""
    model = parse(PretrainModel, {"predictor": {**SHAPES[shape], **predictor}, "diffusion": {}}, "m.json")
    zero = ZeroConfig(zero3_size=zero3_size) if zero3_size else None
    run = translated(command_line(words), model, zero, world_size)
    check_training(run)
    return run


def many_runs() -> Iterator[tuple[str, TrainingRun]]:
    choices = itertools.product(
        (1, 8),
        ("", "--bf16"),
        ("--micro-batch-size 1", "--micro-batch-size 2 --global-batch-size 16"),
        ("", "--use-distributed-optimizer", LAYERZERO),
        ("", "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4 --sequence-parallel"),
        (
            "",
            "--context-parallel-size 2",
            "--context-parallel-size 4 --context-parallel-algo megatron_cp_algo",
            "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
        ),
        ("", "--pipeline-model-parallel-size 2"),
        (
            "",
            f"{RECOMPUTE} uniform",
            f"{RECOMPUTE} block --recompute-num-layers 2",
            "--recompute-granularity selective",
            f"{RECOMPUTE} block --recompute-num-layers 1 --recompute-skip-core-attention",
        ),
    )
    some = itertools.islice(
        itertools.product(choices, SHAPES), 0, None, 29
    )  # prime to all lengths: every choice occurs
    for (world_size, *words), shape in some:
        text = " ".join(filter(None, words))
        try:
            yield text, request(text, world_size, 2 if LAYERZERO in words else None, shape)
        except ConfigError:
            continue  # no run with these flags can start


@pytest.mark.nightly
def test_every_proposal_is_legal_new_and_as_it_is_written() -> None:
    runs = list(many_runs())
    assert len(runs) > 50
    for words, run in runs:
        for split in SPLITS:
            found = advise(run, split)
            assert len(found) == 3, (words, run.world_size, split)
            assert len({advice.text for advice in found}) == 3
            assert sorted(found, key=lambda advice: -advice.score) == found
            for advice in found:
                check_proposal(words, run, advice)


def from_flags(run: TrainingRun) -> dict[str, Any]:
    return {path: value for path, value in run.values().items() if not run.origins[path].file}


def from_files(run: TrainingRun) -> dict[str, Any]:
    return {path: value for path, value in run.values().items() if run.origins[path].file}


def check_proposal(words: str, run: TrainingRun, advice: MemoryAdvice) -> None:
    after = advice.after
    check_training(after)
    layout_of(after)
    given = advice.text.split(" and ")[0]
    assert given.startswith("--") or from_files(after) != from_files(run), advice.text
    if given.startswith("--"):  # the run's own command with the words behind it
        written = translated(command_line(f"{words} {given}"), zero=after.parallel.layerzero)
        assert from_flags(written) == from_flags(after)
        for name, value in itertools.pairwise(shlex.split(f"{given} --")):
            assert not name.startswith("--") or f" {name} {value} " not in f" {words} ", f"{given} is in use: {words}"
    assert (f"on {after.world_size} processes" in str(advice)) == (after.world_size != run.world_size)
    batches = [r.samples_of_step(r.world_size // r.replica) for r in (run, after)]
    assert (f"a global batch of {batches[1]}" in str(advice)) == (batches[0] != batches[1])


@pytest.mark.parametrize(
    ("words", "world_size", "predictor", "expected"),
    [
        # Wan2.1 1.3B on one device at 480p: activations are nearly all
        ("--bf16", 1, {}, ["--recompute-granularity selective"]),
        ("--bf16 --recompute-granularity selective", 1, {}, ['"attention_async_offload": true in m.json']),
        ("", 1, {"dtype": "fp32"}, ["--recompute-granularity selective", '--bf16 and "dtype": "bf16" in m.json']),
        # everything on that costs no device: an axis on more of them
        (
            f"--bf16 {RECOMPUTE} uniform",
            1,
            {},
            ["--tensor-model-parallel-size 2 --sequence-parallel on 2 processes instead of 1"],
        ),
        # two replicas become one: no device more, and the same global batch; CP 2 does not divide 3 heads
        (
            f"--bf16 {RECOMPUTE} uniform --tensor-model-parallel-size 4 --sequence-parallel",
            8,
            {},
            ["--context-parallel-size 2 --context-parallel-algo megatron_cp_algo --global-batch-size 2"],
        ),
        (f"--bf16 --micro-batch-size 4 {RECOMPUTE} uniform", 1, {}, ["--micro-batch-size 1 --global-batch-size 4"]),
        (f"--bf16 --global-batch-size 16 --pack 65521 {RECOMPUTE} uniform", 1, {}, ["--pack 32760"]),
    ],
)
def test_large_activations(words: str, world_size: int, predictor: dict[str, Any], expected: list[str]) -> None:
    split = MemoryBreakdown("forward and backward", 2 * 10**9, 3 * 10**9, 6 * 10**9, 16 * 10**9, 100 * 10**9)
    found = [str(advice) for advice in advise(request(words, world_size, shape="1.3B", **predictor), split)]
    assert found[: len(expected)] == expected


@pytest.mark.parametrize(
    ("words", "zero3_size", "first"),
    [
        ("--bf16", None, "--layerzero --layerzero-config zero_config.yaml and zero3_size: 8 in zero_config.yaml"),
        (f"--bf16 {LAYERZERO}", 2, "zero3_size: 8 in zero_config.yaml"),
    ],
)
def test_a_large_model_is_sharded(words: str, zero3_size: int | None, first: str) -> None:
    split = MemoryBreakdown("building the model", 10**9, parameters=60 * 10**9)
    assert str(advise(request(words, 8, zero3_size, "14B"), split)[0]) == first


def test_a_frozen_base_is_kept_in_fewer_bits_or_sharded() -> None:
    """14B with adapters: gradients and moments are small, the base is what can shrink."""
    split = MemoryBreakdown("forward and backward", 10**9, 28 * 10**9, 10**8, 2 * 10**8, 10**9)
    words = f"--bf16 {LORA} {RECOMPUTE} uniform"
    texts = [str(advice) for advice in advise(request(words, 8, shape="14B"), split)]
    assert texts[0] == "--layerzero --layerzero-config zero_config.yaml and zero3_size: 8 in zero_config.yaml"
    texts = [str(advice) for advice in advise(request(words, 1, shape="14B"), split)]
    assert texts[0] == "--lora-base-dtype int8"
    texts = [str(advice) for advice in advise(request(f"{words} --lora-base-dtype fp8", 1, shape="14B"), split)]
    assert not any("layerzero" in text or "lora" in text for text in texts)


def test_degrees_follow_the_rules() -> None:
    """5 heads take no CP of 2 by Ulysses, and no TP of 2; 5 blocks need stages that are listed."""
    shape = {"hidden_size": 120, "num_heads": 5, "ffn_dim": 200, "num_layers": 5}
    texts = [str(advice) for advice in advise(request("--bf16", 1, **shape), STEP, count=9)]
    assert any(text.startswith("--tensor-model-parallel-size 5 ") for text in texts)
    assert any(text.startswith("--context-parallel-size 2 --context-parallel-algo megatron_cp_algo ") for text in texts)
    assert any('--pipeline-model-parallel-size 2 and "pipeline_num_layers": [3, 2] in m.json' in t for t in texts)


def test_where_the_rules_leave_less_than_three_less_is_said() -> None:
    run = request(
        f"--bf16 --use-distributed-optimizer {LAYERZERO}", 1, 1, hidden_size=10, num_heads=1, ffn_dim=15, num_layers=1
    )
    texts = [str(advice) for advice in advise(run, STEP)]
    assert len(texts) == 2
    assert all("2 processes" in text for text in texts)


TOKENS = 3 * 16 * 16


def step(run: TrainingRun) -> Report:
    """What a rank of the run holds in a step, of tokens that outweigh the model or not."""
    layout, data = layout_of(run), run.data
    latent = (3, 32, 32) if data.micro_batch_size > 1 or run.world_size == 1 else (1, 2, 2)
    packed = None if data.pack_tokens is None else data.pack_tokens // TOKENS
    job = DryRunJob(
        run.wan, layout, data_parallel_options(run), run.parallel.layerzero, training_dtype(run), latent,
        data.micro_batch_size, run.micro_batches_of_step(layout.dp_size) // (packed or 1), recompute_of(run.memory),
        None if (lora := plan_of(run.adapters, run.wan)) is None else lora.extension(), packed=packed,
    )  # fmt: skip
    return dry_run(job, rank=0)


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        pytest.param("--micro-batch-size 2", 1, marks=pytest.mark.nightly),
        pytest.param(f"--pack {2 * TOKENS} --global-batch-size 4", 1, marks=pytest.mark.nightly),
        pytest.param("--bf16", 8, marks=pytest.mark.nightly),
        pytest.param(LORA, 8, marks=pytest.mark.nightly),
    ],
)
def test_the_dry_run_of_every_proposal_needs_less_as_estimated(words: str, world_size: int) -> None:
    """The peak that every tensor of a whole step adds up to, before and after."""
    deep = {"num_layers": 12} if words == LORA else {}  # whose gathered blocks are few beside the base
    run = request(words, world_size, **deep)
    before = step(run)
    kinds = dict(before.peak)
    known = [kinds.pop(kind) for kind in ("parameters", "gradients", "optimizer")]
    split = MemoryBreakdown("forward and backward", 0, *known, activations=sum(kinds.values()))
    assert split.held == before.peak_bytes
    found = advise(run, split)
    assert len(found) == 3
    for advice in found:
        really_saved = before.peak_bytes - step(advice.after).peak_bytes
        assert really_saved == pytest.approx(advice.saved, rel=0.2), str(advice)
