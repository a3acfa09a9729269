"""The fixtures of make_fixtures.py: bases, adapters, AdapterHub's own logits."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from support.sites import describe_plain
from transformers import AutoModelForCausalLM

from manyhats.adapters.files import AdapterLimits, locate, parse_weights, read_config
from manyhats.adapters.formats import compile_adapter
from manyhats.adapters.parts import BaseSpec, CompiledAdapter
from manyhats.types import Digest

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "adapters" / "formats" / "adapterhub"
LIMITS = AdapterLimits()
_CASES = json.loads((FIXTURES / "cases.json").read_text("utf-8"))
_COMPOSITIONS: dict[str, dict[str, Any]] = _CASES["compositions"]
PROMPT: list[int] = _CASES["prompt"]
COUNT = 6
SINGLES = sorted(folder.name for folder in (FIXTURES / "saved").iterdir())
NAMES = [*SINGLES, *sorted(_COMPOSITIONS)]
"""Every adapter, stack and fusion."""


@dataclass(frozen=True)
class Base:
    """A tiny base and what the importers know of it."""

    model: Any
    spec: BaseSpec


@dataclass(frozen=True)
class Expected:
    """AdapterHub's own: logits of PROMPT, [tokens, vocabulary], and the greedy tokens after it."""

    logits: torch.Tensor
    greedy: list[int]


@cache
def bases() -> Mapping[str, Base]:
    """By ``model_type``."""
    found = {}
    for folder in sorted((FIXTURES / "bases").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.requires_grad_(False)
        found[folder.name] = Base(model, describe_plain(model))
    return found


def base_of(name: str) -> str:
    """The base that an adapter is for."""
    return next((base for base in ("gpt2", "mistral") if name.startswith(base)), "llama")


def expected(name: str) -> Expected:
    """Of an adapter, or of a base alone."""
    found = _expected()
    return Expected(found[f"{name}.logits"], found[f"{name}.greedy"].tolist())


@cache
def _expected() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "expected.safetensors")


@cache
def exporter() -> Any:
    """examples/export_adapterhub.py."""
    path = ROOT / "examples" / "export_adapterhub.py"
    spec = importlib.util.spec_from_file_location("export_adapterhub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _read(name: str) -> tuple[str, dict[str, torch.Tensor]]:
    if name not in _COMPOSITIONS:
        files = locate(FIXTURES / "saved" / name, [FIXTURES])
        return files.config_path.read_text("utf-8"), load_file(files.weights_path)
    case = _COMPOSITIONS[name]
    members = [FIXTURES / "saved" / member for member in case["members"]]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        exporter().export(out, members, FIXTURES / "fusions" / name if case["fusion"] else None)
        text = (out / "adapter_config.json").read_text("utf-8")
        return text, load_file(out / "adapter_model.safetensors")


def files_of(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of a single one as saved, of several as exported."""
    text, tensors = _read(name)
    return json.loads(text), dict(tensors)


def compile_parts(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    base: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    limits: AdapterLimits = LIMITS,
) -> CompiledAdapter:
    """As the server does with two files."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return compile_adapter(
        read_config(json.dumps(config).encode(), limits),
        parse_weights(data, limits),
        bases()[base].spec,
        limits,
        digest=Digest(hashlib.sha256(data).hexdigest()),
        dtype=dtype,
    )


def compile_files(name: str, *, dtype: torch.dtype = torch.float32) -> CompiledAdapter:
    """One of NAMES over its own base."""
    return compile_parts(*files_of(name), base_of(name), dtype=dtype)
