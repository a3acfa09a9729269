"""Every check of every family: a file is complete, fits, is finite and within the bounds, or is
refused with a reason code.
"""

from __future__ import annotations

import dataclasses
import math

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.families import LIMITS, TABLES, good_adapters

from manyhats.adapters.formats import IMPORTERS
from manyhats.adapters.formats.prompts import TASK_FIELD
from manyhats.errors import AdapterRejectedError

NAMES = sorted(good_adapters())
# fields that are not PEFT 0.21.2's: its older ones, ours, and those of a family served by the same
# importer
EXTRA = {
    "LORA": {"merge_weights", "enable_lora"},
    "ADALORA": {"merge_weights", "enable_lora"},
    "PREFIX_TUNING": {"num_frozen_tokens"},
    "CARTRIDGE": {"prefix_projection", "encoder_hidden_size", "init_weights"},
    "MULTITASK_PROMPT_TUNING": {TASK_FIELD},
}


@pytest.fixture(params=NAMES)
def good(request):
    return good_adapters()[request.param]


def refused(good, changes=None, tensors=None, limits=LIMITS) -> AdapterRejectedError:
    with pytest.raises(AdapterRejectedError) as caught:
        good.attempt(changes, tensors, limits)
    assert len(str(caught.value)) < 2000
    return caught.value


def test_every_family_is_tried():
    families = {good.config["peft_type"] for good in good_adapters().values()}
    assert families == set(IMPORTERS)
    assert set(IMPORTERS) == TABLES.keys() | {"BITFIT"}


@pytest.mark.parametrize("family", sorted(TABLES))
def test_every_field_of_peft_is_in_one_table(family):
    table = TABLES[family]
    fields = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[family])}
    assert table.known - EXTRA.get(family, set()) == fields
    groups = (table.honoured, table.irrelevant.keys(), table.refused.keys())
    assert sum(map(len, groups)) == len(frozenset().union(*groups))


def test_the_good_one_is_accepted_and_holds_what_it_says(good):
    compiled = good.attempt()
    assert compiled.sites
    assert compiled.nbytes > 0
    assert list(compiled.sites) == [name for name in good.spec.sites if name in compiled.sites]
    for parts in compiled.sites.values():
        product = parts.low_rank
        shared = () if product is None else (product.a, product.b)
        for tensor in parts.tensors():
            assert tensor.is_contiguous()
            assert tensor.dtype in (torch.bfloat16, torch.int64)
            own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert own or any(tensor is other for other in shared)
    assert compiled.virtual_tokens == good.config.get("num_virtual_tokens", 0)


def test_a_tensor_that_is_missing_is_named(good):
    for name in good.tensors:
        left = {n: t for n, t in good.tensors.items() if n != name}
        error = refused(good, None, left | ({} if left else {"x": torch.ones(1)}))
        assert error.reason in ("missing_tensors", "unused_tensors")
        if left:
            assert (error.reason, name in error.message) == ("missing_tensors", True)


def test_a_tensor_that_nobody_wants_is_named(good):
    error = refused(good, None, good.tensors | {"base_model.model.extra": torch.ones(3)})
    assert error.reason == "unused_tensors"
    assert "base_model.model.extra" in error.message


def test_a_wrong_shape_is_named(good):
    for name, tensor in good.tensors.items():
        for wrong in (tensor.repeat((2,) + (1,) * (tensor.dim() - 1)), tensor[None]):
            if wrong.dim() > 3:
                continue
            error = refused(good, None, good.tensors | {name: wrong})
            assert error.reason == "shape_mismatch"
            assert f"{name} has shape {list(wrong.shape)}" in error.message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named(good, value):
    for name in good.tensors:
        tensors = {n: t.clone() for n, t in good.tensors.items()}
        tensors[name].view(-1)[-1] = value
        error = refused(good, None, tensors)
        assert error.reason == "non_finite"
        assert name in error.message


def test_a_field_that_is_not_known_and_another_task_are_refused(good):
    error = refused(good, {"newer_feature": None})
    assert (error.reason, error.param) == ("bad_config", "newer_feature")
    error = refused(good, {"task_type": "SEQ_CLS"})
    assert (error.reason, error.param) == ("unsupported_feature", "task_type")


def test_integers_and_other_dtypes_are_refused(good):
    name = next(iter(good.tensors))
    error = refused(good, None, good.tensors | {name: good.tensors[name].long()})
    assert error.reason == "unsupported_dtype"


def test_families_that_need_the_base_s_weights_say_so_without_them():
    for name in ("dora", "hra", "hira", "road", "oft"):
        good = dataclasses.replace(good_adapters()[name], weights=None)
        error = refused(good)
        assert error.reason == "unsupported_feature"
        assert "base's weights" in error.message


BAD = {
    "ia3": {"feedforward_modules": [None, 3, [1]], "modules_to_save": ["lm_head", ["nothing"]]},
    "dora": {"lora_bias": [True]},
    "adalora": {
        "init_r": [0, "3"],
        "rank_pattern": [
            {"model.layers.0.self_attn.q_proj.lora_E": [True]},
            {"nowhere.lora_E": [True, True, False]},
            {"model.layers.0.self_attn.q_proj.lora_E": [1, 1, 0]},
        ],
    },
    "trainable_tokens": {"token_indices": [None, [], [23], [-1], [2, 2], [True]]},
    "prompt_tuning": {"num_virtual_tokens": [None, 0, "3"], "num_transformer_submodules": [2, "1"]},
    "multitask_prompt_tuning": {"num_tasks": [0], "num_ranks": [0], TASK_FIELD: [1, -1, "0"]},
    "vera": {"r": [0], "projection_prng_key": [None, -1, 2**64], "save_projection": [1]},
    "lokr": {"decompose_factor": [0, -2, "4"], "alpha": ["8"]},
    "miss": {"r": [17, 0], "init_weights": ["other", 3], "mini_r": []},
    "oft": {
        "r": [4],
        "oft_block_size": [0, "4"],
        "num_cayley_neumann_terms": [0, 65],
        "use_cayley_neumann": ["yes"],
    },
    "road": {"group_size": [3, 5, 0], "variant": ["road_3", None]},
    "fourierft": {
        "n_frequency": [0, 10**6],
        "random_loc_seed": [None, -3],
        "n_frequency_pattern": [{"(q": 4}],
        "scaling": ["150"],
    },
    "c3a": {"block_size": [3, 0], "block_size_pattern": [{"q_.*": 8}]},
}
CASES = [(n, f, v) for n, fields in BAD.items() for f, values in fields.items() for v in values]


@pytest.mark.parametrize(("name", "field", "value"), CASES, ids=str)
def test_a_field_of_a_wrong_type_or_value_is_refused_by_name(name, field, value):
    error = refused(good_adapters()[name], {field: value})
    assert error.reason in ("bad_config", "no_module_matched")
    assert field in error.message


def test_the_bounds_are_named():
    every = good_adapters()
    for name, field, limits in (
        ("prompt_tuning", "max_virtual_tokens", {"max_virtual_tokens": 2}),
        ("prefix_tuning", "max_virtual_tokens", {"max_virtual_tokens": 2}),
        ("dora", "max_dense_bytes", {"max_dense_bytes": 735}),
    ):
        error = refused(every[name], limits=dataclasses.replace(LIMITS, **limits))
        assert error.reason == "too_large"
        assert field in error.message
        bound = next(iter(limits.values()))
        assert str(bound) in error.message
        every[name].attempt(limits=dataclasses.replace(LIMITS, **{field: bound + 1}))
    error = refused(every["adalora"], limits=dataclasses.replace(LIMITS, max_rank=2))
    assert error.reason == "rank_too_large"
    for name in ("vera", "loha"):
        error = refused(every[name], {"r": 5000})
        assert (error.reason, error.param) == ("rank_too_large", "r")


@pytest.mark.parametrize(
    "name", ["vera", "loha", "lokr", "hira", "road", "oft", "c3a", "fourierft"]
)
def test_a_change_over_the_ranks_is_converted_replaced_or_refused_with_its_error(name):
    """With the same adapter, by bounds alone."""
    good = good_adapters()[name]
    tight = dataclasses.replace(LIMITS, max_rank=1, max_dense_bytes=0, max_conversion_error=0.0)
    error = refused(good, limits=tight)
    assert error.reason == "rank_too_large"
    assert "max_conversion_error" in error.message
    assert "max_dense_bytes" in error.message
    loose = good.attempt(limits=dataclasses.replace(tight, max_conversion_error=1.0))
    assert loose.max_rank == 1
    assert 1e-3 < float(loose.metadata["conversion_error"]) < 1
    assert loose.metadata["converted_sites"] == "4"
    replaced = good.attempt(limits=dataclasses.replace(tight, max_dense_bytes=2**20))
    assert "conversion_error" not in replaced.metadata
    assert replaced.metadata["replaced_sites"] == "4"
    assert all(parts.dense is not None for parts in replaced.sites.values())


def test_modules_cannot_be_targeted_and_replaced_at_once():
    error = refused(good_adapters()["dora"], {"modules_to_save": ["q_proj"]})
    assert error.reason == "bad_config"
    error = refused(good_adapters()["dora"], {"modules_to_save": ["self_attn"]})
    assert error.reason == "unsupported_site"


def test_dora_of_an_embedding_is_refused_by_name():
    error = refused(good_adapters()["dora"], {"target_modules": ["embed_tokens"]})
    assert error.reason == "unsupported_site"
    assert "DoRA is not served there" in error.message


def test_peft_families_are_those_of_the_installed_version():
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING) == set(peft.PeftType)
