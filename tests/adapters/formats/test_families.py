"""Every family but LoRA against PEFT itself: same weights, same tokens, same logits."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import save_file

from manyhats.adapters.files import AdapterLimits
from manyhats.engine.model.parts_reference import PartsReference
from manyhats.errors import AdapterRejectedError

from .conftest import IDS, Saved, disturb, logits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CAUSAL = {"task_type": "CAUSAL_LM"}
ATTENTION = ["q_proj", "v_proj"]
MLP = ["gate_proj", "down_proj"]
GPT2 = ["c_attn", "mlp.c_proj"]


def family(kind, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**(CAUSAL | fields))


CASES = {
    "ia3": (
        "llama",
        family(
            peft.IA3Config, target_modules=[*ATTENTION, *MLP], feedforward_modules=["down_proj"]
        ),
    ),
    "ia3 biases": (
        "qwen2",
        family(peft.IA3Config, target_modules=ATTENTION, feedforward_modules=[]),
    ),
    "ia3 conv1d": (
        "gpt2",
        family(
            peft.IA3Config,
            target_modules=GPT2,
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "ia3 pattern": (
        "gemma3",
        family(
            peft.IA3Config,
            target_modules=r".*\.(q|down)_proj",
            feedforward_modules=r".*\.down_proj",
        ),
    ),
    "ia3 saved head": (
        "llama",
        family(
            peft.IA3Config,
            target_modules=ATTENTION,
            feedforward_modules=[],
            modules_to_save=["lm_head"],
        ),
    ),
    "ln": ("llama", family(peft.LNTuningConfig, target_modules=["input_layernorm", "norm"])),
    "ln biases": ("gpt2", family(peft.LNTuningConfig, target_modules=["ln_1", "ln_f"])),
    "ln offset": (
        "gemma3",
        family(peft.LNTuningConfig, target_modules=["post_attention_layernorm", "q_norm", "norm"]),
    ),
    "ln of a head": ("llama", family(peft.LNTuningConfig, target_modules=["norm", "lm_head"])),
    "beft": ("llama", family(peft.BeftConfig, target_modules=ATTENTION)),
    "vera": ("llama", family(peft.VeraConfig, r=9, target_modules=[*ATTENTION, *MLP])),
    "vera drawn": (
        "qwen2",
        family(
            peft.VeraConfig,
            r=6,
            target_modules=ATTENTION,
            save_projection=False,
            projection_prng_key=41,
            bias="vera_only",
        ),
    ),
    "vera conv1d": ("gpt2", family(peft.VeraConfig, r=5, target_modules=GPT2)),
    "loha": (
        "llama",
        family(
            peft.LoHaConfig,
            r=3,
            alpha=5,
            target_modules=[*ATTENTION, *MLP],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"v_proj": 7},
        ),
    ),
    "loha of full rank": ("gemma3", family(peft.LoHaConfig, r=8, target_modules=ATTENTION)),
    "lokr": ("llama", family(peft.LoKrConfig, r=2, alpha=6, target_modules=[*ATTENTION, *MLP])),
    "lokr both": (
        "qwen2",
        family(peft.LoKrConfig, r=1, decompose_both=True, target_modules=[*ATTENTION, *MLP]),
    ),
    "lokr factor": (
        "llama",
        family(peft.LoKrConfig, r=2, decompose_factor=4, target_modules=MLP),
    ),
    "delora": (
        "llama",
        family(peft.DeloraConfig, r=4, target_modules=ATTENTION, rank_pattern={"v_proj": 2}),
    ),
    "delora biases": ("qwen2", family(peft.DeloraConfig, target_modules=ATTENTION, bias="all")),
    "miss": ("llama", family(peft.MissConfig, r=5, target_modules=[*ATTENTION, *MLP])),
    "miss mini": (
        "qwen2",
        family(peft.MissConfig, r=4, mini_r=8, init_weights="mini", target_modules=ATTENTION),
    ),
    "miss bat": (
        "qwen2",
        family(peft.MissConfig, r=4, init_weights="bat", target_modules=ATTENTION),
    ),
    "hra": ("qwen2", family(peft.HRAConfig, r=3, target_modules=ATTENTION, bias="all")),
    "hra gs": ("llama", family(peft.HRAConfig, r=4, apply_GS=True, target_modules=ATTENTION)),
    "hira": ("llama", family(peft.HiraConfig, r=4, target_modules=ATTENTION)),
    "hira conv1d": (
        "gpt2",
        family(peft.HiraConfig, r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "road 1": ("qwen2", family(peft.RoadConfig, group_size=4, target_modules=ATTENTION)),
    "road 2": (
        "llama",
        family(peft.RoadConfig, variant="road_2", group_size=8, target_modules=ATTENTION),
    ),
    "road 4": (
        "qwen2",
        family(peft.RoadConfig, variant="road_4", group_size=8, target_modules=ATTENTION),
    ),
    "fourier": (
        "llama",
        family(peft.FourierFTConfig, n_frequency=40, scaling=30.0, target_modules=ATTENTION),
    ),
    "fourier conv1d": (
        "gpt2",
        family(peft.FourierFTConfig, n_frequency=50, scaling=90.0, target_modules=["c_attn"]),
    ),
    "c3a": ("llama", family(peft.C3AConfig, block_size=8, target_modules=ATTENTION)),
    "oft": (
        "qwen2",
        family(peft.OFTConfig, oft_block_size=8, target_modules=[*ATTENTION, "down_proj"]),
    ),
    "oft exact, blocks adjusted": (
        "llama",
        family(peft.OFTConfig, oft_block_size=9, use_cayley_neumann=False, target_modules=MLP),
    ),
    "oft shared, by count": (
        "qwen2",
        family(
            peft.OFTConfig,
            r=8,
            oft_block_size=0,
            block_share=True,
            num_cayley_neumann_terms=3,
            target_modules=ATTENTION,
        ),
    ),
    "oft two terms": (
        "llama",
        family(
            peft.OFTConfig, oft_block_size=4, num_cayley_neumann_terms=2, target_modules=ATTENTION
        ),
    ),
    "prefix": ("llama", family(peft.PrefixTuningConfig, num_virtual_tokens=5)),
    "prefix biases": ("qwen2", family(peft.PrefixTuningConfig, num_virtual_tokens=3)),
    "prefix of heads": ("gpt2", family(peft.PrefixTuningConfig, num_virtual_tokens=4)),
    "prefix windows": ("gemma3", family(peft.PrefixTuningConfig, num_virtual_tokens=6)),
    "prefix projection": (
        "llama",
        family(
            peft.PrefixTuningConfig,
            num_virtual_tokens=4,
            prefix_projection=True,
            encoder_hidden_size=16,
        ),
    ),
    "cartridge": (
        "llama",
        family(peft.CartridgeConfig, num_virtual_tokens=4, num_frozen_tokens=1),
    ),
    "prompt": ("llama", family(peft.PromptTuningConfig, num_virtual_tokens=5)),
    "prompt positions": ("gpt2", family(peft.PromptTuningConfig, num_virtual_tokens=4)),
    "prompt scaled": ("gemma3", family(peft.PromptTuningConfig, num_virtual_tokens=6)),
    "p-tuning mlp": (
        "qwen2",
        family(peft.PromptEncoderConfig, num_virtual_tokens=4, encoder_hidden_size=12),
    ),
    "p-tuning lstm": (
        "llama",
        family(
            peft.PromptEncoderConfig,
            num_virtual_tokens=4,
            encoder_hidden_size=12,
            encoder_reparameterization_type="LSTM",
            encoder_num_layers=2,
        ),
    ),
    "cpt": (
        "llama",
        family(
            peft.CPTConfig,
            cpt_token_ids=[3, 9, 27, 81],
            cpt_mask=[1, 1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 3, 4],
            opt_projection_epsilon=40.0,
            opt_projection_format_epsilon=40.0,
        ),
    ),
}


@pytest.mark.parametrize(("base", "config"), CASES.values(), ids=CASES)
def test_logits_equal_those_of_peft(base, config, bases, tune):
    saved = tune(base, config)
    compiled = saved.compile(bases[base].spec, base_weights=bases[base].weights)
    served = bases[base].served(compiled)
    assert (saved.logits - bases[base].logits).abs().max() > 0.05
    torch.testing.assert_close(served, saved.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(served.argmax(-1), saved.logits.argmax(-1))
    assert compiled.family == config.peft_type.value.lower()


GENERATED = [
    "ia3 biases",
    "ln offset",
    "vera",
    "prefix windows",
    "prefix",
    "prompt scaled",
    "prompt",
]


@pytest.mark.parametrize("case", GENERATED)
def test_greedy_tokens_equal_those_of_peft(case, bases, tune):
    """PEFT's own generate, with its cache and its positions."""
    name, config = CASES[case]
    prompt = IDS[0].tolist()

    def generate(model):
        out = model.generate(
            input_ids=IDS[:1],
            attention_mask=torch.ones_like(IDS[:1]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=97,
        )
        return out[0, -12:].tolist()

    saved = tune(name, config, forward=generate)
    compiled = saved.compile(bases[name].spec, base_weights=bases[name].weights)
    worn = PartsReference(bases[name].model, bases[name].spec, compiled)
    assert worn.greedy(prompt, 12) == saved.logits


def random_adalora(base, *, prune):
    """A model as AdaLoRA leaves it: some singular values masked, one module pruned whole."""
    config = family(
        peft.AdaLoraConfig,
        init_r=5,
        lora_alpha=7,
        target_modules=ATTENTION,
        total_step=10,
        bias="all",
    )
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    disturb(model, 0.3)
    if prune:
        masks = {}
        for i, (name, parameter) in enumerate(
            (n, p) for n, p in model.named_parameters() if "lora_E" in n
        ):
            mask = [False] * 5 if i == 1 else [(i + k) % 3 != 0 for k in range(5)]
            parameter.data[~torch.tensor(mask)] = 0
            masks[name.removeprefix("base_model.model.")] = mask
        model.peft_config["default"].rank_pattern = masks
    return model.eval()


@pytest.mark.parametrize("prune", [False, True])
def test_adalora_has_its_true_ranks(prune, bases, tmp_path):
    base = bases["qwen2"]
    model = random_adalora(base, prune=prune)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    compiled = Saved(tmp_path, wanted).compile(base.spec)
    torch.testing.assert_close(base.served(compiled), wanted, rtol=1e-4, atol=1e-4)
    ranks = [
        p.low_rank.rank if p.low_rank else 0 for n, p in compiled.sites.items() if "_proj" in n
    ]
    assert compiled.family == "adalora"
    assert max(ranks) == (4 if prune else 5)
    low_rank = [n for n, p in compiled.sites.items() if p.low_rank is not None]
    assert len(low_rank) == (5 if prune else 6)
    assert (wanted - base.logits).abs().max() > 0.05


def multitask(base, tasks):
    config = family(
        peft.MultitaskPromptTuningConfig, num_virtual_tokens=4, num_tasks=tasks, num_ranks=2
    )
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    disturb(model, 0.9)
    return model.eval()


@pytest.mark.parametrize(("tasks", "task"), [(1, None), (3, 0), (3, 2)])
def test_one_task_of_a_multitask_prompt(tasks, task, bases, tmp_path):
    base = bases["llama"]
    model = multitask(base, tasks)
    with torch.no_grad():
        out = model(input_ids=IDS, task_ids=torch.tensor([task or 0] * 2))
    wanted = out.logits[:, -IDS.shape[1] :]
    model.save_pretrained(tmp_path)
    saved = Saved(tmp_path, wanted)
    compiled = saved.compile(base.spec, {} if task is None else {"manyhats_task": task})
    assert compiled.virtual_tokens == 4
    torch.testing.assert_close(base.served(compiled), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - base.logits).abs().max() > 0.05
    if tasks > 1:
        with pytest.raises(AdapterRejectedError, match="manyhats_task is None"):
            saved.compile(base.spec)


def test_bias_differences_are_added_to_the_outputs(bases, tmp_path):
    """BitFit: the oracle is the base with its biases changed."""
    base = bases["gpt2"]
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                tensors[name] = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.add_(tensors[name])
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BITFIT"}))
    compiled = Saved(tmp_path, base.logits).compile(base.spec)
    assert compiled.family == "bitfit"
    assert len(compiled.sites) == len(tensors)
    torch.testing.assert_close(base.served(compiled), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["lokr", "c3a", "miss bat"])
def test_what_peft_converts_to_lora_is_served_as_lora(case, bases, tmp_path):
    """PEFT's own conversion: the oracle is PEFT with the converted adapter."""
    name, config = CASES[case]
    base = bases[name]
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    disturb(model, 0.2)
    peft.save_as_lora(tmp_path, model, rank=6)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).eval()
    wanted = logits(loaded)
    compiled = Saved(tmp_path, wanted).compile(base.spec)
    assert (compiled.family, compiled.max_rank) == ("lora", 6)
    torch.testing.assert_close(base.served(compiled), wanted, rtol=1e-4, atol=1e-4)


def test_our_conversion_is_peft_s(bases, tune):
    """The same leading triplets, so the same error, and the error that is reported."""
    base = bases["llama"]
    saved = tune("llama", CASES["c3a"][1])
    limits = AdapterLimits(max_rank=6, max_conversion_error=1.0)
    compiled = saved.compile(base.spec, limits=limits)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), saved.folder)
    errors = []
    for site in compiled.sites:
        delta = loaded.get_submodule(f"base_model.model.{site}").get_delta_weight("default")
        part = compiled.sites[site].low_rank
        values = torch.linalg.svdvals(delta)
        errors.append(float(values[6:].norm() / values.norm()))
        left = torch.linalg.norm(delta - part.b.t() @ part.a) / torch.linalg.norm(delta)
        assert float(left) == pytest.approx(errors[-1], rel=1e-3)
    assert float(compiled.metadata["conversion_error"]) == pytest.approx(max(errors), rel=1e-2)
    assert compiled.metadata["converted_sites"] == str(len(errors))
