import ast
import re
from pathlib import Path

import pytest

from mm.config.units import format_bytes, in_gib

MM = Path(__file__).parents[2] / "mm"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (1_000_000, "976.56 KiB"),
        (64 * 2**20, "64.00 MiB"),
        (10**9, "953.67 MiB"),
        (80 * 10**9, "74.51 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
    ],
)
def test_bytes_in_words(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_a_column_of_gib() -> None:
    assert (in_gib(3 * 2**29), in_gib(2**20, 3)) == ("1.50", "0.001")


def test_nothing_is_printed_in_powers_of_ten() -> None:
    """No text that is put together with a size calls it MB or GB, and nobody divides by 2**30 but the one function."""
    for path in MM.rglob("*.py"):
        if path.name == "units.py":
            continue
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                assert not re.search(r"\} ?[kKMGT]B\b", ast.unparse(node)), f"{path}:{node.lineno}"
        assert not re.search(r"/ ?(2\*\*[23]0|1024|1e9)\b.*\}", text), path
