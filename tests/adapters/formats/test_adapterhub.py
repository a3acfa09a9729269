"""What AdapterHub's library saved against its own forward: the fixtures' logits and tokens."""

from __future__ import annotations

import json

import pytest
import torch
from support import adapterhub
from support.adapterhub import COUNT, NAMES, PROMPT, bases, expected, files_of

from manyhats.engine.model.parts_reference import PartsReference

FAMILIES = {
    "houlsby": "adapterhub_bottleneck",
    "compacter": "adapterhub_compacter",
    "prefix": "adapterhub_prefix_tuning",
    "lora": "adapterhub_lora",
    "ia3": "adapterhub_ia3",
    "mam": "adapterhub_union",
    "stack_families": "adapterhub_stack",
    "fuse_pfeiffer": "adapterhub_fusion",
}


def alike(found, wanted):
    """Within 1e-4 of the largest logit."""
    return (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_and_tokens_are_adapterhub_s(name):
    base = bases()[adapterhub.base_of(name)]
    worn = PartsReference(base.model, base.spec, adapterhub.compile_files(name))
    wanted = expected(name)
    assert alike(worn.logits(PROMPT), wanted.logits)
    assert worn.greedy(PROMPT, COUNT) == wanted.greedy
    # the adapter matters, and so does each of a composition's
    assert not alike(expected(adapterhub.base_of(name)).logits, wanted.logits)


@pytest.mark.parametrize("name", sorted(bases()))
def test_the_base_is_adapterhub_s(name):
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert alike(bases()[name].model(input_ids=ids).logits[0], expected(name).logits)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_listing_says_what_it_is(name):
    compiled = adapterhub.compile_files(name)
    assert compiled.family == FAMILIES[name]
    assert compiled.virtual_tokens == {"prefix": 3, "mam": 2}.get(name, 0)


def test_layers_left_out_and_widths_by_layer():
    compiled = adapterhub.compile_files("houlsby_left_out")
    assert list(compiled.sites) == ["model.layers.0.after_attention", "model.layers.0.after_mlp"]
    assert {len(p.bottlenecks[0].down) for p in compiled.sites.values()} == {8}
    stacked = adapterhub.compile_files("stack_bottlenecks").sites
    assert [len(p.bottlenecks) for p in stacked.values()] == [2, 3, 1, 2]


def test_names_of_a_model_without_a_head_are_the_same_adapter():
    """As ``LlamaModel`` saves them, not ``LlamaForCausalLM``."""
    config, tensors = files_of("compacter")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    found = adapterhub.compile_parts(config, short)
    assert found.sites.keys() == adapterhub.compile_files("compacter").sites.keys()


def test_lora_of_the_library_before_its_scale_was_right_is_served_as_that_trained_it():
    config, tensors = files_of("lora")
    old = adapterhub.compile_parts(config | {"version": "adapters.1.0.1"}, tensors)
    new = adapterhub.compile_parts(config, tensors)
    for name, parts in new.sites.items():
        assert torch.allclose(old.sites[name].low_rank.b * (5 / 3), parts.low_rank.b)


def test_parts_are_of_the_dtype_asked_for_and_contiguous():
    for name in NAMES:
        for parts in adapterhub.compile_files(name, dtype=torch.bfloat16).sites.values():
            for tensor in parts.tensors():
                assert tensor.is_contiguous()
                assert tensor.dtype == torch.bfloat16


def test_the_fixtures_are_as_the_library_writes_them():
    config, tensors = files_of("pfeiffer")
    assert config["version"] == "adapters.1.3.0"
    assert "peft_type" not in json.dumps(config)
    assert all(".adapters.pfeiffer." in name for name in tensors)
