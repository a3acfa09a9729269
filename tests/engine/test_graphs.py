"""Decode steps by graphs: padding, static plans and which steps share a graph.

Without a GPU a stand-in captures (``support.graphs``).
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.device import DEVICE
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.graphs import NothingIsReadBack, engine_of, logits_of, with_graphs
from support.models import CONFIGS, VOCAB, greedy, tiny_model, tiny_tokenizer
from support.random_parts import random_adapter

from manyhats.adapters.parts import CompiledAdapter, LowRank, SiteKind, SiteParts
from manyhats.engine import graphs, runner
from manyhats.engine.graphs import CudaCapture
from manyhats.types import Digest
from manyhats_kernels import AttentionBatch, StaticAttentionBatch

PROMPTS = [[5, 9, 33, 7, 12, 60], [4, 100, 8], [70] * 17, [150, 3, 9, 9, 20]]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def adapter(base, name: str, rank: int, sites: str) -> CompiledAdapter:
    generator = torch.Generator().manual_seed(rank)
    parts = {
        site.name: SiteParts(
            LowRank(
                torch.randn(rank, site.in_features, generator=generator) * 0.3,
                torch.randn(rank, site.out_features, generator=generator) * 0.3,
            )
        )
        for site in base.spec.sites.values()
        if site.kind is SiteKind.LINEAR and sites in site.name
    }
    return CompiledAdapter(Digest(name), "lora", parts)


@pytest.fixture
def both(model, tmp_path, monkeypatch):
    """An engine with graphs, and a plain one, with the same adapters."""

    def worn(base):
        return {
            "q": adapter(base, "q", 3, "q_proj"),
            "q2": adapter(base, "q2", 7, "q_proj"),
            "v": adapter(base, "v", 5, "v_proj"),
        }

    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 0)
    captured = engine_of(copy.deepcopy(model), tmp_path, worn, monkeypatch)
    stand_in = with_graphs(captured)
    plain_base = base_of(copy.deepcopy(model), tiny_tokenizer())
    plain = LocalEngine(plain_base, tmp_path, worn(plain_base), kernels="torch")
    return captured, stand_in, plain


def test_tokens_are_those_of_eager_steps(both, model):
    """Sequences of different lengths end one after the other: sizes 4, then 3 padded to 4, ..."""
    captured, stand_in, plain = both
    names = ["q", None, "v", "q"]
    sampling = [params(n, ignore_eos=True) for n in (2, 6, 3, 5)]
    with captured, plain:
        wanted = plain.generate(PROMPTS, sampling, names)
        captured.generate(PROMPTS, params(1), names)  # so that all adapters are there
        outputs = captured.generate(PROMPTS, sampling, names)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in wanted]
        assert outputs[1].token_ids == greedy(model, PROMPTS[1], 6)
        assert set(stand_in.sizes) == {4, 2, 1}
        assert len(stand_in.sizes) == 5
        assert_at_rest(captured)


def test_a_graph_serves_other_adapters_that_launch_the_same(both):
    """The second round wears another adapter at the same sites, in the same graphs."""
    captured, stand_in, plain = both
    sampling = params(3, ignore_eos=True)
    with captured, plain:
        for name in ("q", "q2", None):
            wanted = plain.generate(PROMPTS[:1], sampling, [name])
            outputs = captured.generate(PROMPTS[:1], sampling, [name])
            assert [o.token_ids for o in outputs] == [o.token_ids for o in wanted]
        assert stand_in.captured == 2  # with rows at q_proj, and without any
        assert len(stand_in.sizes) == 3 * 2


def test_steps_are_eager_until_a_kind_was_seen_often(both, monkeypatch):
    captured, stand_in, _ = both
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 2)
    with captured:
        captured.generate(PROMPTS[:1], params(5, ignore_eos=True))
        assert len(stand_in.sizes) == 2  # four decode steps, the first two of them eager


def test_what_cannot_be_captured_runs_eagerly_and_says_so(both, caplog):
    captured, _, plain = both
    tries = []

    def refuse(compute):
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    captured.engine.loop._runner._fast._capture = refuse
    with captured, plain:
        sampling = params(3, ignore_eos=True)
        outputs = captured.generate(PROMPTS[:2], sampling)
        wanted = plain.generate(PROMPTS[:2], sampling)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in wanted]
    assert tries == [1]
    assert "without CUDA graphs: operation not permitted" in caplog.text


def test_prompt_scores_and_prompts_are_never_captured(both):
    captured, stand_in, _ = both
    with captured:
        captured.generate(PROMPTS[:1], params(0, prompt_logprobs=0))
        captured.generate(PROMPTS[:2], params(1))
        assert stand_in.sizes == []


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_no_model_reads_a_value_back(name, tmp_path, monkeypatch):
    """Every architecture's decode step could be captured, as far as a machine without one tells."""
    eager, calls = runner.forward, []

    def watched(module, ids, positions, wanted):
        if ids.shape[1] != wanted.shape[0]:
            return eager(module, ids, positions, wanted)
        calls.append(1)
        with NothingIsReadBack():
            return eager(module, ids, positions, wanted)

    monkeypatch.setattr(runner, "forward", watched)
    base = base_of(tiny_model(name), tiny_tokenizer())
    with LocalEngine(base, tmp_path, kernels="torch") as engine:
        output = engine.generate(PROMPTS[:1], params(3, ignore_eos=True))[0]
        assert output.error is None
        assert len(calls) == 2


def test_a_static_plan_holds_the_plan_and_padding():
    plan = AttentionBatch.build([1, 1], [17, 4], [[5, 2], [0]], 16)
    static = StaticAttentionBatch(4, 6, 16, 9, DEVICE)
    assert static.batch.slot_mapping.tolist() == [-1] * 4
    before = static.batch.slot_mapping.data_ptr()
    static.load(plan)
    batch = static.batch
    assert batch.slot_mapping.data_ptr() == before
    assert batch.slot_mapping.tolist() == [2 * 16, 3, -1, -1]
    assert batch.context_lens.tolist() == [17, 4, 0, 0]
    assert batch.block_tables[:2, :2].tolist() == plan.block_tables.tolist()
    assert batch.query_start.tolist() == [0, 1, 2, 3, 4]
    static.load(AttentionBatch.build([], [], [], 16))
    assert static.batch.context_lens.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (([2], [5], [[0]], 16), "2 new tokens"),
        (([1] * 3, [1] * 3, [[0]] * 3, 16), "num_sequences 3 is over the 2"),
        (([1], [40], [[0, 1, 2]], 16), "max_blocks 3 is over the 2"),
        (([1], [5], [[9]], 16), "max_block 9 is over the 8"),
        (([1], [5], [[0]], 8), "block_size 8 is not the 16"),
    ],
    ids=["prefill", "sequences", "blocks", "block", "block_size"],
)
def test_a_plan_that_does_not_fit_is_refused(plan, message):
    static = StaticAttentionBatch(2, 2, 16, 9, DEVICE)
    with pytest.raises(ValueError, match=message):
        static.load(AttentionBatch.build(*plan))
    with pytest.raises(ValueError, match="max_blocks must be >= 1"):
        StaticAttentionBatch(2, 0, 16, 9, DEVICE)


@pytest.mark.gpu
def test_a_replay_has_the_bits_of_an_eager_step(tmp_path):
    """On a GPU: the same steps with graphs and without, logits equal bit for bit."""
    seen: dict[bool, list[torch.Tensor]] = {}
    sampling = [params(n, ignore_eos=True) for n in (20, 20, 20, 20)]
    for captured in (False, True):
        base = base_of(tiny_model("llama").to(DEVICE, torch.bfloat16), tiny_tokenizer())
        worn = {"q": adapter(base, "q", 3, "q_proj"), "all": adapter(base, "all", 5, "proj")}
        worn["parts"] = random_adapter("everything", base.spec, dtype=torch.bfloat16)
        worn["stack"] = random_adapter("stack", base.spec, dtype=torch.bfloat16)
        engine = LocalEngine(base, tmp_path, worn, kernels="triton", cuda_graphs=captured)
        its = engine.engine.loop._runner
        assert (its._fast is not None) == captured
        if captured:
            assert isinstance(its._fast._capture, CudaCapture)
        with engine:
            engine.generate(PROMPTS, params(1), list(worn))  # so that all adapters are there
            seen[captured] = logits_of(engine)
            engine.generate(PROMPTS, sampling, ["q", None, "all", "q"])
            engine.generate(PROMPTS, sampling, ["parts", None, "all", "stack"])
            assert not captured or len(its._fast._graphs) == 2
    assert len(seen[True]) == len(seen[False])
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))
    assert seen[True][0].shape[1] == VOCAB
