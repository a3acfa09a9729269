"""A server for tests of policy: a small model with random weights in fp32, so that what is measured
is the server and each answer is exactly one version's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import torch
from make_adapters import make_adapters
from server_process import ServerProcess
from transformers import LlamaConfig, LlamaForCausalLM

from manyhats.config import Settings
from manyhats.engine.model.default import ensure_default_model

ADMIN_KEY = "admin-of-the-load-test"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


def tiny_model(folder: Path, *, hidden: int = 128, layers: int = 4) -> Path:
    """A Llama of ``layers`` layers with the default model's tokenizer, written to ``folder``."""
    known = ensure_default_model(Settings().home)
    vocab = json.loads((known / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in known.iterdir():
        if "token" in path.name or path.name in ("chat_template.jinja", "vocab.json", "merges.txt"):
            shutil.copy(path, folder / path.name)
    return folder


def adapters(folder: Path, model: Path, count: int) -> list[Path]:
    """``count`` adapter folders for the model, different enough to answer differently."""
    return make_adapters(
        model / "config.json", folder, count=count, rank=4, scale=0.3, progress=False
    )


@asynccontextmanager
async def serving(work: Path, model: Path, *flags: str) -> Iterator[ServerProcess]:
    """The server with an admin key, once it is ready; stopped afterwards."""
    os.environ["MANYHATS_ADMIN_API_KEYS"] = ADMIN_KEY  # a flag can be read in the process list
    fixed = ("--model", str(model), "--home", str(work / "home"), "--quantization", "none")
    fixed += ("--dtype", "fp32", "--kv-cache-mb", "128", "--adapter-root", str(work))
    server = ServerProcess([*fixed, *flags], work / "server.log")
    try:
        await server.wait_ready()
        yield server
    finally:
        server.stop()


async def register(http: httpx.AsyncClient, name: str, folders: Sequence[Path]) -> None:
    """Each folder a version of ``name``, the last one stable. Raises httpx.HTTPStatusError."""
    for folder in folders:
        body = {"name": name, "path": str(folder.resolve())}
        answer = await http.post("/admin/adapters", json=body, headers=ADMIN)
        answer.raise_for_status()
