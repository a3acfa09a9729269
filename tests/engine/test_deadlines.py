"""A request whose time is up ends with an error, and what it held is free within a step."""

from __future__ import annotations

import copy
import threading
import time

import pytest
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import greedy, tiny_model, tiny_tokenizer

from manyhats.errors import DeadlineExceededError

PROMPT = [5, 9, 33, 7, 12, 60]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def engine(model, tmp_path):
    base = base_of(copy.deepcopy(model), tiny_tokenizer())
    with LocalEngine(base, tmp_path, max_num_seqs=1) as engine:
        yield engine


def test_a_running_one_ends_and_the_next_one_takes_its_place(engine, model):
    loop = engine.engine.loop
    running = engine.submit(PROMPT, params(450, ignore_eos=True), timeout_s=1e6)
    engine.next_delta(running)
    waiting = engine.submit(PROMPT, params(8, ignore_eos=True))
    loop._mailbox.post(lambda: loop._expire(time.monotonic() + 2e6))
    [[output]] = engine.wait(running)
    assert isinstance(output.error, DeadlineExceededError)
    assert output.token_ids
    assert f"after {len(output.token_ids)} tokens" in output.error.message
    [[other]] = engine.wait(waiting)
    assert other.token_ids == greedy(model, PROMPT, 8)
    assert_at_rest(engine)


def test_a_waiting_one_ends_in_the_queue_and_its_siblings_with_it(engine, model):
    with engine.together():
        running = engine.submit(PROMPT, params(4, ignore_eos=True))
        late = engine.submit(PROMPT, params(4), params(4), timeout_s=0.0)
    [outputs] = engine.wait(late)
    [error] = [o.error for o in outputs if o.error is not None]
    assert "before its first token" in error.message
    assert engine.wait(running)[0][0].token_ids == greedy(model, PROMPT, 4)
    assert_at_rest(engine)


def test_a_deadline_wakes_a_loop_that_has_nothing_to_run(model, tmp_path):
    """The adapter never comes, so nothing runs and nobody posts; the deadline alone wakes it."""
    base = base_of(copy.deepcopy(model), tiny_tokenizer())
    gate = threading.Event()

    def load(digest):
        gate.wait(60)
        raise OSError("never mind")

    from manyhats.adapters.parts import CompiledAdapter
    from manyhats.types import Digest

    known = {"slow": CompiledAdapter(Digest("slow"), "lora", {})}
    with LocalEngine(base, tmp_path, known, load_adapter=load) as engine:
        late = engine.submit(PROMPT, params(4), adapter="slow", timeout_s=0.05)
        [[output]] = engine.wait(late)
        assert isinstance(output.error, DeadlineExceededError)
        gate.set()
        assert_at_rest(engine)
