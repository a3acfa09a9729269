"""DoRA, LoRA on embeddings and the head, and what PEFT trains beside LoRA, against PEFT itself."""

from __future__ import annotations

import peft
import pytest
import torch

ATTENTION = ["q_proj", "v_proj"]


def lora(**fields):
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6} | fields)


CASES = {
    "dora": ("llama", lora(use_dora=True, target_modules="all-linear")),
    "dora with biases": ("qwen2", lora(use_dora=True, target_modules=[*ATTENTION, "down_proj"])),
    "dora conv1d": ("gpt2", lora(use_dora=True, target_modules=["c_attn", "c_proj"])),
    "dora conv1d flag": ("gpt2", lora(use_dora=True, fan_in_fan_out=True, target_modules=["c_fc"])),
    "dora rslora": ("gemma3", lora(use_dora=True, use_rslora=True, target_modules=ATTENTION)),
    "dora trained biases": ("qwen2", lora(use_dora=True, bias="all", target_modules=ATTENTION)),
    "dora head": ("llama", lora(use_dora=True, target_modules=["lm_head", "q_proj"])),
    "inner bias": ("llama", lora(lora_bias=True, target_modules=ATTENTION)),
    "head": ("llama", lora(target_modules=["lm_head", "q_proj"])),
    "tied head": ("tied", lora(target_modules=["lm_head", "q_proj"])),
    "embedding": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "tied embedding": ("tied", lora(target_modules=["embed_tokens", "q_proj"])),
    "scaled embedding": ("gemma3", lora(target_modules=["embed_tokens", "q_proj"])),
    "positions": ("gpt2", lora(target_modules=["wpe", "wte", "c_attn"])),
    "both": ("llama", lora(target_modules=["embed_tokens", "lm_head"])),
    "saved head": ("llama", lora(target_modules=ATTENTION, modules_to_save=["lm_head"])),
    "saved tied head": ("tied", lora(target_modules=ATTENTION, modules_to_save=["lm_head"])),
    "saved embedding": ("llama", lora(target_modules=ATTENTION, modules_to_save=["embed_tokens"])),
    "saved tied embedding": (
        "tied",
        lora(target_modules=ATTENTION, modules_to_save=["embed_tokens"]),
    ),
    "saved both": (
        "gemma3",
        lora(target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "saved norm": ("gemma3", lora(target_modules=ATTENTION, modules_to_save=["norm"])),
    "saved linear": ("gpt2", lora(target_modules=["c_attn"], modules_to_save=["mlp.c_fc"])),
    "tokens": ("llama", lora(target_modules=ATTENTION, trainable_token_indices=[9, 3, 71])),
    "tied tokens": ("tied", lora(target_modules=ATTENTION, trainable_token_indices=[9, 3, 71])),
    "scaled tokens": ("gemma3", lora(target_modules=ATTENTION, trainable_token_indices=[26, 3])),
    "tokens by module": (
        "llama",
        lora(
            target_modules=ATTENTION,
            trainable_token_indices={"embed_tokens": [26], "lm_head": [4, 3]},
        ),
    ),
    "plain tokens": ("llama", peft.TrainableTokensConfig(token_indices=[9, 3, 71])),
    "plain tied tokens": ("tied", peft.TrainableTokensConfig(token_indices=[9, 3, 71])),
    "plain scaled tokens": ("gemma3", peft.TrainableTokensConfig(token_indices=[9, 3, 71])),
    "plain tokens of the head": (
        "llama",
        peft.TrainableTokensConfig(
            token_indices=[9, 3], target_modules=["embed_tokens", "lm_head"]
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
