"""Every part of the canonical form, all in one batch, against transformers' own model with plain
hooks: tokens equal, log-probabilities to 1e-4.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import VOCAB, tiny_model, tiny_tokenizer
from support.oracle import Oracle
from support.random_parts import KINDS, random_adapter

from manyhats.adapters.parts import CompiledAdapter
from manyhats.engine.model.load import BaseModel

NEW_TOKENS = 6
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    base: BaseModel
    adapters: dict[str, CompiledAdapter]
    prompts: dict[str | None, list[int]]
    tokens: dict[str | None, list[int]]
    scores: dict[str | None, list[torch.Tensor]]


def make_case(name: str) -> Case:
    """One prompt for each kind of adapter and one for the base."""
    model = tiny_model(name)
    base = base_of(copy.deepcopy(model), tiny_tokenizer())
    oracle = Oracle(model, base.spec)
    adapters = {kind: random_adapter(kind, base.spec) for kind in KINDS}
    generator = torch.Generator().manual_seed(5)
    prompts, tokens, scores = {}, {}, {}
    for index, kind in enumerate((None, *KINDS)):
        length = (9, 3, 17, 21, 1)[index % 5]
        prompts[kind] = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        tokens[kind], scores[kind] = oracle.greedy(prompts[kind], adapters.get(kind), NEW_TOKENS)
        if kind is not None:
            plain = torch.log_softmax(oracle.logits(prompts[kind], None)[-1], -1)
            assert (plain - scores[kind][0]).abs().max() > 0.05, f"{kind} changes nothing"
    return Case(base, adapters, prompts, tokens, scores)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "qwen3"])
def case(request):
    return make_case(request.param)


def check(case: Case, kinds, outputs) -> None:
    for kind, output in zip(kinds, outputs, strict=True):
        assert output.error is None, (kind, output.error)
        assert output.token_ids == case.tokens[kind], kind
        for got, expected in zip(output.logprobs, case.scores[kind], strict=True):
            scale = max(1.0, float(expected.abs().max()))
            for token, logprob in ((got.token_id, got.logprob), *got.top):
                assert abs(logprob - float(expected[token])) <= TOLERANCE * scale, kind


SETTINGS = {
    "batched": {},
    "native": {"kernels": "native"},
    "chunked": {"max_step_tokens": 31, "max_num_seqs": 31, "kernels": "native"},
    "four slots": {"slots": 4, "kernels": "native", "max_num_seqs": 8},
    "preempted": {"block_size": 4, "kv_cache_blocks": 24, "kv_cache_mb": None},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_all_in_one_batch(case, settings, home):
    settings = {"slots": len(KINDS), "pool_rows": 400} | settings
    kinds = [None, *KINDS]
    sampling = params(NEW_TOKENS, ignore_eos=True, logprobs=5)
    with LocalEngine(case.base, home, case.adapters, **settings) as engine:
        for _ in range(2):  # the second time from the prefix cache, or loaded again
            prompts = [case.prompts[k] for k in kinds]
            check(case, kinds, engine.generate(prompts, sampling, kinds))
        if "kv_cache_blocks" in settings:
            assert engine.metrics_value("manyhats_preemptions_total") > 0
        assert_at_rest(engine)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_in_bf16(name, kernels, home):
    """The same within what bf16 rounds: the first token's scores against the fp32 oracle's over the
    same rounded weights.
    """
    model = tiny_model(name).to(torch.bfloat16)
    base = base_of(copy.deepcopy(model), tiny_tokenizer())
    oracle = Oracle(model.float(), base.spec)
    adapters = {kind: random_adapter(kind, base.spec, dtype=torch.bfloat16) for kind in KINDS}
    kinds = [None, *KINDS]
    prompt = list(range(20, 31))
    settings = {"slots": len(KINDS), "pool_rows": 400, "kernels": kernels, "dtype": "bf16"}
    with LocalEngine(base, home, adapters, **settings) as engine:
        sampling = params(1, ignore_eos=True, logprobs=20)
        outputs = engine.generate([prompt] * len(kinds), sampling, kinds)
    for kind, output in zip(kinds, outputs, strict=True):
        assert output.error is None, (kind, output.error)
        worn = random_adapter(kind, base.spec, dtype=torch.bfloat16, oracle=True) if kind else None
        expected = torch.log_softmax(oracle.logits(prompt, worn)[-1], -1)
        top = dict(output.logprobs[0].top)
        found = torch.tensor([top[t] - float(expected[t]) for t in top])
        assert found.square().mean().sqrt() < 0.06 * expected.std(), kind
