"""run.yaml: closed and typed, every mistake told by its place."""

from pathlib import Path

import pytest

from mm.config.run.file import load_training, whole_file
from mm.errors import ConfigError

GOOD = """
training: {steps: 10}
model:
  shape: {hidden_size: 48, ffn_dim: 64, num_heads: 4, num_layers: 4}
data:
  features: {path: features.txt, clip: {num_frames: 9, height: 64, width: 64}}
optimizer: {lr: 1e-4}
"""


def read(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    try:
        load_training(path)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD) == []
    run = load_training(tmp_path / "run.yaml", 4)
    assert (run.optimizer.lr, run.training.seed, run.parallel.layerzero, run.adapters, run.dp) == (
        1e-4, 1234, None, None, 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "id", "told"),
    [
        ("memry: {}", "CFG-003", 'unknown key "memry". Did you mean "memory"?'),
        ("parallel: {tensor_sise: 2}", "CFG-003", '"parallel.tensor_sise". Did you mean "tensor_size"?'),
        ("parallel: {layerzero: {zero_size: 2}}", "CFG-003", '"parallel.layerzero.zero_size"'),
        ("parallel: {tensor_size: 0}", "CFG-005", '"parallel.tensor_size" is 0'),
        ("parallel: {tensor_size: '2'}", "CFG-005", '"parallel.tensor_size" is "2"'),
        ("parallel: {tensor_size: 2.0}", "CFG-005", '"parallel.tensor_size" is 2.0'),
        ("adapters: {rank: 4}", "CFG-004", 'lacks the key "adapters.alpha"'),
        ("adapters: {rank: 0, alpha: 1, targets: [q], base: b}", "CFG-005", '"adapters.rank" is 0'),
        ("evaluation: {interval: 2}", "CFG-004", '"evaluation.features"'),
        ("logging: {interval: 1, interval: 2}", "CFG-002", "occurs twice"),
        ("logging: {interval: !!python/name:os.system ''}", "CFG-002", "not plain YAML"),
        ("objective: {logit_mean: 0.5}", "CFG-005", "no effect with timestep_sampling"),
        ("optimizer: {lr: 1e-4}", "CFG-002", "occurs twice"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_place(tmp_path: Path, more: str, id: str, told: str) -> None:
    text = GOOD + more + "\n"
    found = read(tmp_path, text)
    assert any(problem.startswith(id) and told in problem for problem in found), found


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("lr: 1e-4", "lr: fast, momentum: 0.9").replace("steps: 10", "stepz: 10")
    assert sorted(problem[:7] for problem in read(tmp_path, text)) == ["CFG-003", "CFG-003", "CFG-004", "CFG-005"]


@pytest.mark.parametrize("text", ["", "- a\n", "3\n", "&a [*a]\n"])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text)


def test_numbers_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for number in (1e-5, 0.1 + 0.2, 3e-07, 1.2345678901234567e-8, 1e300, 5e-324):
        path.write_text(GOOD.replace("1e-4", repr(number)))
        run = load_training(path)
        assert run.optimizer.lr.hex() == number.hex()
        path.write_text(whole_file(run))
        assert load_training(path).optimizer.lr.hex() == number.hex()
