"""A random order that costs no memory: each place of a permutation is computed by itself."""

from __future__ import annotations

_ROUNDS = 8
_MASK = 2**64 - 1


class KeyedBijection:
    """A permutation of 0 .. size - 1 that a key chooses, and its inverse.

    A Feistel network over the fewest bits that hold `size`, walked along its cycles until the value is below `size`:
    two walks on average at most, and more for a few values, which get six bits so that all their orders come equally
    often.
    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 3 (cycle walking) and 5
    (generalised Feistel); the round function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """

    def __init__(self, size: int, key: int) -> None:
        """Take the number of values, at least 1, and a key of 64 bits."""
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        self.size = size
        bits = max(6, (size - 1).bit_length())
        self._low_bits, self._high_bits = bits // 2, bits - bits // 2
        self._keys = [_mixed(key + (number + 1) * 0x9E3779B97F4A7C15) for number in range(_ROUNDS)]

    def __call__(self, place: int) -> int:
        """The value at a place."""
        value = self._encrypted(self._checked(place))
        while value >= self.size:
            value = self._encrypted(value)
        return value

    def place_of(self, value: int) -> int:
        """The place at which a value stands."""
        place = self._decrypted(self._checked(value))
        while place >= self.size:
            place = self._decrypted(place)
        return place

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.size:
            raise IndexError(f"{number} is not in 0 .. {self.size - 1}")
        return number

    def _encrypted(self, value: int) -> int:
        """One pass; each round replaces one of the two halves, in turn, by itself and a mix of the other."""
        high, low = value >> self._low_bits, value & ((1 << self._low_bits) - 1)
        for number, key in enumerate(self._keys):
            if number % 2:
                low ^= _mixed(high + key) >> (64 - self._low_bits)
            else:
                high ^= _mixed(low + key) >> (64 - self._high_bits)
        return high << self._low_bits | low

    def _decrypted(self, value: int) -> int:
        high, low = value >> self._low_bits, value & ((1 << self._low_bits) - 1)
        for number, key in reversed(list(enumerate(self._keys))):
            if number % 2:
                low ^= _mixed(high + key) >> (64 - self._low_bits)
            else:
                high ^= _mixed(low + key) >> (64 - self._high_bits)
        return high << self._low_bits | low


def _mixed(value: int) -> int:
    """64 bits that depend on all of 64 bits."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
