"""A shuffle that is computed, not stored: sample by sample, in constant memory.

A generalized Feistel network permutes a rectangle of at least ``length``
numbers; a number that falls outside ``length`` is permuted again until it
falls inside ("cycle walking"), which leaves a permutation of ``range(length)``.

Sources: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains",
CT-RSA 2002 (both constructions); the round function is the finalizer of
SplitMix64, G. Steele, D. Lea and C. Flood, "Fast Splittable Pseudorandom
Number Generators", OOPSLA 2014.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 12


class Permutation:
    """A pseudorandom permutation of ``range(length)``, fixed by ``seed`` and ``epoch``.

    Every process computes the same one on every machine. It shuffles well and
    is no cipher: the round keys are 64 bits of mixing, not a secret.

    Args:
        length: how many numbers are permuted.
        seed: any integer; 64 bits of it are used.
        epoch: chooses among the permutations of one seed.
    """

    def __init__(self, length: int, seed: int, epoch: int) -> None:
        self.length = length
        # A rectangle rows x columns, less than one row larger than the length, so that walking is rare.
        self._rows = math.isqrt(max(length - 1, 0)) + 1
        self._columns = max(1, -(-length // self._rows))
        state = _mix((_mix(seed & _MASK) + epoch) & _MASK)
        self._keys = [_mix((state + turn * _GOLDEN) & _MASK) for turn in range(1, _ROUNDS + 1)]

    def __call__(self, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Return which numbers lie at ``positions`` (any shape, each from 0 to length - 1)."""
        places = self._pass(positions.astype(np.uint64))
        while (outside := places >= self.length).any():
            places[outside] = self._pass(places[outside])
        return places.astype(np.int64)

    def _pass(self, numbers: Numbers) -> Numbers:
        """Permute the rectangle: each round shifts one coordinate by a hash of the other."""
        columns = np.uint64(self._columns)
        left, right = numbers // columns, numbers % columns
        for turn, key in enumerate(self._keys):
            if turn % 2:
                left = (left + _mix_all(right, key)) % np.uint64(self._rows)
            else:
                right = (right + _mix_all(left, key)) % columns
        permuted: Numbers = left * columns + right
        return permuted


def _mix(value: int) -> int:
    """Return the SplitMix64 finalizer of a 64-bit number."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_all(values: Numbers, key: int) -> Numbers:
    """Return 32 bits of the finalizer of each value under ``key``; few enough that adding cannot overflow."""
    values = values * np.uint64(_GOLDEN) + np.uint64(key)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    high: Numbers = (values ^ (values >> np.uint64(31))) >> np.uint64(32)
    return high
