"""What each signal says of a request."""

from __future__ import annotations

import math

import numpy as np
import pytest

from manyhats.drift.signals import SIGNALS
from manyhats.drift.signals.finished import Ending, Finished
from manyhats.drift.signals.hidden import FITTED, HiddenReference
from manyhats.drift.signals.output import distinct_ratio, is_refusal, output_signals, repetition
from manyhats.drift.signals.prompt import prompt_signals
from manyhats.drift.signals.rescored import Rescored, rescored_signals
from manyhats.drift.signals.script import SCRIPTS, main_script
from manyhats.drift.signals.service import service_signals
from manyhats.types import AdapterRef, Digest, TenantId

REF = AdapterRef("pirate", 2, Digest("ab" * 32))


def done(**changes):
    return Finished(
        **{
            "request_id": "r1",
            "tenant": TenantId("default"),
            "adapter": REF,
            "prompt_token_ids": (1, 2, 3),
            "token_ids": (7, 8, 9, 10, 11),
            "text": "Ahoy there",
            "ending": Ending.STOP,
            **changes,
        }
    )


def test_repetition_counts_repeated_four_grams():
    assert repetition(range(50)) == 0
    assert repetition([5] * 103) == pytest.approx(0.99)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 1, 1]) == 0
    assert distinct_ratio([1, 1, 2, 2]) == 0.5
    assert distinct_ratio([]) == 1


@pytest.mark.parametrize(
    ("text", "declines"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI language model, I have no feelings.", True),
        ("I am unable to provide it", True),
        ("I can't wait to sail!", False),
        ("Arr, I can help with that.", False),
        ("x" * 400 + " I cannot help", False),
        ("", False),
    ],
)
def test_refusals(text, declines):
    assert is_refusal(text) is declines


def test_the_output_of_an_answer():
    values = output_signals(done(text="  \n", token_ids=(4, 4, 4, 4, 4, 4)))
    assert values["empty"] == 1
    assert values["output_tokens"] == 6
    assert values["repetition"] == pytest.approx(2 / 3)
    assert "json_invalid" not in values
    assert output_signals(done(json_asked=True, text='{"a": 1}'))["json_invalid"] == 0
    assert output_signals(done(json_asked=True, text='{"a": 1'))["json_invalid"] == 1
    assert "json_invalid" not in output_signals(done(json_asked=True, ending=Ending.LENGTH))
    assert output_signals(done(ending=Ending.ERROR)) == {"finish_reason": "error"}


def test_the_service_of_an_answer():
    assert service_signals(done()) == {"error": 0, "load_failure": 0}
    failed = service_signals(done(ending=Ending.ERROR, load_failed=True))
    assert failed == {"error": 1, "load_failure": 1}
    timed = service_signals(done(ttft_s=0.25, inter_token_s=0.01))
    assert (timed["ttft_seconds"], timed["inter_token_seconds"]) == (0.25, 0.01)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("What is the capital of France? Ça va", "latin"),
        ("Какая столица", "cyrillic"),
        ("首都は何ですか", "hiragana"),
        ("法国的首都是什么", "cjk"),
        ("ما هي عاصمة", "arabic"),
        ("Ποια είναι", "greek"),
        ("ຍິນດີ", "other"),
        ("1 + 1 = ?", "none"),
        ("", "none"),
    ],
)
def test_scripts(text, script):
    assert main_script(text) == script
    assert script in SCRIPTS
    assert prompt_signals(done(), text) == {"prompt_tokens": 3, "script": script}


def test_rescored_signals_are_means_over_the_answer():
    found = Rescored(
        own_logprobs=(-1.0, -3.0),
        other_logprobs=(-2.0, -5.0),
        kl=(0.5, 1.5),
        agrees=(True, False),
        entropy=(2.0, 1.0),
        prompt_nll=4.0,
    )
    assert rescored_signals(found) == {
        "prompt_nll": 4.0,
        "kl": 1.0,
        "agreement": 0.5,
        "logprob_gap": 1.5,
        "answer_nll": 3.5,
        "mean_logprob": -2.0,
        "mean_entropy": 1.5,
    }
    assert set(rescored_signals(found)) <= set(SIGNALS)
    assert rescored_signals(Rescored((), (), (), (), (), None)) == {}


def test_the_distance_of_hidden_states_tells_another_domain_and_survives_a_restart():
    rng = np.random.default_rng(1)
    away = rng.standard_normal(96)
    reference = HiddenReference()
    for _ in range(FITTED):
        assert reference.add(rng.standard_normal(96)) is None
    again = HiddenReference.load(reference.dump())
    usual = [reference.add(rng.standard_normal(96)) for _ in range(40)]
    other = [again.add(rng.standard_normal(96) + 3 * away) for _ in range(40)]
    assert max(usual) < min(other)
    assert np.mean(usual) == pytest.approx(math.sqrt(12), rel=0.3)
    assert reference.add(()) is None
