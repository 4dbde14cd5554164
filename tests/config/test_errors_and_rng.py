import pickle

import pytest
import torch

from mm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DataWriteError,
    DifferenceError,
    NumericsError,
    Problem,
    ResumeError,
    format_error,
    raise_all,
)
from mm.rng import generator, key


def test_an_error_says_id_message_and_remedy_on_one_line() -> None:
    error = DataError("DATA-999", "clip.mp4 has 3 frames, 5 are needed.", "Give a longer clip.")
    assert format_error(error) == "error DATA-999: clip.mp4 has 3 frames, 5 are needed. Fix: Give a longer clip."


def test_names_of_strangers_stay_on_the_line_and_command_no_terminal() -> None:
    problem = Problem("DATA-999", "a\nb\r\x1b[2Jé\u2028.mp4 is missing.", "Add it.")
    assert str(problem) == r"DATA-999: a\nb\r\x1b[2Jé\u2028.mp4 is missing. Fix: Add it."
    with pytest.raises(DataError) as caught:
        raise_all(DataError, [problem, problem])
    assert len(format_error(caught.value).splitlines()) == 2


def test_exit_codes() -> None:
    expected = {ConfigError: 64, DataError: 65, DataWriteError: 65, CheckpointError: 74, ResumeError: 64}
    expected |= {NumericsError: 17, DifferenceError: 17}
    assert {kind: kind("X-1", "m", "r").exit_code for kind in expected} == expected


def test_all_problems_travel_together_and_across_processes() -> None:
    problems = [Problem("CFG-998", "a", "b"), Problem("CFG-999", "c", "d")]
    with pytest.raises(ConfigError) as caught:
        raise_all(ConfigError, problems)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ConfigError
    assert list(copy.problems) == problems
    assert len(format_error(copy).splitlines()) == 2


def test_no_problem_raises_nothing() -> None:
    raise_all(ConfigError, [])


def test_streams_are_keyed_by_every_part() -> None:
    keys = {
        key(seed, stream, sample, draw)
        for seed in (0, 1)
        for stream in ("noise", "timestep")
        for sample in (0, 1, "0:a", "1:a")
        for draw in (0, 1)
    }
    assert len(keys) == 32
    assert all(0 <= value < 2**63 for value in keys)


def test_a_key_is_the_same_in_every_process_and_release() -> None:
    # The first 8 bytes of sha256("1234/noise/clip/0"), as `printf '1234/noise/clip/0' | sha256sum` prints them.
    assert key(1234, "noise", "clip", 0) == 0x574B0B11BC6952EE >> 1


def test_drawing_one_stream_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.randn(4, generator=generator(1, "noise", 7, 0))
    torch.randn(100, generator=generator(1, "timestep", 7, 0))
    assert torch.equal(first, torch.randn(4, generator=generator(1, "noise", 7, 0)))
    assert torch.equal(before, torch.get_rng_state())
