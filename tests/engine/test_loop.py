"""The step loop when something goes wrong: the requests of the step fail, the loop goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.models import VOCAB, greedy, tiny_model, tiny_tokenizer

from manyhats.adapters.parts import CompiledAdapter, LowRank, SiteKind, SiteParts
from manyhats.errors import AdapterLoadError, DrainingError, EngineFailedError, QueueFullError
from manyhats.types import Digest

PROMPT = [5, 9, 33, 7, 12, 60]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model):
    return base_of(copy.deepcopy(model), tiny_tokenizer())


def adapter(base, name: str, rank: int = 2, fill: float | None = None) -> CompiledAdapter:
    """Random rows at every linear site; ``fill`` makes all of B that value."""
    generator = torch.Generator().manual_seed(len(name) + rank)
    sites = {}
    for site in base.spec.sites.values():
        if site.kind is SiteKind.LINEAR:
            a = torch.randn(rank, site.in_features, generator=generator) * 0.3
            b = torch.randn(rank, site.out_features, generator=generator) * 0.3
            sites[site.name] = SiteParts(
                LowRank(a, b if fill is None else torch.full_like(b, fill))
            )
    return CompiledAdapter(Digest(name), "lora", sites)


def test_an_adapter_that_overflows_fails_alone(base, model, tmp_path):
    adapters = {"bad": adapter(base, "bad", fill=1e38), "good": adapter(base, "good")}
    with LocalEngine(base, tmp_path, adapters, kernels="native") as engine:
        alone = engine.generate([PROMPT], params(8, ignore_eos=True), ["good"])[0]
        outputs = engine.generate([PROMPT] * 3, params(8, ignore_eos=True), ["bad", "good", None])
        assert isinstance(outputs[0].error, EngineFailedError)
        assert "bad@1" in outputs[0].error.message
        assert outputs[1].token_ids == alone.token_ids
        assert outputs[2].token_ids == greedy(model, PROMPT, 8)
        assert_at_rest(engine)


def test_an_adapter_that_cannot_be_loaded_fails_alone(base, model, tmp_path):
    def load(digest):
        raise OSError("the disk is gone")

    known = {"lost": adapter(base, "lost")}
    with LocalEngine(base, tmp_path, known, load_adapter=load) as engine:
        outputs = engine.generate([PROMPT] * 2, params(8, ignore_eos=True), ["lost", None])
        assert isinstance(outputs[0].error, AdapterLoadError)
        assert "the disk is gone" in outputs[0].error.message
        assert outputs[1].token_ids == greedy(model, PROMPT, 8)


def test_a_pool_too_small_for_one_adapter_is_an_error_for_that_one(base, tmp_path):
    adapters = {"wide": adapter(base, "wide", rank=9), "slim": adapter(base, "slim")}
    with LocalEngine(base, tmp_path, adapters, pool_rows=8, max_rank=8) as engine:
        outputs = engine.generate([PROMPT] * 2, params(4, ignore_eos=True), ["wide", "slim"])
        assert isinstance(outputs[0].error, AdapterLoadError)
        assert "9" in outputs[0].error.message
        assert "8" in outputs[0].error.message
        assert len(outputs[1].token_ids) == 4


def test_a_failed_step_fails_its_requests_and_the_loop_goes_on(base, model, tmp_path):
    with LocalEngine(base, tmp_path) as engine:
        runner = engine.engine.loop._runner
        real = runner.run
        runner.run = lambda schedule: (_ for _ in ()).throw(RuntimeError("planted"))
        failed = engine.generate([PROMPT] * 2, params(4))
        assert all(isinstance(o.error, EngineFailedError) for o in failed)
        runner.run = real
        assert engine.generate([PROMPT], params(8, ignore_eos=True))[0].token_ids == greedy(
            model, PROMPT, 8
        )
        assert engine.engine.client.stats().failed_steps == 1
        assert_at_rest(engine)


def test_a_loop_that_dies_tells_everybody_and_takes_nothing_more(base, tmp_path):
    with LocalEngine(base, tmp_path) as engine:
        engine.engine.loop._scheduler.schedule = None  # a defect outside any step
        (output,) = engine.generate([PROMPT], params(4))
        assert isinstance(output.error, EngineFailedError)
        with pytest.raises(DrainingError):
            engine.submit(PROMPT, params(4))


def test_a_request_that_no_step_has_seen_is_told_of_the_end_too(base, tmp_path):
    with LocalEngine(base, tmp_path) as engine:
        with engine.together():
            engine.engine.loop._mailbox.post(lambda: 1 / 0)  # a defect between two steps
            request = engine.submit(PROMPT, params(4))
        ((output,),) = engine.wait(request)
        assert isinstance(output.error, EngineFailedError)


def test_a_full_queue_is_refused_whole(base, tmp_path):
    with LocalEngine(base, tmp_path, max_queue=3) as engine:
        with engine.together():
            kept = engine.submit(PROMPT, *[params(2)] * 2)
            with pytest.raises(QueueFullError, match="bound of 3"):
                engine.submit(PROMPT, *[params(2)] * 2)
        assert [o.error for o in engine.wait(kept)[0]] == [None, None]


def test_prefixes_are_shared_by_one_adapter_and_tenant_only(base, tmp_path):
    prompt = torch.randint(3, VOCAB, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    adapters = {"one": adapter(base, "one"), "two": adapter(base, "two")}
    with LocalEngine(base, tmp_path, adapters, block_size=16) as engine:

        def cached(name, tenant="default"):
            request = engine.submit(prompt, params(2, ignore_eos=True), adapter=name, tenant=tenant)
            return engine.wait(request)[0][0].cached_tokens

        assert [cached("one"), cached("one")] == [0, 48]
        assert [cached("two"), cached(None)] == [0, 0]
        assert [cached("one", "another"), cached("one")] == [0, 48]


def test_seeded_sampling_is_the_same_alone_and_together(base, tmp_path):
    prompts = [
        torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (4, 9, 21, 33)
    ]
    sampling = [
        params(12, temperature=1.0, seed=3, ignore_eos=True),
        params(12, temperature=0.7, top_p=0.9, seed=4, ignore_eos=True),
        params(12, temperature=1.3, top_k=20, seed=5, ignore_eos=True, frequency_penalty=0.5),
        params(12, temperature=1.0, min_p=0.05, seed=6, ignore_eos=True, repetition_penalty=1.2),
    ]
    with LocalEngine(base, tmp_path, kernels="native") as engine:
        together = [o.token_ids for o in engine.generate(prompts, sampling)]
        alone = [
            engine.generate([p], s)[0].token_ids for p, s in zip(prompts, sampling, strict=True)
        ]
    assert together == alone
