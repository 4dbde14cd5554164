"""MindSpeed-MM's flags as sections: each stands for one value, and a value knows what it is called."""

import json
from pathlib import Path
from typing import Any

import pytest
from translated import data_file, model_file, translated

from mm.config.layerzero import ZeroConfig
from mm.config.run.file import load_training, resolved, short_file, whole_file
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.words import ALL_TRAIN_FLAGS

NEEDED = "--lr 1e-4 --train-iters 10 --load weights"
FILES = {"mm_data", "mm_model", "eval_data", "layerzero", "layerzero_config"}
NO_CHOICE = {"optimization_level", "use_multiparameter_pipeline_model_parallel", "lora_dropout"}
"""Flags whose one value is how it always works, checked and then left behind."""
EVERYTHING = (
    "--lr 3e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-decay-iters 90 --lr-warmup-iters 5 --train-iters 100 --bf16 "
    "--micro-batch-size 2 --global-batch-size 64 --tensor-model-parallel-size 2 --sequence-parallel "
    "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2 --seed 7 "
    "--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2 --recompute-granularity selective "
    "--layerzero --layerzero-config z.yaml --save out --no-save-optim --resume-changed batch data --no-progress-bar "
    "--lora-r 4 --lora-alpha 8 --lora-target-modules q ffn.0 --load-base-model base --eval-interval 3 "
    "--eval-data held.json --validation-interval 4 --validation-prompts p.txt --validation-config i.json "
    "--on-nonfinite skip:3 --on-bad-sample skip:max=1% --clip-grad 0 --device cpu --ema-decay 0.9999"
)


def everything(world_size: int = 32) -> Any:
    model = model_file(pipeline_num_layers=[[1, 1], [1, 1]], attention_async_offload=True, dtype="bf16")
    return translated(EVERYTHING, model, ZeroConfig(zero3_size=2), world_size, data_file(num_frames=5))


def test_every_flag_stands_for_one_value() -> None:
    fields = [flag.field for flag in ALL_TRAIN_FLAGS.values()]
    assert len(fields) == len(set(fields))
    assert set(fields) | FILES | NO_CHOICE == set(TrainFlags.model_fields)


def test_flags_and_sections_have_the_same_defaults() -> None:
    """A flag that is not given means what a key that is left out means."""
    run = translated(NEEDED)
    short = short_file(run)
    assert {line.split("# ")[1] for line in short.splitlines() if "# --" in line} == {"--lr", "--train-iters", "--load"}


def test_all_values_arrive_and_come_back(tmp_path: Path) -> None:
    run = everything()
    path = tmp_path / "run.yaml"
    for text in (short_file(run), whole_file(run)):
        path.write_text(text)
        assert load_training(path, 32).model_dump() == run.model_dump()
    assert (run.optimizer.lr, run.optimizer.decay, run.parallel.context_algorithm) == (3e-5, "cosine", "hybrid")
    assert (run.checkpoint.save_optimizer, run.logging.progress_bar, run.model.precision) == (False, False, "bf16")
    assert (run.tp, run.pp, run.vp, run.cp, run.ulysses, run.dp, run.heads) == (2, 2, 2, 4, 2, 2, 2)
    assert run.evaluation is not None and run.evaluation.features.clip.num_frames == 5
    assert run.problems == ()


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("optimizer.lr", "--lr"),
        ("model.shape.num_heads", "predictor.num_heads in m.json"),
        ("objective.shift", "diffusion.shift in m.json"),
        ("parallel.stages", "predictor.pipeline_num_layers in m.json"),
        ("parallel.layerzero.zero3_size", "zero3_size in z.yaml"),
        ("checkpoint.save_optimizer", "--no-save-optim"),
        ("data.features.clip.height", "dataset_param.preprocess_parameters.max_height in d.json"),
        ("evaluation.features.clip.height", "dataset_param.preprocess_parameters.max_height in held.json"),
    ],
)
def test_a_value_knows_its_word(path: str, word: str, tmp_path: Path) -> None:
    assert everything().word(path) == word
    file = tmp_path / "mine.yaml"
    file.write_text(whole_file(everything()))
    assert load_training(file).word(path) == f"{path} in {file}"


def test_every_value_has_a_word_of_the_dialect() -> None:
    run = everything()
    assert [path for path in run.values() if "run.yaml" in run.word(path)] == []


@pytest.mark.parametrize(
    ("path", "value", "assigned", "in_a_sentence", "states"),
    [
        ("optimizer.lr", 0.5, "--lr 0.5", "--lr 0.5", "--lr is 0.5"),
        ("model.precision", "bf16", "--bf16", "--bf16", "--bf16 is given"),
        ("model.precision", "fp32", "--bf16 False", "--bf16", "--bf16 is absent"),
        ("checkpoint.save_optimizer", False, "--no-save-optim", "--no-save-optim", "--no-save-optim is given"),
        ("parallel.stages", [[1, 2]], '"pipeline_num_layers": [1, 2]', "pipeline_num_layers [1, 2]",
         "pipeline_num_layers in m.json is [1, 2]"),
        ("parallel.context_algorithm", "ring", "--context-parallel-algo megatron_cp_algo",
         "--context-parallel-algo megatron_cp_algo", "--context-parallel-algo is megatron_cp_algo"),
    ],
)  # fmt: skip
def test_values_are_spelled_as_the_user_spells_them(
    path: str, value: Any, assigned: str, in_a_sentence: str, states: str
) -> None:
    word = translated(NEEDED).origins[path]
    assert (word.assigned(value), word.with_value(value), word.states(value)) == (assigned, in_a_sentence, states)


def test_what_processes_compare_is_named_as_it_was_given() -> None:
    run = translated(f"{NEEDED} --no-load-rng")
    parts = run.origins.grouped(run.values())
    assert set(parts) == {"flags", "m.json", "d.json"}
    assert (parts["flags"]["lr"], parts["flags"]["no_load_rng"], parts["flags"]["bf16"]) == (1e-4, True, False)
    assert parts["m.json"]["predictor.num_heads"] == 4
    json.dumps(parts)


def test_a_run_is_changed_by_path() -> None:
    run = translated(NEEDED, world_size=4)
    after = run.changed({"parallel.tensor_size": 2, "parallel.layerzero.zero3_size": 2}, world_size=8)
    assert (after.tp, after.world_size, after.parallel.layerzero) == (2, 8, ZeroConfig(zero3_size=2))
    assert after.changed({"parallel.tensor_size": 1, "parallel.layerzero": None}, world_size=4) == run
    with pytest.raises(ValueError, match="tensor_size"):
        run.changed({"parallel.tensor_size": 0})


def test_a_resolved_run_leaves_nothing_to_its_processes() -> None:
    run = resolved(translated(f"{NEEDED} --micro-batch-size 2", world_size=4))
    assert (run.data.global_batch_size, run.optimizer.decay_steps) == (8, 10)
    assert run.changed({}) == run
