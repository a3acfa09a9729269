"""How a false-alarm rate is divided over endlessly many tests."""

from __future__ import annotations


def share(number: int) -> float:
    """The part of the whole rate that test ``number`` (1, 2, ...) may spend; all come to 1.

    Tests 2^k to 2^(k+1) - 1 share 1 / ((k + 1)(k + 2)) equally:
    ``share(i) = 1 / ((k + 1)(k + 2) 2^k)``, k = floor(log2 i); the sum over k telescopes to 1. It
    falls hardly faster than 1 / i, so that a late test is still worth something (alpha spending;
    Foster and Stine 2008 for the same over a stream of hypotheses).
    """
    if number < 1:
        raise ValueError(f"tests count from 1, not {number}")
    k = number.bit_length() - 1
    return 1 / ((k + 1) * (k + 2) * (1 << k))
