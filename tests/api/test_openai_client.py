"""The `openai` client against the real application on a loopback socket, the engine faked."""

import threading
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel
from support.api import Api, serving
from support.fake_engine import FakeEngine

from manyhats.errors import EngineFailedError, QueueFullError


class Served:
    """A served application, its engine and a client."""

    def __init__(self, api: Api, address: tuple[str, int]) -> None:
        self.engine = api.engine
        self.client = openai.OpenAI(
            base_url=f"http://{address[0]}:{address[1]}/v1",
            api_key="any",
            max_retries=0,
            timeout=30,
        )


@pytest.fixture
def served() -> Iterator[Served]:
    api = Api(engine=FakeEngine())
    with serving(api.app) as address:
        one = Served(api, address)
        with one.client:
            yield one


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_models(served):
    assert [model.id for model in served.client.models.list()] == [
        "org/base", "haiku", "pirate", "pirate@1",
    ]  # fmt: skip
    assert served.client.models.retrieve("pirate").id == "pirate"
    with pytest.raises(openai.NotFoundError, match="near names: pirate"):
        served.client.models.retrieve("pirat")


def test_chat(served):
    answer = served.client.chat.completions.create(
        model="pirate", messages=MESSAGES, seed=7, n=2, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == "pirate@2 #7 é!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].token == "p"
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    raw = served.client.chat.completions.with_raw_response.create(
        model="pirate", messages=MESSAGES, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-manyhats-served-by"] == "pirate@2"
    assert raw.headers["x-request-id"] == "mine"


def test_an_answer_can_be_sent_back(served):
    first = served.client.chat.completions.create(model="org/base", messages=MESSAGES)
    messages = [*MESSAGES, first.choices[0].message.model_dump(), *MESSAGES]
    again = served.client.chat.completions.create(model="org/base", messages=messages)
    assert again.choices[0].message.role == "assistant"


def test_streamed_chat(served):
    stream = served.client.chat.completions.create(
        model="haiku",
        messages=MESSAGES,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "haiku@1 #7 é!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len("haiku@1 #7 é!".encode()) + 1


def test_streamed_chat_through_the_clients_own_accumulator(served):
    with served.client.chat.completions.stream(
        model="org/base", messages=MESSAGES, seed=1, n=2, logprobs=True
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "base #1 é!"
    assert len(final.choices) == 2
    assert len(final.choices[0].logprobs.content) == 12


def test_completions(served):
    answer = served.client.completions.create(
        model="org/base", prompt=["a", "b"], n=2, echo=True, logprobs=1, seed=2, max_tokens=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[2].text == "bbas"
    assert answer.choices[2].logprobs.tokens == ["b", "b", "a", "s"]
    assert answer.choices[2].logprobs.token_logprobs[0] is None
    stream = served.client.completions.create(
        model="org/base", prompt="a", seed=2, max_tokens=3, stream=True
    )
    assert [chunk.choices[0].text for chunk in stream] == ["b", "a", "s"]


class Person(BaseModel):
    name: str
    age: int


def test_a_schema_as_the_client_makes_it(served):
    served.client.chat.completions.create(
        model="org/base",
        messages=MESSAGES,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "Person", "schema": Person.model_json_schema(), "strict": True},
        },
    )
    assert '"age"' in served.engine.requests[0].params[0].grammar.schema


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"model": "nope"}, openai.NotFoundError, "no model"),
        ({"temperature": 3}, openai.BadRequestError, "less than or equal to 2"),
        ({"max_tokens": 9999}, openai.BadRequestError, "context of 200"),
        ({"extra_body": {"what": 1}}, openai.BadRequestError, "unknown field"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, openai.APIStatusError, "16384"),
    ],
)  # fmt: skip
def test_errors(served, change, kind, match):
    with pytest.raises(kind, match=match) as caught:
        served.client.chat.completions.create(
            **{"model": "org/base", "messages": MESSAGES, **change}
        )
    assert caught.value.type
    assert caught.value.code


def test_a_body_of_many_megabytes_still_gets_its_answer(served):
    """The client is still sending when the refusal comes: it must see it all the same."""
    for _ in range(5):
        with pytest.raises(openai.APIStatusError) as caught:
            served.client.completions.create(model="org/base", prompt="x" * (4 << 20))
        assert caught.value.status_code == 413
        assert caught.value.code == "body_too_large"


def test_a_full_queue(served):
    served.engine.refuse = QueueFullError("the queue is at its bound of 1024", retry_after_s=3)
    with pytest.raises(openai.RateLimitError) as caught:
        served.client.chat.completions.create(model="org/base", messages=MESSAGES, stream=True)
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "queue_full"


def test_an_error_in_mid_stream(served):
    served.engine.error = EngineFailedError("the step failed")
    stream = served.client.completions.create(model="org/base", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="the step failed"):
        list(stream)


def test_a_client_that_closes_its_stream_aborts(served):
    """The engine hangs in mid-answer; closing the connection is all that ends it."""
    aborted = threading.Event()

    class Noticed(list):
        def append(self, item: str) -> None:
            super().append(item)
            aborted.set()

    served.engine.aborted = Noticed()
    served.engine.hang_after = 2
    stream = served.client.completions.create(model="org/base", prompt="x", stream=True)
    next(iter(stream))
    stream.close()
    assert aborted.wait(30)
    assert served.engine.aborted == [served.engine.requests[0].request_id]
