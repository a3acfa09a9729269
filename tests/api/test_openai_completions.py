"""/v1/completions, not streamed: shapes, echo, logprobs, batches, seeds, parameters."""

import threading
from dataclasses import replace

import pytest
from support.api import Api, assert_error, settings_of
from support.fake_engine import BOS, CONTEXT, EOS, ByteTokenizer, FakeEngine, logprob_of

from manyhats.api.schemas import CompletionRequest
from manyhats.types import DEFAULT_TENANT, AdapterRef, Digest


def test_the_whole_shape():
    api = Api()
    response = api.complete(seed=7)
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id") == api.engine.requests[0].request_id
    assert api.engine.requests[0].request_id.startswith("cmpl-")
    assert body.pop("created") >= 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "org/base",
        "system_fingerprint": "fp_abababababab",
        "choices": [{"index": 0, "text": "base #7 é!", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 12,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


@pytest.mark.parametrize(
    ("model", "served_by"),
    [("org/base", "baseline"), ("pirate", "pirate@2"), ("pirate@1", "pirate@1")],
)
def test_what_served_it_is_in_the_header_and_the_name_asked_for_in_the_body(model, served_by):
    api = Api()
    response = api.complete(model=model, seed=0)
    assert response.headers["x-manyhats-served-by"] == served_by
    assert response.json()["model"] == model
    adapter = api.engine.requests[0].adapter
    assert (None if adapter is None else str(adapter)) == (
        None if served_by == "baseline" else served_by
    )
    assert api.engine.requests[0].tenant == DEFAULT_TENANT


def test_every_sampling_field_reaches_the_engine():
    api = Api()
    api.complete(
        max_tokens=20, min_tokens=2, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=-5,
        frequency_penalty=-1.5, presence_penalty=1.5, repetition_penalty=1.2,
        logit_bias={"7": -100, "65": 2.5}, stop=["x", "yy"], stop_token_ids=[9, 10],
        ignore_eos=True, logprobs=3,
    )  # fmt: skip
    (params,) = api.engine.requests[0].params
    assert (params.max_tokens, params.min_tokens, params.seed) == (20, 2, -5)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.1)
    assert (params.frequency_penalty, params.presence_penalty) == (-1.5, 1.5)
    assert params.repetition_penalty == 1.2
    assert params.logit_bias == ((7, -100.0), (65, 2.5))
    assert params.stop == ("x", "yy")
    assert params.stop_token_ids == {9, 10}
    assert params.ignore_eos is True
    assert (params.logprobs, params.prompt_logprobs, params.grammar) == (3, None, None)


def test_defaults_and_nulls_are_the_same():
    api = Api()
    fields = set(CompletionRequest.model_fields) - {"model", "prompt", "seed"}
    api.complete(seed=1)
    api.complete(seed=1, **dict.fromkeys(fields))
    plain, nulls = (request.params for request in api.engine.requests)
    assert plain == nulls
    assert (plain[0].max_tokens, plain[0].temperature, plain[0].top_k) == (16, 1.0, 0)


def test_zeros_are_not_defaults():
    api = Api()
    api.complete(temperature=0, seed=0, min_p=0, frequency_penalty=0, stop_token_ids=[], n=1)
    (params,) = api.engine.requests[0].params
    assert (params.temperature, params.seed) == (0.0, 0)


@pytest.mark.parametrize("off", [-1, 0, None])
def test_top_k_off(off):
    api = Api()
    assert api.complete(top_k=off).status_code == 200
    assert api.engine.requests[0].params[0].top_k == 0


def test_harmless_fields_are_accepted():
    response = Api().complete(
        user="u", metadata={"k": "v"}, store=False, service_tier="auto", best_of=1, suffix=None
    )
    assert response.status_code == 200


def test_choices_have_distinct_seeds_and_the_first_is_the_callers():
    api = Api()
    first = api.complete(n=3, seed=41).json()
    again = api.complete(n=3, seed=41).json()
    alone = api.complete(seed=41).json()
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [choice["text"] for choice in again["choices"]] == texts
    assert alone["choices"][0]["text"] == texts[0]
    seeds = [params.seed for params in api.engine.requests[0].params]
    assert seeds[0] == 41
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_without_a_seed_one_is_drawn_for_each_prompt():
    api = Api()
    api.complete(prompt=["same", "same"])
    api.complete()
    seeds = {request.params[0].seed for request in api.engine.requests}
    assert len(seeds) == 3


def test_a_batch_of_prompts_is_indexed_by_prompt_then_choice():
    api = Api()
    body = api.complete(prompt=["a", "bb", "ccc"], n=2, seed=3, echo=True).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [choice["text"].partition("base")[0] for choice in body["choices"]] == [
        "a", "a", "bb", "bb", "ccc", "ccc",
    ]  # fmt: skip
    assert body["choices"][0]["text"][1:] == body["choices"][4]["text"][3:]  # same seed
    assert body["usage"]["prompt_tokens"] == 6  # each prompt once, whatever n
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 1 + 2 + 3
    ids = [request.request_id for request in api.engine.requests]
    assert ids == [f"{body['id']}-{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("Hé", [(72, 0xC3, 0xA9)]),
        (["a", "b"], [(97,), (98,)]),
        ([1, 2, 299], [(1, 2, 299)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        ("a\x00b", [(97, 0, 98)]),
    ],
)
def test_the_forms_of_a_prompt(prompt, tokens):
    api = Api()
    assert api.complete(prompt=prompt).status_code == 200
    assert [request.prompt_token_ids for request in api.engine.requests] == tokens


def test_an_empty_prompt_is_the_bos_token_where_the_tokenizer_adds_one():
    api = Api(engine=FakeEngine(tokenizer=ByteTokenizer(bos=True)))
    assert api.complete(prompt="").status_code == 200
    assert api.engine.requests[0].prompt_token_ids == (BOS,)
    assert_error(Api().complete(prompt=""), 400, "invalid_request", "prompt", "at least one token")


def test_logprobs_in_the_legacy_format():
    body = Api().complete(prompt="x", logprobs=2, seed=0, max_tokens=12).json()
    shown = body["choices"][0]["logprobs"]
    assert set(shown) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    # "base #0 é!" and the end token: the two bytes of é are no characters by themselves
    tokens = [*"base #0 ", "bytes:\\xc3", "bytes:\\xa9", "!", "</s>"]
    assert shown["tokens"] == tokens
    assert shown["token_logprobs"][0] == logprob_of(ord("b"))
    assert shown["token_logprobs"][-1] == logprob_of(EOS)
    # offsets count characters; é counts once, and the end token has no text
    assert shown["text_offset"] == [*range(9), 8, 9, 10]
    assert body["choices"][0]["text"] == "base #0 é!"
    # two alternatives, and the chosen token, which was not among them
    assert shown["top_logprobs"][0] == {"bytes:\\xc3": -0.25, "c": -0.5, "b": logprob_of(98)}


def test_logprobs_zero_shows_the_chosen_token_alone():
    shown = Api().complete(logprobs=0, seed=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert shown["top_logprobs"] == [{"b": logprob_of(98)}]


def test_minus_infinity_is_shown_as_json_can(monkeypatch):
    monkeypatch.setattr("support.fake_engine.logprob_of", lambda _: float("-inf"))
    shown = Api().complete(logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]
    assert shown["token_logprobs"] == [-9999.0]


def test_echo_with_logprobs_begins_with_the_prompt():
    api = Api()
    body = api.complete(prompt="Hé", echo=True, logprobs=1, seed=0, max_tokens=2).json()
    choice = body["choices"][0]
    assert choice["text"] == "Héba"
    shown = choice["logprobs"]
    assert shown["tokens"] == ["H", "bytes:\\xc3", "bytes:\\xa9", "b", "a"]
    assert shown["token_logprobs"] == [None, *map(logprob_of, [0xC3, 0xA9, 98, 97])]
    assert shown["top_logprobs"][0] is None
    assert shown["text_offset"] == [0, 1, 1, 2, 3]
    assert api.engine.requests[0].params[0].prompt_logprobs == 1
    assert body["usage"]["completion_tokens"] == 2


def test_the_bos_token_takes_no_room_in_the_offsets():
    api = Api(engine=FakeEngine(tokenizer=ByteTokenizer(bos=True)))
    choice = api.complete(prompt="Hi", echo=True, logprobs=0, max_tokens=1, seed=0).json()
    shown = choice["choices"][0]["logprobs"]
    assert shown["tokens"] == ["<s>", "H", "i", "b"]
    assert shown["text_offset"] == [0, 0, 1, 2]


def test_echo_of_token_ids_is_their_text():
    choice = Api().complete(prompt=[72, EOS, 105], echo=True, max_tokens=1, seed=0).json()
    assert choice["choices"][0]["text"] == "H</s>ib"


@pytest.mark.parametrize("stop_at", [0, 1])
def test_scoring_as_evaluation_harnesses_do(stop_at):
    """echo + logprobs with max_tokens 0 or 1 over several prompts of token ids."""
    api = Api()
    prompts = [[10, 20, 30], [40, 50]]
    body = api.complete(
        prompt=prompts, echo=True, logprobs=1, max_tokens=stop_at, temperature=0, seed=1234
    ).json()
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        shown = choice["logprobs"]
        lengths = {len(values) for values in shown.values()}
        assert lengths == {len(prompt) + stop_at}
        assert shown["token_logprobs"][1 : len(prompt)] == [logprob_of(i) for i in prompt[1:]]
        assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2 * stop_at
    assert [request.params[0].max_tokens for request in api.engine.requests] == [1, 1]


def test_a_long_echo_and_a_long_prompt_leave_the_event_loop():
    long = Api(settings=settings_of(max_body_kb=64))
    too_long = "a" * 5000
    assert_error(long.complete(prompt=too_long), 400, "context_length_exceeded", "prompt")
    assert long.complete(prompt="short").status_code == 200
    first, second = long.engine.tokenizer.encoded_on
    assert first != threading.current_thread().name
    assert second == threading.current_thread().name


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT - 5])
def test_an_omitted_max_tokens_takes_the_room_that_is_left(length):
    api = Api()
    assert api.complete(prompt="a" * length).status_code == 200
    assert api.engine.requests[0].params[0].max_tokens == min(16, CONTEXT - length)


def test_an_adapters_virtual_tokens_leave_less_context_and_are_in_no_count():
    api = Api()
    card = api.directory.cards[0]
    api.directory.cards.append(replace(card, ref=AdapterRef("soft", 1, Digest("aa" * 32), 30)))
    body = api.complete(model="soft", prompt="a" * 100, max_tokens=70).json()
    assert body["usage"]["prompt_tokens"] == 100
    assert api.engine.requests[-1].adapter.virtual_tokens == 30
    assert len(api.engine.requests[-1].prompt_token_ids) == 100
    # fmt: off
    assert_error(
        api.complete(model="soft", prompt="a" * 100, max_tokens=71),
        400, "context_length_exceeded", "max_tokens", "71", "context of 170",
    )
    assert_error(
        api.complete(model="soft", prompt="a" * 170),
        400, "context_length_exceeded", "prompt", "bound of the prompt is 169",
    )
    # fmt: on


def test_max_tokens_may_fill_the_context_exactly_and_no_more():
    api = Api()
    assert api.complete(prompt="a" * 100, max_tokens=100).status_code == 200
    assert_error(
        api.complete(prompt="a" * 100, max_tokens=101),
        400, "context_length_exceeded", "max_tokens", "101", "100 tokens", "200",
    )  # fmt: skip
    assert_error(
        api.complete(prompt="a" * 200),
        400, "context_length_exceeded", "prompt", "200 tokens", "bound of the prompt is 199",
    )  # fmt: skip


def test_a_long_echo_with_logprobs():
    engine = FakeEngine()
    api = Api(engine=engine)
    engine_context = 199
    body = api.complete(prompt=[65] * engine_context, echo=True, logprobs=1, max_tokens=0).json()
    assert body["choices"][0]["text"] == "A" * engine_context
    assert body["choices"][0]["logprobs"]["text_offset"] == list(range(engine_context))
