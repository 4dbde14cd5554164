"""Flags and rules: everything that is wrong is told at once, by id, before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from translated import translated

from mm.config.base import Section, load, parse
from mm.config.flags import parse_flags
from mm.config.rules.training import check_training
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.errors import ConfigError

ROOT = Path(__file__).parents[2]
GOOD = {
    "--mm-data": "d.json", "--mm-model": "m.json", "--train-iters": "10", "--lr": "1e-4", "--load": "weights",
}  # fmt: skip


FULL = ["--recompute-granularity", "full", "--recompute-method"]
SKIP, KEEPING = "--recompute-skip-core-attention", "--recompute-num-layers-skip-core-attention"
OFFLOAD = {"attention_async_offload": True}


def flags(*words: str, without: str | None = None) -> TrainFlags:
    base = [word for name, value in GOOD.items() if name != without for word in (name, value)]
    return parse_flags(TrainFlags, [*base, *words], program="mm train", retired=RETIRED_TRAIN_FLAGS)


def pretrain_model(**predictor: Any) -> PretrainModel:
    shape = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4, **predictor}
    return parse(PretrainModel, {"predictor": shape, "diffusion": {}}, "m.json")


def ids(error: ConfigError) -> list[str]:
    return [problem.id for problem in error.problems]


def test_the_last_value_of_a_flag_counts() -> None:
    assert flags("--lr", "1e-5", "--lr=2e-5", "--bf16").lr == 2e-5


@pytest.mark.parametrize(
    ("words", "expected", "hint"),
    [
        (["--micro-batch-sise", "2"], "CFG-007", "--micro-batch-size"),
        (["--seq-length", "24"], "CFG-008", "features"),
        (["--recompute-granularity", "attention"], "CFG-005", "selective"),
        (["--recompute-keep", "q"], "CFG-005", "q,k,v,O"),
        (["--lr", "fast"], "CFG-005", "--lr"),
        (["--micro-batch-size", "0"], "CFG-005", "--micro-batch-size"),
        (["--lr", "nan"], "CFG-005", "--lr"),
        (["--lr-decay-style", "wsd"], "CFG-005", "cosine"),
        (["stray"], "CFG-006", "stray"),
        (["--lr"], "CFG-006", "--lr"),
    ],
)
def test_bad_flags(words: list[str], expected: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flags(*words)
    assert ids(caught.value) == [expected]
    assert hint in str(caught.value)


def test_all_bad_flags_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        flags("--lr", "-1", "--sede", "3", "--use-torch-fsdp2", "--adam-beta1", "1.5", without="--mm-data")
    assert sorted(ids(caught.value)) == ["CFG-004", "CFG-005", "CFG-005", "CFG-007", "CFG-008"]


@pytest.mark.parametrize(
    ("words", "model", "world_size", "expected"),
    [
        (["--global-batch-size", "3", "--micro-batch-size", "2"], {}, 1, ["CFG-021"]),
        (["--global-batch-size", "3"], {}, 2, ["CFG-021"]),
        (["--bf16"], {"dtype": "fp32"}, 1, ["CFG-022"]),
        (["--recompute-granularity", "full"], {}, 1, ["CFG-048"]),
        (["--recompute-method", "block"], {}, 1, ["CFG-048"]),
        (["--recompute-num-layers", "1"], {}, 1, ["CFG-048"]),
        ([*FULL, "uniform", "--recompute-num-layers", "0"], {}, 1, ["CFG-048"]),
        ([*FULL, "block", "--recompute-num-layers", "99"], {}, 1, ["CFG-048"]),
        ([*FULL, "block", "--recompute-num-layers", "0"], {}, 1, []),
        ([*FULL, "block", "--recompute-num-layers", "0", SKIP], OFFLOAD, 1, []),
        ([*FULL, "block", "--recompute-num-layers", "0", SKIP, KEEPING, "4", "--recompute-keep", "q,k,v,O"], {}, 1, []),
        ([*FULL, "block", "--recompute-num-layers", "1", SKIP, KEEPING, "3"], {}, 1, []),
        ([*FULL, "block", "--recompute-num-layers", "1", SKIP, KEEPING, "4"], {}, 1, ["CFG-048"]),
        ([*FULL, "block", "--recompute-num-layers", "4", SKIP], {}, 1, ["CFG-048"]),
        ([*FULL, "block", SKIP], {}, 1, ["CFG-048"]),
        ([*FULL, "block", "--recompute-num-layers", "1", KEEPING, "2"], {}, 1, ["CFG-048"]),
        ([*FULL, "uniform", SKIP], OFFLOAD, 1, []),
        ([*FULL, "uniform", SKIP, KEEPING, "2"], {}, 1, ["CFG-048"]),
        ([*FULL, "uniform"], OFFLOAD, 1, ["CFG-048"]),
        ([*FULL, "uniform", "--recompute-keep", "O"], {}, 1, ["CFG-048"]),
        ([SKIP], {}, 1, ["CFG-048"]),
        ([], OFFLOAD, 1, ["CFG-048"]),
        (["--recompute-keep", "O"], {}, 1, ["CFG-048"]),
        (["--recompute-granularity", "selective"], OFFLOAD, 1, []),
        (["--recompute-granularity", "selective", "--recompute-method", "block"], {}, 1, ["CFG-048"]),
        (["--recompute-granularity", "selective", SKIP], {}, 1, ["CFG-048"]),
        ([], {"dtype": "bf16"}, 1, ["CFG-022"]),
        (["--init-from-scratch"], {}, 1, ["CFG-023"]),
        (["--save-interval", "2"], {}, 1, ["CFG-024"]),
        (["--on-bad-sample", "skip"], {}, 1, ["CFG-110"]),
        (["--on-bad-sample", "skip:max=0.1%"], {}, 1, []),
        (["--lr-warmup-iters", "10"], {}, 1, ["CFG-025"]),
        (["--min-lr", "1"], {}, 1, ["CFG-025"]),
        (["--overlap-param-gather"], {}, 1, ["CFG-026"]),
        ([], {"pipeline_num_layers": [2, 3]}, 1, ["CFG-027"]),
        ([], {"pipeline_num_layers": [[1, 1], [1, 1]]}, 1, []),
        ([], {}, 1, []),
    ],
)
def test_rules(words: list[str], model: dict[str, Any], world_size: int, expected: list[str]) -> None:
    try:
        check_training(translated(flags(*words), pretrain_model(**model), world_size=world_size))
        found = []
    except ConfigError as error:
        found = ids(error)
    assert found == expected


def test_a_share_of_given_frames_needs_a_task_that_has_them() -> None:
    values = {"predictor": {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4}}
    model = parse(PretrainModel, {**values, "diffusion": {"first_frame_share": 0.5}}, "m.json")
    with pytest.raises(ConfigError, match=r"CFG-290: .*first_frame_share.*0\.5"):
        check_training(translated(flags(), model))
    of_48 = {"model_type": "ti2v", "in_dim": 48, "out_dim": 48}
    values["predictor"] |= of_48
    check_training(
        translated(flags(), parse(PretrainModel, {**values, "diffusion": {"first_frame_share": 0}}, "m.json"))
    )
    values["predictor"]["force_2_1_time_embedding"] = True
    check_training(translated(flags(), parse(PretrainModel, {**values, "diffusion": {}}, "m.json")))
    model = parse(PretrainModel, {**values, "diffusion": {"first_frame_share": 0}}, "m.json")
    with pytest.raises(ConfigError, match=r"CFG-290: .*first_frame_share.*force_2_1_time_embedding.*true"):
        check_training(translated(flags(), model))


def test_models_with_a_timestep_for_each_token_are_not_declared_with_one_a_sample() -> None:
    """Weights of such a model alone say nothing of it: every tensor has its place in text to video of 48 channels."""
    values = {"predictor": {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4}}
    values["predictor"] |= {"in_dim": 48, "out_dim": 48}
    with pytest.raises(ConfigError, match=r"CFG-305: .*out_dim.*48.*Set model_type to ti2v.*force_2_1_time_embedding"):
        check_training(translated(flags(), parse(PretrainModel, {**values, "diffusion": {}}, "m.json")))
    forced = {**values["predictor"], "in_dim": 16, "out_dim": 16, "force_2_1_time_embedding": True}
    with pytest.raises(ConfigError, match=r"CFG-005.*force_2_1_time_embedding has no effect in t2v models"):
        parse(PretrainModel, {"predictor": forced, "diffusion": {}}, "m.json")


@pytest.mark.parametrize(
    ("diffusion", "expected"),
    [
        ({"band_from": 0.875}, []),
        ({"band_below": 0.875, "timestep_sampling": "logit_normal"}, []),
        ({"band_from": 0.9, "band_below": 0.9}, ["CFG-291"]),
        ({"band_from": 0.9991, "band_below": 0.9999, "shift": 1.0}, ["CFG-291"]),
        ({"band_from": 0.9991, "band_below": 0.9999, "timestep_sampling": "logit_normal"}, []),
    ],
)
def test_bands_of_noise_levels(diffusion: dict[str, Any], expected: list[str]) -> None:
    predictor = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4}
    model, found = parse(PretrainModel, {"predictor": predictor, "diffusion": diffusion}, "m.json"), []
    try:
        check_training(translated(flags(), model))
    except ConfigError as error:
        found = ids(error)
    assert found == expected


@pytest.mark.parametrize(
    ("shape", "clip", "said"),
    [
        ({}, {"num_frames": 9}, None),
        ({}, {"num_frames": 5}, "motion_loss_ratio.* 0.5 has no effect: clips of .* have 2 latent frames"),
        ({"patch_size": [3, 2, 2]}, {"num_frames": 9}, "patch_size.* a token has several"),
    ],
)
def test_a_loss_of_motion_needs_neighbouring_frames(shape: dict[str, Any], clip: dict[str, Any], said: Any) -> None:
    predictor = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4, **shape}
    diffusion = {"motion_loss_ratio": 0.5}
    run = translated(flags(), parse(PretrainModel, {"predictor": predictor, "diffusion": diffusion}, "m.json"))
    features = run.data.features
    assert features.clip is not None
    data = run.data.model_copy(
        update={"features": features.model_copy(update={"clip": features.clip.model_copy(update=clip)})}
    )
    run = run.model_copy(update={"data": data})
    if said is None:
        check_training(run)
        return
    with pytest.raises(ConfigError, match=f"CFG-426.*{said}"):
        check_training(run)


def test_training_without_weights_must_be_meant() -> None:
    with pytest.raises(ConfigError, match="CFG-023"):
        check_training(translated(flags(without="--load"), pretrain_model()))


def test_every_broken_rule_is_told() -> None:
    words = [
        "--tensor-model-parallel-size",
        "3",
        "--global-batch-size",
        "3",
        "--micro-batch-size",
        "2",
        "--min-lr",
        "1",
    ]
    with pytest.raises(ConfigError) as caught:
        check_training(translated(flags(*words), pretrain_model(dtype="bf16"), world_size=3))
    assert ids(caught.value) == ["CFG-022", "CFG-033", "CFG-021", "CFG-025"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "CFG-002"),
        ('{"a": 1, "a": 2}', "CFG-002"),
        ('{"hidden_size": NaN}', "CFG-002"),
        ("[" * 100_000, "CFG-002"),
        ('{"predictor": {}, "diffusion": {}, "extra": 1}', "CFG-004"),
        ('{"predictor": 3, "diffusion": {}}', "CFG-005"),
    ],
)
def test_bad_json(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "pretrain_model.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(PretrainModel, path)
    assert expected in ids(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CFG-001"):
        load(PretrainModel, tmp_path / "none.json")


def test_an_unknown_key_hints_at_the_known_one() -> None:
    with pytest.raises(ConfigError) as caught:
        pretrain_model(num_layer=3)
    assert ids(caught.value) == ["CFG-003"]
    assert '"num_layers"' in str(caught.value)


def test_sections_cannot_grow_fields() -> None:
    class Small(Section):
        size: int = 1

    with pytest.raises(ValueError, match="frozen"):
        Small().size = 2  # type: ignore[misc]


def test_shipped_model_files_are_the_published_shapes() -> None:
    from mm.config.model import WAN_1_3B, WAN_14B

    for size, shape in (("1.3b", WAN_1_3B), ("14b", WAN_14B)):
        path = ROOT / "examples" / "wan2.1" / size / "t2v" / "pretrain_model.json"
        assert load(PretrainModel, path).predictor.wan() == shape


def test_configuration_is_refused_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"predictor": {}, "diffusion": {}}))
    code = (
        "import sys; from mm.cli.entry import run; from mm.cli.train import main; "
        f"code = run(main, ['--mm-data', 'd', '--mm-model', {str(tmp_path / 'm.json')!r}, '--train-iters', '1', "
        "'--lr', '1']); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 64, done.stderr
    lines = done.stderr.splitlines()
    told = {line[:13] for line in lines}
    assert told == {"error CFG-004", "error CFG-001", "error CFG-023"}  # of both files and the rules, in one round


def test_a_value_that_is_called_as_a_flag_is_told_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r'CFG-005: --resume-changed is "seed"; '):
        parse_flags(TrainFlags, ["--resume-changed", "seed"], program="mm train")
