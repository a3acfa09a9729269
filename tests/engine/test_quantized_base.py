"""Adapters over the NF4 base: as exact as PEFT over the same dequantized weights, alone and
together.

The yardstick is PEFT in fp32 over bitsandbytes' own dequantized weights. PEFT in bf16 over them
shows what the dtype's rounding is; the engine, which computes in bf16 too, may be off by no more
than a small multiple of it.
"""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from support.engine import LocalEngine, params
from transformers import AutoModelForCausalLM

from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
from manyhats.adapters.formats import compile_adapter
from manyhats.config import Settings
from manyhats.engine.kernels import resolve_kernels
from manyhats.engine.model.load import load_base
from manyhats.types import Digest

QUESTIONS = ("What is a good way to spend a rainy afternoon?", "Why is the sky blue?")
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def base(smollm2_path):
    """The base in NF4, from the real home: the quantized copy is kept there."""
    settings = Settings(model=str(smollm2_path))
    kernels = resolve_kernels("native", device=torch.device("cpu"), home=settings.home)
    return load_base(settings, kernels.backend)


@pytest.fixture(scope="module")
def adapters(base, repository):
    limits = AdapterLimits()
    found = {}
    for folder in sorted((repository / "examples" / "adapters").iterdir()):
        if not folder.is_dir():
            continue
        config = read_config_file(folder / "adapter_config.json", limits)
        plain = config.get("peft_type") == "LORA" and not config.get("use_dora")
        if plain:  # one PEFT model has all of them
            found[folder.name] = compile_adapter(
                config,
                read_weights(folder / "adapter_model.safetensors", limits),
                base.spec,
                limits,
                digest=Digest(folder.name),
                dtype=torch.bfloat16,
            )
    return found


@pytest.fixture(scope="module")
def oracles(smollm2_path, repository, adapters):
    """PEFT over the dequantized weights: in fp32, and in bf16."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                packed, state = bnb.functional.quantize_4bit(
                    module.weight.data.bfloat16(), quant_type="nf4"
                )
                module.weight.copy_(bnb.functional.dequantize_4bit(packed, state).float())
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        names = list(adapters)
        folder = repository / "examples" / "adapters"
        oracle = PeftModel.from_pretrained(
            copy.deepcopy(model).to(dtype),
            folder / names[0],
            adapter_name=names[0],
            autocast_adapter_dtype=False,
        )
        for name in names[1:]:
            oracle.load_adapter(folder / name, adapter_name=name, autocast_adapter_dtype=False)
        made[dtype] = oracle.to(dtype).eval()
    return made


@torch.inference_mode()
def scores(oracle: PeftModel, name: str | None, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(ids) - 1, V]: row i is of token i + 1."""
    if name is None:
        with oracle.disable_adapter():
            logits = oracle(torch.tensor([ids])).logits[0, :-1]
    else:
        oracle.set_adapter(name)
        logits = oracle(torch.tensor([ids])).logits[0, :-1]
    return logits.float().log_softmax(-1)


def test_as_exact_as_peft_over_the_same_weights(base, adapters, oracles, tmp_path):
    tokenizer = base.tokenizer
    prompts = [
        tokenizer.encode(
            tokenizer.render_chat([{"role": "user", "content": q}]), add_special_tokens=False
        )
        for q in QUESTIONS
    ]
    cases = [(name, prompt) for name in (None, *adapters) for prompt in prompts]
    with LocalEngine(base, tmp_path, adapters, kernels="native") as engine:
        sampling = params(NEW_TOKENS, ignore_eos=True)
        together = engine.generate([p for _, p in cases], sampling, [n for n, _ in cases])
        whole = [
            prompt + output.token_ids for (_, prompt), output in zip(cases, together, strict=True)
        ]
        scoring = params(0, prompt_logprobs=0)
        scored = engine.generate(whole, scoring, [n for n, _ in cases])
        alone = [
            engine.generate([ids], scoring, [name])[0]
            for ids, (name, _) in zip(whole, cases, strict=True)
        ]

    ours, single, rounding, gaps = [], [], [], []
    for (name, prompt), ids, batched, by_itself in zip(cases, whole, scored, alone, strict=True):
        exact = scores(oracles[torch.float32], name, ids)
        rounded = scores(oracles[torch.bfloat16], name, ids)
        targets = torch.tensor(ids[1:])[:, None]
        truth = exact.gather(1, targets)[:, 0]
        rounding.append(rounded.gather(1, targets)[:, 0] - truth)
        ours.append(torch.tensor([s.logprob for s in batched.prompt_logprobs[1:]]) - truth)
        single.append(torch.tensor([s.logprob for s in by_itself.prompt_logprobs[1:]]) - truth)
        generated = slice(len(prompt) - 1, None)
        gaps.append(exact[generated].max(1).values - truth[generated])
    noise = torch.cat(rounding).square().mean().sqrt()
    worst = torch.cat(rounding).abs().max()
    for errors in (torch.cat(ours), torch.cat(single), torch.cat(ours) - torch.cat(single)):
        assert errors.square().mean().sqrt() < 2 * noise
        assert errors.abs().max() < 3 * worst
    # A greedy token that is not the yardstick's own is one of two that the rounding cannot tell
    # apart.
    gap = torch.cat(gaps)
    different = int((gap > 0).sum())
    assert gap.max() < 3 * worst
    assert different < gap.numel() // 10
