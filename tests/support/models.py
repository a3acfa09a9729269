"""Small randomly initialised models of many architectures, and a tokenizer to go with them."""

from __future__ import annotations

import copy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 199
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON),
    "mistral": MistralConfig(**_COMMON, head_dim=8, sliding_window=13),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **(_COMMON | {"num_hidden_layers": 4}),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=11,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "phi3": Phi3Config(**_COMMON),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=48,
        n_layer=3,
        n_head=6,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose biases and norms are random too, so that nothing is hidden by zeros and
    ones.

    The weights are large enough for greedy continuations to differ between prompts.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[name]), dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else 0.25 if name == "gpt2" else 0.12
            noise = torch.randn(parameter.shape, generator=generator) * scale
            if parameter.ndim == 1 and key.endswith("weight"):  # a norm: keep it near one
                parameter.add_(noise)
            else:
                parameter.copy_(noise)
    model.generation_config.pad_token_id = 0
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: ``w7`` is token 7; 1 and 2 are begin and end."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def greedy(
    model: PreTrainedModel, prompt: list[int], max_new_tokens: int, *, ignore_eos: bool = True
) -> list[int]:
    """transformers' own greedy continuation."""
    eos = {"eos_token_id": VOCAB} if ignore_eos else {}  # an id that never comes
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **eos,
    )
    return out[0, len(prompt) :].tolist()
