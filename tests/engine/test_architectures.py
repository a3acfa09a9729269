"""Greedy tokens equal transformers' own ``generate`` in fp32, for every architecture and every way
of batching.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import CONFIGS, VOCAB, greedy, tiny_model, tiny_tokenizer

LENGTHS = (1, 5, 17, 40, 33, 16, 64)
NEW_TOKENS = 24


def prompts(seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request):
    model = tiny_model(request.param)
    expected = [greedy(model, p, NEW_TOKENS) for p in prompts()]
    assert len({tuple(e) for e in expected}) == len(expected), (
        "the model says the same to every prompt"
    )
    return base_of(copy.deepcopy(model), tiny_tokenizer()), expected


SETTINGS = {
    "batched": {},
    "native": {"kernels": "native"},
    "chunked": {"max_step_tokens": 7, "max_num_seqs": 7},
    "one at a time": {"max_num_seqs": 1},
    "no adapter layers": {"adapter_layers": False},
    "small blocks": {"block_size": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_generate(case, settings, tmp_path):
    base, expected = case
    with LocalEngine(base, tmp_path, **settings) as engine:
        outputs = engine.generate(prompts(), params(NEW_TOKENS, ignore_eos=True))
        assert [o.token_ids for o in outputs] == expected
        assert_at_rest(engine)


def test_equals_generate_after_preemption(case, tmp_path):
    """A cache too small for all: sequences are thrown out and computed again, and say the same."""
    base, expected = case
    with LocalEngine(base, tmp_path, block_size=4, kv_cache_blocks=30, kv_cache_mb=None) as engine:
        outputs = engine.generate(prompts(), params(NEW_TOKENS, ignore_eos=True))
        assert [o.token_ids for o in outputs] == expected
        assert engine.metrics_value("manyhats_preemptions_total") > 0
        assert_at_rest(engine)


def test_stops_at_the_models_end_of_sequence(tmp_path):
    model = tiny_model("llama")
    prompt = prompts()[3]
    free = greedy(model, prompt, NEW_TOKENS)
    with LocalEngine(base_of(copy.deepcopy(model), tiny_tokenizer()), tmp_path) as engine:
        (output,) = engine.generate(
            [prompt], params(NEW_TOKENS, stop_token_ids=frozenset({free[4]}))
        )
    assert output.token_ids == free[: free.index(free[4]) + 1]
    assert output.finish_reason.value == "stop"
