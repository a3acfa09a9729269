"""The data of ``finetune.py``: pairs of prompt and completion as tokens, held-out ones, batches."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

SEED = 20240
IGNORED = -100
"""The label of a token that no loss is taken on."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A line of the data. ``ids``: both sides; the completion's begin at ``start``; ``probe``: the
    same as the server's evaluation takes it.
    """

    ids: list[int]
    start: int
    probe: dict[str, Any]


def read_pairs(path: Path, tokenizer: Any, max_length: int) -> list[Pair]:
    """The pairs of a JSONL file, through the model's chat template if it has one.

    Raises ValueError that names the line.
    """
    pairs = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            said = json.loads(line)
            head, tail = texts(tokenizer, said["prompt"], said["completion"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from error
        prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
        ids = prompt + tokenizer(tail, add_special_tokens=False)["input_ids"]
        if not prompt or len(ids) == len(prompt) or len(ids) > max_length:
            raise ValueError(
                f"{path}, line {number}: {len(prompt)} tokens of prompt, {len(ids)} in all; both "
                f"sides need one, and --max-length is {max_length}"
            )
        pairs.append(Pair(ids, len(prompt), as_probe(tokenizer, said)))
    return pairs


def texts(tokenizer: Any, prompt: str, completion: str) -> tuple[str, str]:
    """What comes before the first token that is learned, and what is learned."""
    if tokenizer.chat_template is None:
        return prompt, completion + tokenizer.eos_token
    asked = [{"role": "user", "content": prompt}]
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    head = render(asked, add_generation_prompt=True)
    whole = render([*asked, {"role": "assistant", "content": completion}])
    if not whole.startswith(head):
        raise ValueError("the chat template writes the prompt in another way once it is answered")
    return head, whole[len(head) :]


def as_probe(tokenizer: Any, said: Mapping[str, str]) -> dict[str, Any]:
    """A pair as the server's evaluation takes it, through the same template as here."""
    if tokenizer.chat_template is None:
        return {"prompt": said["prompt"], "completion": said["completion"]}
    asked = {"role": "user", "content": said["prompt"]}
    return {"messages": [asked, {"role": "assistant", "content": said["completion"]}]}


def split(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """(trained on, held out), drawn by the seed. Raises ValueError where one would be empty."""
    shuffled = random.Random(SEED).sample(pairs, len(pairs))
    count = max(1, round(share * len(pairs)))
    if count >= len(pairs):
        raise ValueError(f"{len(pairs)} pairs are too few: some are trained on, some held out")
    return shuffled[count:], shuffled[:count]


def collate(batch: Sequence[Pair], pad: int) -> dict[str, torch.Tensor]:
    """[batch, longest] int64 each; labels are ``IGNORED`` before the completion and behind it."""
    width = max(len(pair.ids) for pair in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    attend = torch.zeros(len(batch), width, dtype=torch.long)
    for row, pair in enumerate(batch):
        end = len(pair.ids)
        ids[row, :end] = torch.tensor(pair.ids)
        labels[row, pair.start : end] = ids[row, pair.start : end]
        attend[row, :end] = 1
    return {"input_ids": ids, "attention_mask": attend, "labels": labels}
