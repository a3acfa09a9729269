"""Steps with all layers in one native call have the bits of the layers called one by one."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.engine import LocalEngine, params
from support.models import VOCAB, tiny_tokenizer
from support.random_parts import random_adapter
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from manyhats.adapters.parts import CompiledAdapter, SiteParts
from manyhats.config import Settings
from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.model.load import load_base
from manyhats.engine.runner import forward
from manyhats.engine.stack import DecoderStack, agrees
from manyhats.errors import AdapterRejectedError
from manyhats.types import AdapterRef, Digest, Priority
from manyhats_kernels.native.stack import NativeStack

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**_COMMON),
    "llama_narrow": LlamaConfig(**(_COMMON | {"head_dim": 24})),
    "mistral": MistralConfig(**_COMMON, sliding_window=9),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=32),
}
PROMPTS = [[5, 9, 11, 4, 17] * 15, [3] * 2 + [8, 60, 7, 21, 33, 2, 9, 90, 41, 12], [44], [7, 7, 8]]
WARM = [
    [50],
    [51],
    [52],
    [53],
]  # no long segment, whose bits would depend on which adapter came first


def base_of(config, folder, **settings):
    """The model in NF4, loaded as the server does."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(6)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    wanted = Settings(model=str(folder / "model"), home=folder, **settings)
    # compiled once, by `make test`
    kernels = resolve_kernels("native", device=torch.device("cpu"), home=Settings().home)
    return load_base(wanted, kernels.backend)


def has_tiles():
    """Whether steps with prompts in them take the stack: where the backend has AMX tiles."""
    kernels = resolve_kernels("native", device=torch.device("cpu"), home=Settings().home)
    return kernels.backend.stacks_prompts


def engine_of(base, adapters=(), **settings):
    worn = {a.family: a for a in adapters}
    home = Settings().home
    return LocalEngine(base, home, worn, kernels="native", max_rank=64, slots=8, **settings)


def way(engine):
    return engine.engine.loop._runner._fast


def generate(base, adapters, names, *, layer_stack, prompts=None):
    """Tokens and log-probabilities of concurrent requests; of how many sequences the decode steps
    were that the stack ran. ``prompts`` is given the tokens of the others that it ran.
    """
    engine = engine_of(base, adapters, layer_stack=layer_stack)
    assert isinstance(way(engine), DecoderStack) == layer_stack
    ran = []
    if layer_stack:
        run = way(engine).run

        def noted(ids, positions, attention, *rest):
            kind = ran if attention.max_query_len == 1 else prompts
            if kind is not None:
                kind.append(len(ids))
            return run(ids, positions, attention, *rest)

        way(engine).run = noted
    sampling = [params(n, ignore_eos=True, logprobs=2) for n in (9, 4, 12, 7)]
    with engine:
        engine.generate(WARM, params(1), names)  # so that all adapters are there
        outputs = engine.generate(PROMPTS, sampling, names)
    assert [o.error for o in outputs] == [None] * 4
    return [(o.token_ids, o.logprobs) for o in outputs], ran


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stack_has_the_bits_of_the_modules(name, tmp_path):
    base = base_of(CONFIGS[name], tmp_path)
    rows = [random_adapter("low_rank", base.spec, seed, dtype=base.dtype) for seed in (1, 2)]
    rows = [replace(a, family=f"rows{i}") for i, a in enumerate(rows)]
    worn = ["rows0", None, "rows1", "rows0"]
    wanted, _ = generate(base, rows, worn, layer_stack=False)
    prompts = []
    outputs, ran = generate(base, rows, worn, layer_stack=True, prompts=prompts)
    assert outputs == wanted
    assert set(ran) == {1, 2, 3, 4}
    assert bool(prompts) == has_tiles()
    plain, _ = generate(base, rows, [None] * 4, layer_stack=True)
    assert [plain[i] == outputs[i] for i in range(4)] == [False, True, False, False]


def test_without_tiles_prompts_go_through_the_modules(tmp_path, monkeypatch):
    """As on a machine that has no AMX: decode steps alone take the stack."""
    monkeypatch.setattr(NativeStack, "stacks_prompts", False)
    engine = engine_of(base_of(CONFIGS["llama"], tmp_path))
    stack, longest = way(engine), []
    run = stack.run
    stack.run = lambda *a: longest.append(a[2].max_query_len) or run(*a)
    with engine:
        outputs = engine.generate(PROMPTS, params(4, ignore_eos=True))
    assert [o.error for o in outputs] == [None] * 4
    assert set(longest) == {1}


@pytest.mark.parametrize("tiles", [False, True])
def test_background_prompts_leave_decodes_to_the_stack(tmp_path, monkeypatch, tiles):
    """Where they do not take it themselves, they are a pass of their own beside live decodes; what
    comes out is the same.
    """
    if tiles and not has_tiles():
        pytest.skip("this machine has no AMX")
    monkeypatch.setattr(DecoderStack, "takes_prompts", tiles)
    base = base_of(CONFIGS["llama"], tmp_path)
    rows = [random_adapter("low_rank", base.spec, dtype=base.dtype)]
    live = params(12, ignore_eos=True, logprobs=2)
    scored = params(2, ignore_eos=True, prompt_logprobs=1)
    outputs = {}
    for layer_stack in (False, True):
        engine = engine_of(base, rows, layer_stack=layer_stack, background_tokens=5)
        runner, passes = engine.engine.loop._runner, []
        runner._pass = partial(told, runner._pass, passes)
        with engine:
            engine.generate(PROMPTS[:1], params(1), ["low_rank"])
            passes.clear()
            with engine.together():
                ids = [
                    engine.submit(prompt, wanted, adapter=adapter, priority=priority)
                    for prompt, wanted, priority in (
                        (PROMPTS[0], live, Priority.NORMAL),
                        (PROMPTS[1] * 2, scored, Priority.BACKGROUND),
                    )
                    for adapter in ("low_rank", None)
                ]
            made = [one for each in engine.wait(*ids) for one in each]
        assert [o.error for o in made] == [None] * 4
        outputs[layer_stack] = made
        together = {"live decode", "background prompt"} in passes
        apart = layer_stack and not tiles
        assert together is not apart
        assert ({"background prompt"} in passes) is apart
    for got, want in zip(outputs[True], outputs[False], strict=True):
        assert got.token_ids == want.token_ids
        # A pass of fewer tokens may sum in another order.
        assert scores(got.logprobs) == pytest.approx(scores(want.logprobs), abs=2e-2)
        assert scores(got.prompt_logprobs) == pytest.approx(scores(want.prompt_logprobs), abs=2e-2)


def scores(entries):
    return [entry.logprob for entry in entries or () if entry is not None]


def told(run, passes, items, fast):
    """Runs a pass and notes what was in it."""
    passes.append(
        {
            f"{'background' if item.sequence.background else 'live'} "
            f"{'prompt' if item.count > 1 else 'decode'}"
            for item in items
        }
    )
    return run(items, fast)


def test_without_adapter_layers(tmp_path):
    base = base_of(CONFIGS["llama"], tmp_path)
    wanted, _ = generate(base, (), [None] * 4, layer_stack=True)
    engine = engine_of(base, adapter_layers=False)
    assert isinstance(way(engine), DecoderStack)
    with engine:
        engine.generate(WARM, params(1))
        outputs = engine.generate(PROMPTS, params(4, ignore_eos=True, logprobs=2))
    assert [(o.token_ids, o.logprobs) for o in outputs] == [
        (ids[:4], scores[:4]) for ids, scores in wanted
    ]


def own_inputs(spec, dtype):
    """Factors of the inputs that no two linear layers share, as IA3 has them, and of outputs."""

    def parts(site):
        ends = site.name.rsplit(".", 1)[-1]
        if ends in ("o_proj", "down_proj"):
            return SiteParts(input_scale=(torch.rand(site.in_features) * 2).to(dtype))
        if ends in ("k_proj", "up_proj"):
            return SiteParts(output_scale=(torch.rand(site.out_features) * 2).to(dtype))
        return None

    torch.manual_seed(3)
    made = {name: own for name, site in spec.sites.items() if (own := parts(site)) is not None}
    return CompiledAdapter(Digest("9" * 64), "own inputs", made)


@pytest.mark.parametrize(
    "kinds",
    [
        ("low_rank", "bias", "output_scale"),
        ("gain", "norm bias", "own inputs"),
        ("parallel", "of_output", "low_rank"),
        ("alone", "stack", "gated"),
        ("soft prompt", "prefix", "embedding rows"),
        ("head rows", "head low_rank", "gated"),
    ],
    ids=",".join,
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_other_parts_are_in_the_stack_too(name, kinds, tmp_path):
    base = base_of(CONFIGS[name], tmp_path)
    adapters = [
        own_inputs(base.spec, base.dtype)
        if kind == "own inputs"
        else random_adapter(kind, base.spec, dtype=base.dtype)
        for kind in kinds
    ]
    worn = [kinds[0], None, *kinds[1:]]
    wanted, _ = generate(base, adapters, worn, layer_stack=False)
    outputs, ran = generate(base, adapters, worn, layer_stack=True)
    assert outputs == wanted
    assert set(ran) >= {1, 2, 3, 4}
    plain, _ = generate(base, adapters, [None] * 4, layer_stack=True)
    assert [plain[i] == outputs[i] for i in range(4)] == [False, True, False, False]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", kind) for kind in ("everything", "dense", "input_scale", "fusion")),
        ("qwen3", "gain"),  # of the norms of heads
    ],
)
def test_what_is_not_in_the_stack_goes_through_the_modules(name, kind, tmp_path):
    """A step takes the stack only while no adapter worn in it does what a stack leaves out."""
    base = base_of(CONFIGS[name], tmp_path)
    adapters = [random_adapter(k, base.spec, dtype=base.dtype) for k in ("low_rank", kind)]
    worn = ["low_rank", kind, None, "low_rank"]
    wanted, _ = generate(base, adapters, worn, layer_stack=False)
    outputs, ran = generate(base, adapters, worn, layer_stack=True)
    assert outputs == wanted
    # the second ends after 4 tokens; the others have 9, 12 and 7.
    assert max(ran) == 3


def test_an_adapter_that_comes_later_is_seen(tmp_path):
    """Its vectors' pools come into being after the stack has looked at them."""
    base = base_of(CONFIGS["llama"], tmp_path)
    adapters = [random_adapter(k, base.spec, dtype=base.dtype) for k in ("bias", "gain", "gated")]
    outputs = {}
    for layer_stack in (False, True):
        with engine_of(base, adapters, layer_stack=layer_stack) as engine:
            sampling = params(5, ignore_eos=True, logprobs=2)
            made = [
                engine.generate(PROMPTS[: n + 1], sampling, [a.family for a in adapters[: n + 1]])
                for n in range(3)
            ]
        outputs[layer_stack] = [[(o.token_ids, o.logprobs) for o in batch] for batch in made]
    assert outputs[True] == outputs[False]


def test_the_parity_probe_compares_with_what_the_parts_mean(tmp_path):
    """Its reference wears the adapter on the modules, which a stack would not see."""
    base = base_of(CONFIGS["llama"], tmp_path)
    adapter = random_adapter("low_rank", base.spec, dtype=base.dtype)
    engine = engine_of(base)
    assert isinstance(way(engine), DecoderStack)
    engine.engine.loop._deliver = engine.engine.client._postbox.deliver
    probe = engine.engine.parity
    right, wrong = (AdapterRef("new", 1, Digest(f"unregistered-{i}")) for i in range(2))
    with engine:
        assert probe.check(right, adapter).agrees
        probe._unregistered = Holding(probe._unregistered, bare(adapter))
        with pytest.raises(AdapterRejectedError, match="parity_mismatch"):
            probe.check(wrong, adapter)


def bare(adapter):
    """The same without effect."""
    sites = {
        name: replace(parts, low_rank=replace(parts.low_rank, b=torch.zeros_like(parts.low_rank.b)))
        for name, parts in adapter.sites.items()
    }
    return replace(adapter, sites=sites)


class Holding:
    """Holds another adapter than the one it is told to."""

    def __init__(self, unregistered, adapter):
        self._unregistered, self._adapter = unregistered, adapter

    def hold(self, adapter):
        return self._unregistered.hold(replace(self._adapter, digest=adapter.digest))


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**_COMMON, residual_multiplier=0.5),  # adds the block's output halved
        LlamaConfig(**(_COMMON | {"hidden_act": "gelu"})),
        LlamaConfig(**(_COMMON | {"intermediate_size": 176})),  # no whole runs of 64 weights
    ],
    ids=["multiplied", "gelu", "ragged"],
)
def test_what_a_stack_would_not_do_alike_is_left_to_the_modules(config, tmp_path):
    engine = engine_of(base_of(config, tmp_path))
    assert way(engine) is None


def test_other_dtypes_are_left_to_the_modules(tmp_path):
    assert way(engine_of(base_of(CONFIGS["llama"], tmp_path, dtype="fp32"))) is None


def test_a_stack_that_differs_is_noticed(tmp_path):
    """The trial that a stack must pass before it serves can fail: another scale, norm, rotation."""
    base = base_of(CONFIGS["llama"], tmp_path)
    engine = engine_of(base)
    stack, its = way(engine), engine.engine.loop._runner
    arguments = (partial(forward, base.module), its._state, 8, 16)
    assert agrees(stack, *arguments)
    for name, wrong in (("scale", 0.3), ("eps", 0.1)):
        right = getattr(stack._stack, name)
        setattr(stack._stack, name, wrong)
        assert not agrees(stack, *arguments)
        setattr(stack._stack, name, right)
    run = stack._runner.run_stack

    class Backwards:
        def run_stack(self, hidden, layers, cos, sin, *plans):
            run(hidden, layers, cos, -sin, *plans)

    stack._runner = Backwards()
    assert not agrees(stack, *arguments)
