"""Families as PEFT wrote them, all in one batch of the engine: the tokens are PEFT's own."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import save_file
from support.engine import LocalEngine, assert_at_rest, base_of, params
from support.families import good_adapters
from support.models import tiny_tokenizer

FAMILIES = [
    "lora", "dora", "lora tokens", "adalora", "ia3", "ln_tuning", "beft", "trainable_tokens",
    "prompt_tuning", "p_tuning", "prefix_tuning", "vera", "loha", "lokr", "delora", "miss", "hra",
    "oft", "hira", "road", "fourierft", "c3a",
]  # fmt: skip
PROMPT = [3, 17, 5, 9, 21, 4, 8]
COUNT = 6


def of_peft(good, folder):
    """Log-probabilities that PEFT gives its own greedy tokens."""
    folder.mkdir()
    save_file(good.tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(good.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(good.model), folder).eval()
    tokens, scores = list(PROMPT), []
    with torch.no_grad():
        for _ in range(COUNT):
            last = model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(last.argmax()))
            scores.append(float(last.max()))
    return tokens[len(PROMPT) :], scores


def test_one_batch_of_every_family_answers_as_peft(tmp_path, home):
    good = {name: good_adapters()[name] for name in FAMILIES}
    wanted = {name: of_peft(good[name], tmp_path / name) for name in FAMILIES}
    adapters = {name: good[name].attempt(dtype=torch.float32) for name in FAMILIES}
    base = base_of(copy.deepcopy(good["lora"].model), tiny_tokenizer())
    sampling = params(COUNT, ignore_eos=True, logprobs=0)
    settings = {"slots": len(FAMILIES), "pool_rows": 400, "max_num_seqs": len(FAMILIES)}
    with LocalEngine(base, home, adapters, **settings) as engine:
        found = engine.generate([PROMPT] * len(FAMILIES), sampling, FAMILIES)
        assert_at_rest(engine)
    for name, output in zip(FAMILIES, found, strict=True):
        assert output.error is None, name
        tokens, scores = wanted[name]
        assert output.token_ids == tokens, name
        assert [s.logprob for s in output.logprobs] == pytest.approx(scores, abs=1e-4), name
