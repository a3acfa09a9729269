"""32 streaming requests over the base and every demo adapter at the same time, held against PEFT
itself.
"""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "What is a good way to spend a rainy afternoon?",
    "How do I learn to cook?",
    "Why is the sky blue?",
    "Tell me about the moon.",
    "What should I pack for a trip?",
    "How can I sleep better?",
)
REQUESTS = 32
NEW_TOKENS = 12

pytestmark = pytest.mark.e2e


def pair(index: int, names: list[str | None]) -> tuple[str | None, str]:
    """Who answers what in request ``index``: 32 different pairs."""
    return names[index % len(names)], QUESTIONS[index // len(names) % len(QUESTIONS)]


@pytest.fixture(scope="module")
def names(repository) -> list[str | None]:
    """PEFT's demo adapters; AdapterHub's is held against that library elsewhere."""
    folders = (repository / "examples" / "adapters").glob("*/adapter_config.json")
    made = sorted(p.parent.name for p in folders if "peft_type" in json.loads(p.read_bytes()))
    assert len(made) == 8
    return [None, *made]


@pytest.fixture(scope="module")
def expected(smollm2_path, repository, names) -> dict[tuple[str | None, str], list[int]]:
    """PEFT's own greedy tokens in fp32, each request alone."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    folder = repository / "examples" / "adapters"
    worn, model = "", None
    found = {}
    for name, question in sorted({pair(i, names) for i in range(REQUESTS)}, key=str):
        if name != worn:  # a base each: PEFT mixes no families in one model
            worn = name
            model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
            if name is not None:
                model = PeftModel.from_pretrained(model, folder / name).eval()
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        arguments = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
        }
        out = model.generate(**arguments)
        found[name, question] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found


async def ask(client: openai.AsyncOpenAI, model: str, question: str) -> str:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=NEW_TOKENS,
        stream=True,
    )
    return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])


async def ask_all(server, names) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
        base = (await client.models.list()).data[0].id
        return await asyncio.gather(
            *(
                ask(client, name or base, question)
                for name, question in (pair(i, names) for i in range(REQUESTS))
            )
        )


def test_each_of_32_equals_peft_alone(server, names, expected):
    together = asyncio.run(ask_all(server, names))
    wanted = [expected[pair(i, names)] for i in range(REQUESTS)]
    assert together == wanted
    # The adapters do something: to the same question no two of them, nor the base, say the same
    # (two greedy answers of a small model may still begin alike, once in a while).
    assert len(set(wanted)) >= REQUESTS - 2


def test_each_equals_itself_alone(server, names, expected):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
        base = client.models.list().data[0].id
        for name in names:
            answer = client.chat.completions.create(
                model=name or base,
                messages=[{"role": "user", "content": QUESTIONS[0]}],
                temperature=0,
                max_tokens=NEW_TOKENS,
            )
            assert answer.choices[0].message.content == expected[name, QUESTIONS[0]]
