"""What is kept beside a version: computed once a base, never trusted, never needed."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import tiny_model
from support.sites import describe_plain

from manyhats.adapters.derived import DerivedFile
from manyhats.adapters.files import AdapterLimits, read_config_file, read_weights
from manyhats.adapters.formats import compile_adapter
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.types import Digest

LIMITS = AdapterLimits()


class Counting:
    """Base weights that say how often they were read."""

    def __init__(self, weights: LoadedWeights) -> None:
        self._weights = weights
        self.reads = 0

    def weight(self, site_name: str) -> torch.Tensor:
        self.reads += 1
        return self._weights.weight(site_name)


@pytest.fixture(scope="module")
def base():
    model = tiny_model("llama")
    return model, describe_plain(model, "a" * 64)


@pytest.fixture(params=["dora", "hadamard"])
def folder(request, base, tmp_path):
    config = (
        peft.LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
        if request.param == "dora"
        else peft.LoHaConfig(r=7, target_modules=["k_proj"], task_type="CAUSAL_LM")
    )
    model = peft.get_peft_model(copy.deepcopy(base[0]), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder, base, digest="a" * 64):
    """As the server does it; returns the adapter and how often a base weight was read."""
    model, spec = base
    weights = Counting(LoadedWeights(site_modules(model, spec)))
    derived = DerivedFile(folder, digest, LIMITS)
    compiled = compile_adapter(
        read_config_file(folder / "adapter_config.json", LIMITS),
        read_weights(folder / "adapter_model.safetensors", LIMITS),
        spec, LIMITS, digest=Digest("d"), dtype=torch.float32, base_weights=weights,
        derived=derived,
    )  # fmt: skip
    derived.save()
    return compiled, weights.reads


def kept(folder):
    return sorted(path.name for path in folder.glob("*derived*"))


def same(one, other):
    assert one.sites.keys() == other.sites.keys()
    for name in one.sites:
        pairs = zip(one.sites[name].tensors(), other.sites[name].tensors(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_second_load_computes_nothing_and_is_the_same(folder, base, monkeypatch):
    first, reads = load(folder, base)
    dora = first.family == "dora"
    assert reads == (3 if dora else 0)
    assert len(kept(folder)) == 1
    if not dora:
        monkeypatch.delattr(torch.linalg, "svd")
    second, reads = load(folder, base)
    assert reads == 0
    same(second, first)


def test_another_base_computes_its_own_in_the_place_of_the_first(folder, base):
    load(folder, base)
    before = kept(folder)
    _, reads = load(folder, base, digest="b" * 64)
    assert reads in (0, 3)
    assert len(kept(folder)) == 1
    assert kept(folder) != before


@pytest.mark.parametrize("where", [9, -1, -5])
def test_damage_is_seen_and_mended(folder, base, where):
    first, reads = load(folder, base)
    path = next(folder.glob("derived-*"))
    data = bytearray(path.read_bytes())
    data[where] ^= 0x40
    path.write_bytes(data)
    again, reads_again = load(folder, base)
    assert reads_again == reads
    same(again, first)
    assert load(folder, base)[1] == 0


def test_a_cut_file_is_seen_and_mended(folder, base):
    first, reads = load(folder, base)
    path = next(folder.glob("derived-*"))
    path.write_bytes(path.read_bytes()[:100])
    again, reads_again = load(folder, base)
    assert reads_again == reads
    same(again, first)


def test_a_folder_that_cannot_be_written_costs_only_time(folder, base, tmp_path, monkeypatch):
    derived = DerivedFile(folder, "a" * 64, LIMITS)
    found = derived.get("x", lambda: {"norm": torch.arange(3.0)})
    monkeypatch.setattr(derived, "_path", tmp_path / "gone" / "derived-0.safetensors")
    derived.save()
    assert torch.equal(found["norm"], torch.arange(3.0))


def test_an_adapter_without_anything_to_keep_leaves_no_file(base, tmp_path):
    model = peft.get_peft_model(
        copy.deepcopy(base[0]), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path)
    load(tmp_path, base)
    assert kept(tmp_path) == []
