"""What an evaluation reads, measures and judges, by hand-computed values."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_engine import ByteTokenizer

from manyhats.engine.interface import LaneScores
from manyhats.errors import RequestError
from manyhats.lifecycle.evaluation.gate import Thresholds, judge
from manyhats.lifecycle.evaluation.measures import Tally, calibration_error, mean, stability
from manyhats.lifecycle.evaluation.perturb import with_case, with_typos
from manyhats.lifecycle.evaluation.probes import (
    MAX_CHARS,
    MAX_LINES,
    Rule,
    general_pairs,
    read_pairs,
    read_rules,
    tokens_of,
)


def scores(logprobs, tops, confidences, divergences=()) -> LaneScores:
    return LaneScores(
        None, tuple(logprobs), tuple(tops), tuple(confidences), (), tuple(divergences), (), ()
    )


def test_a_tally_of_two_completions():
    tally = Tally()
    tally.add(scores([math.log(0.5), math.log(0.25)], [7, 8], [0.5, 0.4], [0.1, 0.3]), [7, 8])
    tally.add(scores([math.log(0.125)], [3], [0.9], [0.8]), [4])
    assert tally.perplexity == pytest.approx(4.0)  # (1/2 * 1/4 * 1/8) ** (-1/3)
    assert tally.exact_match == 0.5
    assert tally.divergence == pytest.approx(0.4)
    assert tally.correct == [True, True, False]
    assert tally.shown() == {
        "items": 2, "tokens": 3, "perplexity": pytest.approx(4.0), "exact_match": 0.5,
    }  # fmt: skip


def test_nothing_measured_is_no_number():
    assert math.isnan(Tally().perplexity)
    assert math.isnan(Tally().exact_match)
    assert math.isnan(calibration_error([], []))
    assert math.isnan(mean([]))
    assert Tally().shown()["perplexity"] is None


def test_calibration_error_by_hand():
    """Ten bins: (0.9, 1]: 3 of accuracy 2/3 and confidence 0.95; (0.5, 0.6]: 1, right, at 0.6."""
    error = calibration_error([0.92, 0.95, 0.98, 0.6], [True, True, False, True], bins=10)
    assert error == pytest.approx(3 / 4 * (0.95 - 2 / 3) + 1 / 4 * (1 - 0.6))
    assert calibration_error([1.0, 1.0], [True, True]) == 0
    assert calibration_error([1.0, 1.0], [False, False]) == 1
    assert calibration_error([0.5, 0.5], [True, False], bins=1) == 0


def test_edges_of_bins_belong_below():
    """0.2 lies in (0.1, 0.2], where it meets 0.15; 0.21 does not."""
    together = calibration_error([0.2, 0.15], [False, True], bins=10)
    assert together == pytest.approx(abs(1 - 0.35) / 2)
    apart = calibration_error([0.21, 0.15], [False, True], bins=10)
    assert apart == pytest.approx((0.21 + 0.85) / 2)


@given(
    st.lists(st.tuples(st.floats(1e-6, 1.0), st.booleans()), min_size=1, max_size=50),
    st.integers(1, 20),
)
def test_calibration_error_is_a_share_and_blind_to_order(tokens, bins):
    found = [calibration_error(*zip(*t, strict=True), bins) for t in (tokens, tokens[::-1])]
    assert found[0] == pytest.approx(found[1])
    assert 0 <= found[0] <= 1
    accuracy = sum(right for _, right in tokens) / len(tokens)
    confidence = sum(c for c, _ in tokens) / len(tokens)
    assert found[0] >= abs(accuracy - confidence) - 1e-9


def test_stability_is_the_share_of_equal_tokens():
    assert stability([1, 2, 3, 4], [1, 9, 3, 9]) == 0.5


def test_rows_have_their_side_and_bound():
    bounds = Thresholds(general_divergence=1.0, calibration_error=None, rules_kept=0.9)
    measured = {
        "rules_kept": 0.8,
        "general_divergence": 1.0,
        "calibration_error": 0.99,
        "own_perplexity_to_base": math.inf,
        "robustness_over_base": -0.2,
    }
    rows = {row.measure: row for row in judge(measured, bounds)}
    assert {name: row.passed for name, row in rows.items()} == {
        "own_perplexity_to_base": False,
        "general_divergence": True,
        "calibration_error": True,
        "robustness_over_base": True,
        "rules_kept": False,
    }
    assert rows["own_perplexity_to_base"].shown() == {
        "measure": "own_perplexity_to_base", "value": None, "bound": 1.05, "at": "most",
        "passed": False,
    }  # fmt: skip
    assert rows["rules_kept"].described() == "rules_kept 0.8 (at least 0.9)"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is not a JSON object"),
        ('{"prompt": "a"}', "line 2: completion is missing"),
        ('{"prompt": "", "completion": "b"}', "line 2: prompt: "),
        ('{"prompt": "a", "completion": "b", "x": 1}', "line 2: x: "),
        ('{"prompt": 3, "completion": "b"}', "line 2: prompt: "),
        ('{"completion": "b"}', "line 2: give prompt or messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: messages must end"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]}',
            "line 2: messages.1.role: ",
        ),
    ],
)
def test_a_bad_pair_is_named_by_line_and_field(line, words):
    with pytest.raises(RequestError) as refusal:
        read_pairs('{"prompt": "a", "completion": "b"}\n' + line)
    assert words in refusal.value.message
    assert refusal.value.param == "data"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give must_match, must_not_match or json_schema"),
        ({"must_match": "("}, "no regular expression"),
        ({"json_schema": {"type": "nothing"}}, "json_schema: "),
        ({"must_match": "a", "max_tokens": 0}, "max_tokens: "),
        ({"json_schema": {"items": {"patternProperties": {}}}}, "patternProperties"),
    ],
)
def test_a_bad_rule_is_named(fields, words):
    with pytest.raises(RequestError, match="rules: line 1: ") as refusal:
        read_rules(json.dumps({"prompt": "a", **fields}))
    assert words in refusal.value.message


def test_bounds_of_the_texts():
    line = '{"prompt": "a", "completion": "b"}\n'
    assert len(read_pairs("\n" + line * MAX_LINES)) == MAX_LINES
    with pytest.raises(RequestError, match=f"{MAX_LINES + 1} lines, at most {MAX_LINES}"):
        read_pairs(line * (MAX_LINES + 1))
    with pytest.raises(RequestError, match="characters"):
        read_pairs(" " * (MAX_CHARS + 1))


def test_rules():
    def broken(answer, **rule):
        return Rule.model_validate({"prompt": "p", **rule}).broken_by(answer)

    assert broken("yes, sir", must_match="^yes") is None
    assert broken("no", must_match="^yes") == "must_match"
    assert broken("damn it", must_not_match="(?i)DAMN") == "must_not_match"
    schema = {"type": "object", "required": ["a"]}
    assert broken('{"a": 1}', json_schema=schema) is None
    assert broken('{"b": 1}', json_schema=schema) == "json_schema"
    assert broken("a: 1", json_schema=schema) == "json_schema: the answer is not JSON"
    away = {"$ref": "http://127.0.0.1:1/x"}
    assert "cannot be held" in broken("{}", json_schema=away)
    evil, answer = r"^(a|a|aa)+$", "a" * 60 + "!"
    assert "took over 0.5 s" in broken(answer, must_match=evil)
    assert "cannot be held" in broken(json.dumps(answer), json_schema={"pattern": evil})
    assert broken('"ab"', json_schema={"pattern": "^a"}) is None
    assert broken('"ba"', json_schema={"pattern": "^a"}) == "json_schema"


def test_tokens_of_pairs_and_conversations():
    tokenizer = ByteTokenizer(bos=True)
    [plain, chat] = read_pairs(
        '{"prompt": "ab", "completion": "c"}\n'
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}]}'
    )
    assert tokens_of(plain, tokenizer) == ((256, 97, 98, 99), 3)
    ids, start = tokens_of(chat, tokenizer)
    assert (bytes(ids[:start]), bytes(ids[start:])) == (b"u:q\na:", b"z")


def test_the_general_probes():
    pairs = general_pairs()
    assert 40 <= len(pairs) <= 60
    assert len({p.prompt for p in pairs}) == len(pairs)
    assert all(p.prompt and p.answer.strip() for p in pairs)


@given(st.text(max_size=60), st.integers(0, 9))
def test_typos_swap_letters_and_are_the_same_each_time(text, seed):
    typed = with_typos(text, seed)
    assert typed == with_typos(text, seed)
    assert sorted(typed) == sorted(text)
    assert with_case(text, seed) == with_case(text, seed)


def test_every_probe_is_changed_by_both():
    for index, pair in enumerate(general_pairs()):
        words = sum(len(w) >= 4 for w in pair.prompt.split())
        if words:
            typed = with_typos(pair.prompt, index)
            assert typed != pair.prompt
            assert sum(a != b for a, b in zip(typed, pair.prompt, strict=True)) <= 2 * words
        cased = with_case(pair.prompt, index)
        assert cased != pair.prompt
        assert cased.lower() == pair.prompt.lower()
