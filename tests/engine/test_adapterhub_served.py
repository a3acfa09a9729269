"""Adapters that AdapterHub saved, all kinds in one batch of the engine: its tokens are theirs."""

from __future__ import annotations

import copy

import pytest
from support import adapterhub
from support.adapterhub import COUNT, NAMES, PROMPT, bases, expected
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import tiny_tokenizer


@pytest.mark.parametrize("name", sorted(bases()))
def test_one_batch_of_every_kind_answers_as_adapterhub(name, home):
    """The base's own rows first and last."""
    worn = [case for case in NAMES if adapterhub.base_of(case) == name]
    adapters = {case: adapterhub.compile_files(case) for case in worn}
    base = base_of(copy.deepcopy(bases()[name].model), tiny_tokenizer())
    sampling = params(COUNT, ignore_eos=True, logprobs=0)
    settings = {"slots": len(worn), "pool_rows": 400, "max_num_seqs": len(worn) + 2}
    rows = [None, *worn, None]
    with LocalEngine(base, home, adapters, **settings) as engine:
        found = engine.generate([PROMPT] * len(rows), sampling, rows)
        assert_at_rest(engine)
    for case, output in zip(rows, found, strict=True):
        wanted = expected(case or name)
        assert output.error is None, case
        assert output.token_ids == wanted.greedy, case
        first = float(wanted.logits[-1].log_softmax(-1).max())
        assert output.logprobs[0].logprob == pytest.approx(first, abs=1e-4), case


def test_a_chunked_prompt_and_an_evicted_adapter_change_nothing(home):
    """Prefixes, stacks and fusions over one slot, a few tokens a step."""
    worn = ["prefix", "stack_bottlenecks", "mam", "fuse_houlsby"]
    adapters = {case: adapterhub.compile_files(case) for case in worn}
    base = base_of(copy.deepcopy(bases()["llama"].model), tiny_tokenizer())
    settings = {"slots": 1, "pool_rows": 400, "max_num_seqs": 2, "max_step_tokens": 5}
    rows = worn * 2
    with LocalEngine(base, home, adapters, **settings) as engine:
        found = engine.generate([PROMPT] * len(rows), params(COUNT, ignore_eos=True), rows)
        assert_at_rest(engine)
    for case, output in zip(rows, found, strict=True):
        assert output.error is None, case
        assert output.token_ids == expected(case).greedy, case
