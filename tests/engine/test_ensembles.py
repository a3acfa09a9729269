"""Ensembles: a lane a member, their log-probabilities averaged, one token for all."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import save_file
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.families import good_adapters
from support.models import tiny_tokenizer

from manyhats.adapters.compose import compose
from manyhats.adapters.files import AdapterLimits
from manyhats.engine.ensembles import united
from manyhats.errors import AdapterLoadError, AdapterRejectedError, RequestError
from manyhats.lifecycle.compositions import BASE_DIGEST, composed
from manyhats.types import AdapterRef, CompositionKind, Digest, ScheduledSequence, Sequence

NAMES = ("lora", "dora", "ia3", "prefix_tuning", "prompt_tuning")
PROMPT = [3, 17, 5, 9, 21, 4, 8]
COUNT = 6
BASE = AdapterRef("base", 0, BASE_DIGEST)
STACK, ENSEMBLE = CompositionKind.STACK, CompositionKind.ENSEMBLE
GREEDY = params(COUNT, ignore_eos=True, logprobs=2)

WHOLES = {
    "two families": (("dora", "ia3"), ()),
    "with a prefix and the base": (("prefix_tuning", "base", "lora"), ()),
    "weighted": (("lora", "prompt_tuning", "ia3"), (5.0, 0.25, 1.75)),
    "with a stack": (("lora+ia3", "dora"), ()),
    "alone": (("ia3",), ()),
}


@pytest.fixture(scope="module")
def adapters():
    return {name: good_adapters()[name].attempt(dtype=torch.float32) for name in NAMES}


@pytest.fixture(scope="module")
def base():
    return base_of(copy.deepcopy(good_adapters()["lora"].model), tiny_tokenizer())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """PEFT's own model of each, and of the base."""
    found = {"base": copy.deepcopy(good_adapters()["lora"].model).eval()}
    for name in NAMES:
        good, folder = good_adapters()[name], tmp_path_factory.mktemp(name)
        save_file(good.tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(good.config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(copy.deepcopy(good.model), folder).eval()
        found[name] = model
    lora = good_adapters()["lora"]
    found["lora+ia3"] = _stacked(copy.deepcopy(lora.model), tmp_path_factory)
    return found


def _stacked(model, tmp_path_factory):
    """PEFT mixes the two families in no model of one kind: merge the first, wear the second."""
    for name in ("lora", "ia3"):
        good, folder = good_adapters()[name], tmp_path_factory.mktemp(f"stacked-{name}")
        save_file(good.tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(good.config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, folder).eval()
            if name == "lora":
                model = model.merge_and_unload()
    return model.eval()


def ref_of(adapters, names, weights=()):
    members = []
    for name in names:
        parts = [AdapterRef(n, 1, adapters[n].digest, adapters[n].virtual_tokens)
                 for n in name.split("+") if n != "base"]  # fmt: skip
        members.append(BASE if not parts else parts[0])
        if len(parts) > 1:
            members[-1] = composed(STACK, parts, ())
    return composed(ENSEMBLE, members, weights)


def by_hand(models, names, weights=(), count=COUNT):
    """Greedy tokens of the averaged log-probabilities, and what was chosen from, renormalized."""
    shares = torch.tensor(weights or [1.0] * len(names))
    shares = shares / shares.sum()
    tokens, scores = list(PROMPT), []
    with torch.no_grad():
        for _ in range(count):
            ids = torch.tensor([tokens])
            each = [models[n](input_ids=ids).logits[0, -1].log_softmax(-1) for n in names]
            mean = sum(w * logprobs for w, logprobs in zip(shares, each, strict=True))
            scores.append(mean.log_softmax(-1))
            tokens.append(int(mean.argmax()))
    return tokens[len(PROMPT) :], scores


def check(output, models, names, weights=()):
    assert output.error is None
    tokens, scores = by_hand(models, names, weights)
    assert output.token_ids == tokens
    for said, own in zip(output.logprobs, scores, strict=True):
        best = own.topk(2)
        assert [t for t, _ in said.top] == best.indices.tolist()
        assert [p for _, p in said.top] == pytest.approx(best.values.tolist(), abs=1e-4)


SETTINGS = {
    "at once": {"max_num_seqs": 32},
    "in chunks": {"max_num_seqs": 12, "max_step_tokens": 12, "block_size": 4},
    "few blocks, so preempted": {"max_num_seqs": 16, "kv_cache_blocks": 20, "block_size": 4},
    "few slots, so evicted": {"max_num_seqs": 16, "slots": 3},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_ensembles_beside_their_members_are_as_averaged_by_hand(base, adapters, models, home, case):
    everyone = [None, *NAMES]
    with LocalEngine(base, home, adapters, **{"pool_rows": 400, **SETTINGS[case]}) as engine:
        refs = [ref_of(adapters, *whole) for whole in WHOLES.values()]
        found = engine.generate([PROMPT] * (len(refs) + 6), GREEDY, [*refs, *everyone])
        assert_at_rest(engine)
        preempted = engine.metrics_value("manyhats_preemptions_total")
    for output, whole in zip(found, WHOLES.values(), strict=False):
        check(output, models, *whole)
    for output, name in zip(found[len(refs) :], everyone, strict=True):
        check(output, models, [name or "base"])
    assert (preempted > 0) == (case == "few blocks, so preempted")


def test_alone_and_in_company_it_draws_the_same(base, adapters, home):
    ref = ref_of(adapters, *WHOLES["with a prefix and the base"])
    drawn = params(12, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True,
                   frequency_penalty=0.5, logit_bias=((7, 3.0),))  # fmt: skip
    with LocalEngine(base, home, adapters, pool_rows=400, max_num_seqs=16) as engine:
        [alone] = engine.generate([PROMPT], drawn, [ref])
        company = engine.generate([PROMPT] * 6, drawn, ["lora", ref, None, "dora", ref, "ia3"])
        choices = [replace(drawn, seed=seed) for seed in (5, 6)]
        [several] = engine.wait(engine.submit(PROMPT, *choices, adapter=ref))
        assert_at_rest(engine)
    assert company[1].token_ids == company[4].token_ids == alone.token_ids
    assert [len(c.token_ids) for c in several] == [12, 12]
    assert several[0].token_ids == alone.token_ids != several[1].token_ids


def test_lanes_share_blocks_with_their_members_own_requests(base, adapters, home):
    prompt = PROMPT * 3
    ref = ref_of(adapters, ("prefix_tuning", "base"))
    with LocalEngine(base, home, adapters, block_size=4, pool_rows=400) as engine:

        def cached(who):
            [output] = engine.generate([prompt], params(2, ignore_eos=True), [who])
            assert output.error is None
            return output.cached_tokens

        assert [cached(w) for w in ("prefix_tuning", ref)] == [0, 0], "one lane had nothing"
        assert cached(None) == 20
        assert cached(ref) == 17, "20 less the three virtual tokens of the prefix"
        assert cached(ref_of(adapters, ("lora", "base"))) == 0
        assert cached("lora") == 20, "what the ensemble computed is the member's as well"


def test_one_member_that_cannot_be_had_ends_it_alone(base, adapters, home):
    gone = AdapterRef("gone", 1, Digest("0" * 64))
    lora = AdapterRef("lora", 1, adapters["lora"].digest)
    broken = composed(ENSEMBLE, [lora, gone], ())
    clash = composed(STACK, [AdapterRef(n, 1, adapters[n].digest, adapters[n].virtual_tokens)
                             for n in ("prefix_tuning", "prompt_tuning")], ())  # fmt: skip
    unfit = composed(ENSEMBLE, [lora, clash], ())
    wide = ref_of(adapters, NAMES)
    with LocalEngine(base, home, adapters, pool_rows=400, max_num_seqs=4, slots=4) as engine:
        found = engine.generate([PROMPT] * 5, GREEDY, [broken, "lora", unfit, wide, None])
        scored = params(2, prompt_logprobs=1)
        [unscored] = engine.generate([PROMPT], scored, [ref_of(adapters, ("lora", "ia3"))])
        assert_at_rest(engine)
    kinds = [AdapterLoadError, None, AdapterRejectedError, RequestError, None]
    assert [type(o.error) if o.error else None for o in found] == kinds
    assert "takes 5 places, of at most 4 (max_num_seqs)" in found[3].error.message
    assert isinstance(unscored.error, RequestError)


def test_more_members_than_slots_is_said(base, adapters, home):
    with LocalEngine(base, home, adapters, pool_rows=400, slots=2) as engine:
        ref = ref_of(adapters, ("lora", "dora", "ia3"))
        pair = ref_of(adapters, ("lora", "dora"))
        found = engine.generate([PROMPT] * 3, GREEDY, [ref, pair, "ia3"])
        assert_at_rest(engine)
    assert isinstance(found[0].error, AdapterLoadError)
    assert "beside the other adapters of its ensemble" in found[0].error.message
    assert [o.error for o in found[1:]] == [None, None]


def test_a_cancelled_ensemble_leaves_nothing(base, adapters, home):
    with LocalEngine(base, home, adapters, pool_rows=400) as engine:
        long = params(20, ignore_eos=True)
        refs = [ref_of(adapters, *whole) for whole in WHOLES.values()]
        ids = [engine.submit(PROMPT, long, adapter=ref) for ref in refs]
        engine.next_delta(ids[0])
        for ident in ids:
            engine.engine.loop.abort(ident)
        engine.generate([PROMPT], GREEDY)
        assert_at_rest(engine)


def test_a_row_that_is_not_finite_spoils_its_own_ensemble_alone(adapters):
    def lanes(ident, ref):
        whole = Sequence(ident, "r", 0, "t", params(1), ref, 0.0, 1, [1])
        whole.lanes = tuple(
            Sequence(ident + 1 + i, "r", 0, "t", params(1), lane, 0.0, 1, [1], whole=whole)
            for i, lane in enumerate(ref.lanes)
        )
        return [ScheduledSequence(lane, 0, 1, True) for lane in whole.lanes]

    pair = lanes(10, ref_of(adapters, ("lora", "ia3"), (3.0, 1.0)))
    bad = lanes(20, ref_of(adapters, ("lora", "base")))
    plain = ScheduledSequence(Sequence(1, "q", 0, "t", params(1), None, 0.0, 1, [1]), 0, 1, True)
    logits = torch.randn(5, 9)
    logits[1] = float("nan")
    # lanes of two wholes interleaved
    rows, found = united(logits, [pair[0], bad[0], plain, pair[1], bad[1]])
    assert [s.id for s in found] == [10, 20, 1]
    weights = [w / 4 for w in found[0].adapter.composition.weights]
    assert sorted(weights) == [0.25, 0.75]
    wanted = weights[0] * logits[0].log_softmax(-1) + weights[1] * logits[3].log_softmax(-1)
    torch.testing.assert_close(rows[0], wanted)
    assert bool(rows[1].isnan().all())
    torch.testing.assert_close(rows[2], logits[2], rtol=0, atol=0)


def test_compose_leaves_ensembles_to_the_engine(adapters):
    ref = ref_of(adapters, ("lora", "ia3"))
    with pytest.raises(ValueError, match="no parts"):
        compose(ref, ref.composition, [adapters["lora"], adapters["ia3"]], AdapterLimits())
