"""The `openai` client against the real server: what applications will do."""

from __future__ import annotations

import json
import math

import openai
import pytest

pytestmark = pytest.mark.e2e

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def base(client):
    return client.models.list().data[0].id


def test_completion_and_stream_agree(client, base):
    arguments = {"model": base, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**arguments)
    chunks = list(
        client.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    )
    assert "Paris" in whole.choices[0].text
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


def test_chat_with_logprobs(client, base):
    answer = client.chat.completions.create(
        model=base,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-5)
        assert len(token.top_logprobs) == 3


def test_n_choices_with_a_seed_repeat(client, base):
    arguments = {
        "model": base,
        "prompt": "Once upon a time",
        "max_tokens": 8,
        "n": 3,
        "temperature": 1.0,
        "seed": 7,
    }
    first, second = (client.completions.create(**arguments) for _ in range(2))
    texts = [c.text for c in first.choices]
    assert texts == [c.text for c in second.choices]
    assert len(set(texts)) > 1
    assert [c.index for c in first.choices] == [0, 1, 2]


def test_stop_string_across_tokens(client, base):
    free = client.completions.create(model=base, prompt=PROMPT, max_tokens=20, temperature=0)
    text = free.choices[0].text
    stop = text[9:14]  # cuts through tokens
    cut = client.completions.create(
        model=base, prompt=PROMPT, max_tokens=20, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_json_schema_is_obeyed(client, base):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=base,
        messages=[{"role": "user", "content": "Describe Paris."}],
        max_tokens=80,
        temperature=1.0,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"city", "people"}
    assert isinstance(value["people"], int)


def test_echo_scores_the_prompt(client, base):
    scored = client.completions.create(
        model=base, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert scored.text == PROMPT
    assert "".join(scored.logprobs.tokens) == PROMPT
    assert scored.logprobs.token_logprobs[0] is None
    assert all(p <= 0 and math.isfinite(p) for p in scored.logprobs.token_logprobs[1:])


def test_token_ids_as_prompt_and_cached_tokens(client, base):
    prompt = list(range(100, 180))
    first, second = (
        client.completions.create(model=base, prompt=prompt, max_tokens=2, temperature=0)
        for _ in range(2)
    )
    assert first.usage.prompt_tokens == 80
    assert second.usage.prompt_tokens_details.cached_tokens == 64
    assert first.choices[0].text == second.choices[0].text


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "pirat"}, 404, "pirate"),
        ({"temperature": 9.0}, 400, "temperature"),
        ({"n": 1000}, 400, "n"),
        ({"stop": [str(i) for i in range(50)]}, 400, "stop"),
        ({"extra_body": {"temprature": 1}}, 400, "temprature"),
        ({"prompt": "word " * 9000}, 400, "8192"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ],
)
def test_errors_have_openais_shape(client, base, change, status, words):
    arguments = {"model": base, "prompt": PROMPT, "max_tokens": 2} | change
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**arguments)
    assert caught.value.status_code == status
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "code", "param"}
    assert words in json.dumps(body)
