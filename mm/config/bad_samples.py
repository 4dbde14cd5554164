"""`--on-bad-sample`: whether samples that cannot be read stop the work, or up to a share of them are left out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mm.errors import ConfigError

_SKIP = re.compile(r"skip:max=(\d{1,3}(?:\.\d{1,9})?)%")


@dataclass(frozen=True, slots=True)
class OnBadSample:
    """Policy for samples that cannot be read.

    Attributes:
        max_share: the part of all samples that may be left out, below 1; 0 stops at the first.
    """

    max_share: Fraction = Fraction(0)

    @property
    def skips(self) -> bool:
        """True where any may be left out."""
        return self.max_share > 0

    def allowed(self, num_samples: int) -> int:
        """Number of samples out of `num_samples` that may be left out: the share of them, rounded down."""
        return int(self.max_share * num_samples)

    def __str__(self) -> str:
        return f"skip:max={float(self.max_share * 100):g}%" if self.skips else "fail"


FAIL = OnBadSample()


def parse_on_bad_sample(text: str, name: str = "--on-bad-sample") -> OnBadSample:
    """Read the value: `fail`, or `skip:max=` and a percentage above 0 and below 100, as in `skip:max=0.1%`.

    Args:
        text: the value. name: the user's word for it.

    Raises:
        ConfigError: CFG-110 for anything else.
    """
    if text == "fail":
        return FAIL
    found = _SKIP.fullmatch(text)
    share = Fraction(found[1]) / 100 if found else Fraction(0)
    if not 0 < share < 1:
        raise ConfigError(
            "CFG-110",
            f'{name} is "{text}", expected fail, or skip:max=P% with P above 0 and below 100.',
            "Use fail to stop at the first bad sample, or for example skip:max=0.1%.",
        )
    return OnBadSample(share)
