"""A resume with other steps than the checkpoint's is refused, every change named, and made where it is asked for."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_runs import WEIGHTS, bits, run, words

from mm.cli import train as train_command
from mm.config.base import parse
from mm.config.model import WanConfig
from mm.data.dataset import FeatureDataset, open_features
from mm.dialects.mindspeed.data_json import TrainData
from mm.dialects.mindspeed.training import features as of_file
from mm.errors import CheckpointError, ConfigError, EndedElsewhereError, MMError

MADE_WITH: dict[str, Any] = {
    "lr_decay_style": "cosine",
    "min_lr": 1e-5,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "lr_warmup_iters": 1,
    "train_iters": 3,
}
LONGER = {"train_iters": 5, "lr_decay_iters": 3}
"""Goes on to step 5 with the schedule as it was."""


@pytest.fixture(scope="module")
def demo(demo_of_files: Path) -> Path:
    """Features of one file a sample, whose list can be changed."""
    return demo_of_files


@pytest.fixture(scope="module")
def made(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a cosine schedule."""
    folder = tmp_path_factory.mktemp("made") / "run"
    run(demo, folder, **MADE_WITH)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def edited(demo: Path, path: Path, name: str, *keys: str, to: Any) -> Path:
    """A configuration of the embedded default with one value changed."""
    content = json.loads((demo / "configs" / name).read_text())
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = to
    path.write_text(json.dumps(content))
    return path


def features(demo: Path, folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
    """feature_data.json of a copy of the features whose list is changed."""
    store = shutil.copytree(demo / "features", folder / "features")
    rows = [json.loads(line) for line in (store / "data.jsonl").read_text().splitlines()]
    (store / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    listed = folder / "features.txt"
    listed.write_text(f"{store}\n")
    where = ("dataset_param", "basic_parameters", "data_path")
    return edited(demo, folder / "features.json", "feature_data.json", *where, to=str(listed))


def everything(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(demo: Path, folder: Path, **flags: Any) -> str:
    """What a refusal says; nothing may have changed."""
    before = everything(folder)
    with pytest.raises(ConfigError) as caught:
        run(demo, folder, **{**MADE_WITH, **LONGER, **flags})
    assert {problem.id for problem in caught.value.problems} == {"CFG-160"}
    assert caught.value.exit_code == 64
    assert everything(folder) == before
    return str(caught.value)


FLAGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "global batch": ({"global_batch_size": 8}, "--global-batch-size was 4 and is 8", "batch"),
    "longer cosine": (
        {"train_iters": 5, "lr_decay_iters": None},
        "--lr-decay-iters (default: --train-iters) was 3 and is 5 (learning rate of step 4: 1e-05, now ",
        "schedule",
    ),
    "rate": ({"min_lr": 1e-4}, "--min-lr was 1e-05 and is 0.0001", "schedule"),
    "weight decay": ({"weight_decay": 0.1}, "--weight-decay was 0.01 and is 0.1", "optimizer"),
    "beta": ({"adam_beta2": 0.95}, "--adam-beta2 was 0.999 and is 0.95", "optimizer"),
    "epsilon": ({"adam_eps": 1e-6}, "--adam-eps was 1e-08 and is 1e-06", "optimizer"),
    "clipping": ({"clip_grad": 0.5}, "--clip-grad was 1.0 and is 0.5", "optimizer"),
}


@pytest.mark.parametrize("row", FLAGS)
def test_another_flag_is_refused(demo: Path, copy: Path, row: str) -> None:
    flags, said, kind = FLAGS[row]
    text = refused(demo, copy, **flags)
    assert said in text and f"--resume-changed {kind}" in text


def test_another_objective_is_refused(demo: Path, copy: Path, tmp_path: Path) -> None:
    made_with = json.loads((demo / "configs" / "pretrain_model.json").read_text())["diffusion"]
    shift = edited(demo, tmp_path / "shift.json", "pretrain_model.json", "diffusion", "shift", to=7.0)
    said = f"diffusion.shift of --mm-model was {made_with['shift']} and is 7.0"
    assert said in refused(demo, copy, mm_model=shift)
    cfg = ("dataset_param", "preprocess_parameters", "cfg")
    dropout = edited(demo, tmp_path / "cfg.json", "feature_data.json", *cfg, to=0.5)
    assert "cfg of --mm-data was 0.0 and is 0.5" in refused(demo, copy, mm_data=dropout)
    order = edited(demo, tmp_path / "order.json", "feature_data.json", "dataloader_param", "shuffle", to=False)
    text = refused(demo, copy, mm_data=order)
    assert "shuffle of --mm-data was true and is false" in text
    assert "Fix: Set shuffle of --mm-data to true to go on as before; " in text


def test_a_checkpoint_made_with_another_order_of_samples_is_refused(demo: Path, copy: Path) -> None:
    """One of a version that shuffled by lists of permutations and did not record that."""
    manifest = copy / "iter_0000003" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["scalars"]["steps"]["data"].pop("plan") == "keyed bijections"
    manifest.write_text(json.dumps(content))
    text = refused(demo, copy)
    assert "the sampling plan was lists of random permutations and is keyed bijections" in text
    assert "--resume-changed data" in text


def test_another_precision_is_refused(demo: Path, tmp_path: Path, model_json: Path) -> None:
    run(demo, tmp_path, mm_model=model_json, train_iters=1)
    with pytest.raises(ConfigError, match=r"CFG-160.*--bf16 was absent and is given"):
        run(demo, tmp_path, mm_model=model_json, train_iters=2, bf16=True)
    assert len(run(demo, tmp_path, mm_model=model_json, train_iters=2, bf16=True, resume_changed=["precision"])) == 2


CHANGED_DATA: dict[str, tuple[Callable[[list[dict[str, Any]]], list[dict[str, Any]]], str]] = {
    "fewer": (lambda rows: rows[:10], "was 16 samples (identity "),
    "another order": (lambda rows: rows[::-1], "and is 16 samples (identity "),
    "another caption": (lambda rows: [{**rows[0], "cap": "a caption"}, *rows[1:]], "and is 16 samples (identity "),
    "another video": (lambda rows: [{**rows[0], "video": "0" * 16}, *rows[1:]], "and is 16 samples (identity "),
}


@pytest.mark.parametrize("row", CHANGED_DATA)
def test_another_data_set_is_refused(demo: Path, copy: Path, tmp_path: Path, row: str) -> None:
    change, said = CHANGED_DATA[row]
    text = refused(demo, copy, mm_data=features(demo, tmp_path, change))
    assert f"the data set of --mm-data was 16 samples (identity {opened(demo).identity()})" in text and said in text


def opened(demo: Path, data: Path | None = None) -> FeatureDataset:
    def load(path: Path) -> Any:
        return json.loads(path.read_text())

    model = {**load(demo / "configs" / "pretrain_model.json")["predictor"]}
    shape = {name: value for name, value in model.items() if name in WanConfig.model_fields}
    values = load(data or demo / "configs" / "feature_data.json")
    return open_features(of_file(parse(TrainData, values, "data").dataset_param), parse(WanConfig, shape, "model"))


def test_features_that_have_moved_are_the_same(demo: Path, copy: Path, tmp_path: Path) -> None:
    moved = features(demo, tmp_path, lambda rows: rows)
    assert opened(demo, moved).identity() == opened(demo).identity()
    assert len(run(demo, copy, **{**MADE_WITH, **LONGER}, mm_data=moved)) == 5


def test_a_video_that_was_replaced_is_another_data_set(demo: Path) -> None:
    """What extraction writes into the list of each video is of its content."""
    rows = [json.loads(line) for line in (demo / "features" / "data.jsonl").read_text().splitlines()]
    assert len({row["video"] for row in rows}) == len(rows) == 16


def test_all_changes_are_told_at_once(demo: Path, copy: Path, tmp_path: Path) -> None:
    data = features(demo, tmp_path, lambda rows: rows[:10])
    text = refused(demo, copy, mm_data=data, global_batch_size=8, clip_grad=0.5, lr=2e-3)
    for said in ("16 samples", "--global-batch-size was 4 and is 8", "--clip-grad was 1.0 and is 0.5", "--lr was"):
        assert said in text
    assert text.count("CFG-160") == 4
    with pytest.raises(CheckpointError) as caught:
        run(demo, copy, **{**MADE_WITH, **LONGER}, seed=1, clip_grad=0.5)
    assert [problem.id for problem in caught.value.problems] == ["CKPT-071", "CFG-160"]


def test_what_was_asked_for_is_done_and_said_once(
    demo: Path, copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {**MADE_WITH, **LONGER, "global_batch_size": 8, "clip_grad": 0.5}
    with pytest.raises(ConfigError, match="--clip-grad") as caught:
        run(demo, copy, **flags, resume_changed=["batch"])
    assert "--global-batch-size" not in str(caught.value)
    rows = run(demo, copy, **{**flags, "save_interval": 1, "train_iters": 4}, resume_changed=["batch", "optimizer"])
    assert [row["consumed_samples"] for row in rows] == [4, 8, 12, 20]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("--global-batch-size was 4 and is 8" in text for text in told)
    assert any("--clip-grad was 1.0 and is 0.5" in text for text in told)
    caplog.clear()
    assert len(run(demo, copy, **flags)) == 5  # the checkpoint of step 4 has the new values
    assert not [record for record in caplog.records if "with a change" in record.getMessage()]


SAME: dict[str, dict[str, Any]] = {
    "longer, schedule as it was": LONGER,
    "another micro-batch": {**LONGER, "micro_batch_size": 4},
    "accumulation": {**LONGER, "micro_batch_size": 1},
    "what is told and saved": {**LONGER, "log_interval": 3, "save_interval": 1, "keep_latest": 2},
    "readers": {**LONGER, "num_workers": 1, "read_timeout": 100.0},
    "recomputation": {**LONGER, "recompute_granularity": "selective"},
}


def test_what_changes_no_step_goes_on(demo: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight = run(demo, tmp_path / "straight", **{**MADE_WITH, **LONGER})
    for row, flags in SAME.items():
        folder = shutil.copytree(made, tmp_path / row)
        rows = run(demo, folder, **{**MADE_WITH, **flags})
        assert [(r["step"], r["lr"], r["consumed_samples"]) for r in rows] == [
            (r["step"], r["lr"], r["consumed_samples"]) for r in straight
        ], row
        assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in straight], rel=1e-5), row
    assert "with a change" not in caplog.text


def test_a_constant_rate_may_go_on_for_longer(demo: Path, tmp_path: Path) -> None:
    """Neither the length nor a warm-up that is over has an effect on the steps to come."""
    flags = {"lr_warmup_iters": 1, "micro_batch_size": 2}
    straight = run(demo, tmp_path / "straight", train_iters=4, **flags)
    run(demo, tmp_path / "stopped", train_iters=2, **flags)
    assert bits(run(demo, tmp_path / "stopped", train_iters=4, **{**flags, "lr_warmup_iters": 0})) == bits(straight)


def test_a_warm_up_that_is_not_over_is_part_of_the_schedule(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=2, lr_warmup_iters=5, lr_decay_iters=9, micro_batch_size=2)
    flags = {"train_iters": 4, "lr_decay_iters": 9, "micro_batch_size": 2}
    with pytest.raises(ConfigError, match=r"CFG-160.*--lr-warmup-iters was 5 and is 3"):
        run(demo, tmp_path, lr_warmup_iters=3, **flags)


def test_another_average_is_refused(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=1, ema_decay=0.9)
    with pytest.raises(ConfigError, match=r"CFG-160.*--ema-decay was 0.9 and is 0.5"):
        run(demo, tmp_path, train_iters=2, ema_decay=0.5)
    assert len(run(demo, tmp_path, train_iters=2, ema_decay=0.5, no_load_ema=True)) == 2


def test_a_checkpoint_of_an_earlier_version_cannot_be_compared(
    demo: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = copy / "iter_0000003" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["scalars"].pop("steps")["global_batch_size"] == 4
    manifest.write_text(json.dumps(content))
    assert len(run(demo, copy, **{**MADE_WITH, **LONGER, "global_batch_size": 8})) == 5
    assert caplog.text.count("does not record its batch, schedule, objective and data") == 1


def test_the_mm_format_records_the_same(demo: Path, tmp_path: Path) -> None:
    flags = {"ckpt_format": "torch", "no_save_optim": True, "micro_batch_size": 2}
    run(demo, tmp_path, train_iters=1, **flags)
    with pytest.raises(ConfigError, match=r"CFG-160.*--global-batch-size was 2 and is 4"):
        run(demo, tmp_path, train_iters=2, global_batch_size=4, no_load_optim=True, **flags)
    assert len(run(demo, tmp_path, train_iters=2, no_load_optim=True, **flags)) == 2


def test_adapters_record_the_same(demo: Path, tmp_path: Path) -> None:
    lora = {
        "lora_r": 2,
        "lora_alpha": 2.0,
        "lora_target_modules": ["q"],
        "load_base_model": demo / WEIGHTS,
        "load": None,
    }
    run(demo, tmp_path, train_iters=1, **lora)
    with pytest.raises(ConfigError, match=r"CFG-160.*--weight-decay was 0.01 and is 0.0"):
        run(demo, tmp_path, train_iters=2, weight_decay=0.0, **lora)


def test_weights_of_another_run_are_no_resume(demo: Path, made: Path, tmp_path: Path) -> None:
    """--load of a run goes on from there and is compared; with --finetune only its weights are taken."""
    flags = {**MADE_WITH, "train_iters": 4, "load": made, "global_batch_size": 8}
    with pytest.raises(ConfigError, match=r"CFG-160.*--global-batch-size was 4 and is 8"):
        run(demo, tmp_path / "second", **flags)
    assert not (tmp_path / "second" / "metrics.jsonl").exists()
    assert [row["step"] for row in run(demo, tmp_path / "third", finetune=True, **flags)] == [1, 2, 3, 4]


def test_other_held_out_features_are_said(demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_out = demo / "configs" / "feature_data.json"
    flags = {"eval_interval": 1, "micro_batch_size": 2}
    run(demo, tmp_path / "run", train_iters=1, eval_data=held_out, **flags)
    other = features(demo, tmp_path, lambda rows: rows[:4])
    run(demo, tmp_path / "run", train_iters=2, eval_data=other, **flags)
    assert "the data set of --eval-data was 16 samples" in caplog.text and "and is 4 samples" in caplog.text


def what_it_says(command: list[str]) -> str:
    try:
        train_command.main(command)
    except MMError as error:
        return str(error)
    except EndedElsewhereError:
        return "told by another rank"
    return "trained"


def test_more_replicas_are_told_how_to_keep_the_batch(demo: Path, tmp_path: Path) -> None:
    """As with `pretrain.sh` on other devices: the same MBS and GRAD_ACC_STEP are another global batch."""
    run(demo, tmp_path, train_iters=1, micro_batch_size=4)
    before = everything(tmp_path)
    commands = words(demo, tmp_path, train_iters=2, micro_batch_size=4)
    said = " ".join(run_ranks(2, what_it_says, commands))
    assert "trained" not in said and "--global-batch-size was 4 and is 8" in said
    assert "Give --global-batch-size 4 --micro-batch-size 2 (in the scripts MBS=2 GRAD_ACC_STEP=1)" in said
    assert everything(tmp_path) == before
    kept = words(demo, tmp_path, train_iters=2, micro_batch_size=2, global_batch_size=4)
    assert run_ranks(2, what_it_says, kept) == ["trained", "trained"]


def test_micro_batches_that_would_begin_inside_of_one_are_refused(demo: Path, tmp_path: Path) -> None:
    """After two steps of six samples, micro-batches of eight would take the ninth to the twelfth again."""
    folder, flags = tmp_path / "run", {"train_iters": 2, "micro_batch_size": 3, "global_batch_size": 6}
    run(demo, folder, **flags)
    larger = {"train_iters": 3, "micro_batch_size": 8, "global_batch_size": 8, "resume_changed": "batch"}
    before = everything(folder)
    with pytest.raises(ConfigError, match=r"CFG-161: \S+ stands at sample 12, .*Give --micro-batch-size 6"):
        run(demo, folder, **larger)
    assert everything(folder) == before
    rows = run(demo, folder, **{**larger, "micro_batch_size": 4})
    assert [row["consumed_samples"] for row in rows] == [6, 12, 20]
