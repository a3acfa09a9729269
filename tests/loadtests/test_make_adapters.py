"""Generated adapters: PEFT loads them, they are repeatable, and they change the model a little."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
make_adapters = importlib.import_module("make_adapters")

CONFIG = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def make(config_path: Path, out: Path, **given: object) -> list[Path]:
    options = {"count": 2, "rank": 3, "targets": "all", "progress": False} | given
    folders: list[Path] = make_adapters.make_adapters(config_path, out, **options)
    return folders


def test_peft_takes_them_and_they_move_the_logits_a_little(
    config_path: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = make(config_path, tmp_path / "out")
    torch.manual_seed(0)
    # Wide enough weights that hidden states have unit size, as a trained model's do.
    base = LlamaForCausalLM(LlamaConfig(**CONFIG, initializer_range=0.15)).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        plain = base(ids).logits
        model = PeftModel.from_pretrained(base, folders[0], adapter_name="a")
        loading = model.load_adapter(folders[1], adapter_name="b")
        assert not loading.unexpected_keys
        for name in ("a", "b"):
            model.set_adapter(name)
            change = (model(ids).logits - plain).norm() / plain.norm()
            assert 1e-4 < float(change) < 0.3


def test_same_name_and_seed_same_bytes(config_path: Path, tmp_path: Path) -> None:
    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return dict(load_file(folder / "adapter_model.safetensors"))

    one, two = (make(config_path, tmp_path / out) for out in ("one", "two"))
    other = make(config_path, tmp_path / "three", seed=1)
    assert [f.name for f in one] == ["bench-all-r3-000", "bench-all-r3-001"]
    first = weights(one[0])
    assert all(torch.equal(first[k], v) for k, v in weights(two[0]).items())
    for different in (one[1], other[0]):
        assert not any(torch.equal(first[k], v) for k, v in weights(different).items())


def test_targets_rank_and_dtype(config_path: Path, tmp_path: Path) -> None:
    (folder,) = make(config_path, tmp_path / "out", count=1, rank=5, targets="qv")
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {
        name.split("layers.1.")[1]: tuple(t.shape) for name, t in tensors.items() if "s.1." in name
    }
    assert shapes == {
        "self_attn.q_proj.lora_A.weight": (5, 48),
        "self_attn.q_proj.lora_B.weight": (96, 5),
        "self_attn.v_proj.lora_A.weight": (5, 48),
        "self_attn.v_proj.lora_B.weight": (32, 5),
    }
    assert len(tensors) == 8
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (5, ["q_proj", "v_proj"])
