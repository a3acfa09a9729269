"""Near names: found among many without looking at many."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.lifecycle.names import NearNames


@pytest.mark.parametrize(
    "typo", ["pirat", "pirate2", "Pirate", "irate", "xpirate", "pirtae", "pirates"]
)
def test_a_typo_anywhere_finds_the_name(typo):
    names = NearNames([*(f"adapter-{i:05}" for i in range(5000)), "pirate", "robot"])
    assert names.near(typo)[0] == "pirate"


def test_nothing_like_it_finds_nothing():
    assert NearNames(["pirate", "robot"]).near("zzzzzzzz") == []
    assert NearNames([]).near("a") == []


def test_a_long_text_is_cut():
    assert NearNames(["x" * 128]).near("x" * 10_000_000) == ["x" * 128]


def test_it_compares_with_few(monkeypatch):
    compared = []
    original = difflib.get_close_matches

    def counting(word, possibilities, n, cutoff):
        compared.append(len(possibilities))
        return original(word, possibilities, n, cutoff)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    NearNames([f"adapter-{i:05}" for i in range(10_000)]).near("adapter-00500x")
    assert compared
    assert max(compared) <= 8


@given(
    st.lists(st.text("abc", min_size=4, max_size=9), max_size=40, unique=True),
    st.data(),
)
def test_one_wrong_character_finds_the_name(names, data):
    pool = [*names, "pirate"]
    at = data.draw(st.integers(0, 5))
    typo = "pirate"[:at] + data.draw(st.sampled_from(["", "x"])) + "pirate"[at + 1 :]
    found = NearNames(pool).near(typo)
    assert "pirate" in found
    assert len(found) <= 3
    assert set(found) <= set(pool)
