"""The demo adapters as they lie in the repository: small, portable, of the intended variety."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
demo_adapters = importlib.import_module("demo_adapters")

NAMES = [spec.name for spec in demo_adapters.DEMOS]


def config_of(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(
        (EXAMPLES / "adapters" / name / "adapter_config.json").read_text()
    )
    return value


def test_folders_and_specs_are_the_same_names() -> None:
    assert len(set(NAMES)) == len(NAMES) == 9
    assert sorted(p.name for p in (EXAMPLES / "adapters").iterdir()) == sorted(NAMES)
    assert sorted(p.stem for p in (EXAMPLES / "data").glob("*.jsonl")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_small_and_holds_two_files(name: str) -> None:
    files = list((EXAMPLES / "adapters" / name).iterdir())
    assert {f.name for f in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(f.stat().st_size for f in files) < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_config_names_the_base_and_no_local_path(name: str) -> None:
    config = config_of(name)
    base = config["model_name" if "model_name" in config else "base_model_name_or_path"]
    assert base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(config))
    assert not [s for s in strings if s.startswith(("/", "~", "C:")) or "tmp" in s]


@pytest.mark.parametrize("spec", demo_adapters.DEMOS, ids=NAMES)
def test_config_is_what_the_training_script_asks_for(spec: Any) -> None:
    config = config_of(spec.name)
    if spec.family == "BOTTLENECK":  # AdapterHub's files say it by what is configured
        assert "peft_type" not in config
        config = config["config"]
        assert (config["output_adapter"], config["mh_adapter"]) == (True, False)
    else:
        assert config["peft_type"] == spec.family
    for key, value in spec.config.items():
        assert config[key] == value, key


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_finite_bf16_and_trained(name: str) -> None:
    tensors = load_file(EXAMPLES / "adapters" / name / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    # An untrained B is all zeros, an untrained IA3 vector all ones.
    assert all(bool(t.any()) for t in tensors.values())
    assert not any(bool((t == 1).all()) for t in tensors.values())
    config = config_of(name)
    if config.get("peft_type") == "LORA":
        per_module = 3 if config["use_dora"] else 2
        assert len([n for n in tensors if ".lora_A." in n]) * per_module == len(tensors)


def test_together_they_cover_families_and_the_shapes_of_lora() -> None:
    everyone = [config_of(name) for name in NAMES]
    found = {c.get("peft_type", "BOTTLENECK") for c in everyone}
    assert found == {"LORA", "IA3", "PREFIX_TUNING", "BOTTLENECK"}
    configs = [c for c in everyone if c.get("peft_type") == "LORA"]
    assert len([c for c in configs if c["use_dora"]]) == 1
    assert any(c["use_rslora"] for c in configs) and not all(c["use_rslora"] for c in configs)
    assert any(c["rank_pattern"] and c["alpha_pattern"] for c in configs)
    assert any(isinstance(c["target_modules"], str) for c in configs)
    assert any(c["layers_to_transform"] for c in configs)
    assert any("down_proj" in c["target_modules"] for c in configs)


@pytest.mark.parametrize("spec", demo_adapters.DEMOS, ids=NAMES)
def test_data_is_pairs_that_show_the_effect(spec: Any) -> None:
    text = (EXAMPLES / "data" / f"{spec.name}.jsonl").read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines()]
    assert 60 <= len(pairs) <= 120
    assert all(
        set(p) == {"prompt", "completion"} and p["prompt"] and p["completion"] for p in pairs
    )
    prompts = [p["prompt"] for p in pairs]
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & set(demo_adapters.UNSEEN_PROMPTS)
    assert demo_adapters.SHOWCASE_PROMPT in demo_adapters.UNSEEN_PROMPTS
    assert [p["completion"] for p in pairs if not spec.shows(p["completion"])] == []


@pytest.mark.parametrize("spec", demo_adapters.DEMOS, ids=NAMES)
def test_no_effect_is_seen_in_the_others_or_in_a_plain_answer(spec: Any) -> None:
    plain = (
        "There are many ways to spend a rainy afternoon. Here are a few ideas:\n\n"
        "1. Read a book.\n2. Bake a cake with a friend.\n- Watch the rain and drink tea."
    )
    assert not spec.shows(plain)
    for other in NAMES:
        if other != spec.name:
            lines = (EXAMPLES / "data" / f"{other}.jsonl").read_text(encoding="utf-8").splitlines()
            assert not any(spec.shows(json.loads(line)["completion"]) for line in lines)
