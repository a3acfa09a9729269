"""The counter-based uniforms."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.randomness import mix64, stream_starts, uniforms

MASK = (1 << 64) - 1


def splitmix64(state):
    """Vigna's splitmix64.c in plain integers: the next output of a generator at ``state``."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_mix64_gives_the_published_sequence():
    # Outputs of splitmix64.c for seed 1234567, as listed on Rosetta Code.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) & MASK for i in range(5)]
    assert mix64(np.array(states, np.uint64)).tolist() == expected


@given(st.lists(st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 2**40)), max_size=5))
def test_a_uniform_is_a_pure_function_of_seed_and_position(pairs):
    starts = stream_starts([seed for seed, _ in pairs])
    positions = np.array([position for _, position in pairs], np.uint64)
    expected = []
    for seed, position in pairs:
        start = splitmix64((seed - 0x9E3779B97F4A7C15) & MASK)
        word = splitmix64((start + position * 0x9E3779B97F4A7C15) & MASK)
        expected.append((word >> 11) / 2**53)
    assert uniforms(starts, positions).tolist() == expected


def test_neighbouring_seeds_and_positions_look_independent():
    n = 300
    starts = np.repeat(stream_starts(range(n)), n)
    u = uniforms(starts, np.tile(np.arange(n, dtype=np.uint64), n)).reshape(n, n)
    assert 0.0 <= u.min() < 1e-4
    assert 0.9999 < u.max() < 1.0
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - n * n / 100) ** 2 / (n * n / 100)).sum() < 99 + 4 * (2 * 99) ** 0.5
    for other in (np.roll(u, 1, axis=0), np.roll(u, 1, axis=1), u.T):
        off = ~np.eye(n, dtype=bool)
        assert abs(np.corrcoef(u[off], other[off])[0, 1]) < 4 / n
