"""What is not served exactly is refused, with a reason code and the names that explain it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from manyhats.adapters.files import AdapterLimits, parse_weights, read_config
from manyhats.adapters.formats import IMPORTERS, REFUSED_FAMILIES, compile_adapter
from manyhats.adapters.formats.fields import COMMON_HONOURED, COMMON_IRRELEVANT
from manyhats.adapters.formats.lora_config import (
    HONOURED,
    IRRELEVANT,
    REFUSED,
    TABLE,
    parse_settings,
)
from manyhats.adapters.formats.patterns import Matcher
from manyhats.adapters.formats.targets import Selection
from manyhats.errors import AdapterRejectedError

LIMITS = AdapterLimits()
P = "base_model.model.model.layers"
LEGACY = {"merge_weights", "enable_lora"}


@pytest.fixture(scope="module")
def good(bases, train):
    """A good adapter as (configuration, tensors), and a way to compile changed copies of it."""
    saved = train("llama", r=4, target_modules=["q_proj", "v_proj"])
    return saved.config, saved.tensors, bases["llama"].spec


def attempt(good, changes=None, tensors=None, *, spec=None, limits=LIMITS, dtype=torch.float32):
    config = read_config(json.dumps(good[0] | (changes or {})).encode(), limits)
    weights = parse_weights(
        save({k: v.contiguous() for k, v in (tensors or good[1]).items()}), limits
    )
    return compile_adapter(config, weights, spec or good[2], limits, digest="d" * 64, dtype=dtype)


def refused(good, *args, **kwargs) -> AdapterRejectedError:
    with pytest.raises(AdapterRejectedError) as caught:
        attempt(good, *args, **kwargs)
    assert str(caught.value).startswith(f"{caught.value.reason}: ")
    assert len(str(caught.value)) < 2000
    return caught.value


# families


def test_every_family_of_peft_is_imported_or_refused_by_name(good):
    families = {family.value for family in peft.PeftType}
    assert families | {"BITFIT"} == IMPORTERS.keys() | REFUSED_FAMILIES.keys()
    assert not IMPORTERS.keys() & REFUSED_FAMILIES.keys()
    for family in REFUSED_FAMILIES:
        error = refused(good, {"peft_type": family})
        assert error.reason == "unsupported_family"
        assert f"{family} adapters are not served by this version" in error.message


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("lora", "unsupported_family"),
        ("NEW", "unsupported_family"),
        (None, "bad_config"),
        (["LORA"], "bad_config"),
    ],
)
def test_peft_type_must_be_a_known_name(good, value, reason):
    assert refused(good, {"peft_type": value}).reason == reason


# fields


def test_every_field_of_lora_config_is_in_one_table():
    tables = [set(HONOURED | COMMON_HONOURED), {*IRRELEVANT, *COMMON_IRRELEVANT}, set(REFUSED)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set().union(*tables) == fields | LEGACY


def test_our_defaults_are_those_of_peft():
    ours = parse_settings({"peft_type": "LORA", "target_modules": ["a"]}, LIMITS)
    theirs = peft.LoraConfig()
    assert (ours.r, ours.lora_alpha, ours.bias) == (theirs.r, theirs.lora_alpha, theirs.bias)
    assert ours.use_rslora is theirs.use_rslora
    assert (ours.rank_pattern, ours.alpha_pattern) == (theirs.rank_pattern, theirs.alpha_pattern)
    assert ours.selection == Selection(target_modules=frozenset({"a"}))
    assert (ours.use_dora, ours.lora_bias) == (theirs.use_dora, theirs.lora_bias)
    assert ours.ensure_weight_tying is theirs.ensure_weight_tying


NOT_NEUTRAL: dict[str, Any] = {
    "use_qalora": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 3]],
    "arrow_config": {"top_k": 3},
    "alora_invocation_tokens": [5],
    "megatron_config": {"a": 1},
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 64},
    "enable_lora": [True, False],
}


def test_the_values_tried_are_complete():
    assert NOT_NEUTRAL.keys() == REFUSED.keys()


@pytest.mark.parametrize("field", sorted(NOT_NEUTRAL))
def test_a_feature_that_is_not_served_is_refused_by_name(good, field):
    error = refused(good, {field: NOT_NEUTRAL[field]})
    assert (error.reason, error.param) == ("unsupported_feature", field)
    assert "not served by this version" in error.message
    attempt(good, {field: None})


@pytest.mark.parametrize("field", ["use_qalora", "use_bdlora"])
@pytest.mark.parametrize("value", [0, "", "false", [], {}])
def test_only_peft_s_own_way_of_saying_no_is_neutral(good, field, value):
    assert refused(good, {field: value}).reason == "unsupported_feature"


def test_irrelevant_fields_are_ignored_whatever_they_hold(good):
    wanted = attempt(good)
    for field in IRRELEVANT:
        found = attempt(good, {field: {"any": ["thing"]}})
        assert found.sites.keys() == wanted.sites.keys()


def test_an_unknown_field_is_refused(good):
    error = refused(good, {"use_something_new": False})
    assert error.reason == "bad_config"
    assert "use_something_new" in error.message


@pytest.mark.parametrize(
    "value", ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "loftq", "lora_ga"]
)
def test_an_initialisation_that_changes_the_base_is_refused(good, value):
    error = refused(good, {"init_lora_weights": value})
    assert (error.reason, error.param) == ("unsupported_feature", "init_lora_weights")
    assert "path_initial_model_for_weight_conversion" in error.message


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_served(good, value):
    attempt(good, {"init_lora_weights": value})


BAD: dict[str, list[Any]] = {
    "use_dora": [1, "true"],
    "lora_bias": [0, []],
    "ensure_weight_tying": ["yes"],
    "modules_to_save": ["lm_head", [1], [""], {}],
    "trainable_token_indices": [5, [], [-1], [97], [1, 1], [True], {"embed_tokens": 3}],
    "r": [0, -4, 4.0, "4", True, None, [4]],
    "lora_alpha": ["8", None, True, 10**400],
    "bias": ["some", None, ["all"]],
    "use_rslora": [1, None],
    "fan_in_fan_out": ["no"],
    "target_modules": [None, 3, [1], {"q_proj": 1}],
    "exclude_modules": [3, [None]],
    "layers_to_transform": ["0", [0.0], True, [False]],
    "layers_pattern": ["layers", 0, False, [7]],
    "rank_pattern": [[], {"q_proj": 0}, {"q_proj": None}, 4],
    "alpha_pattern": ["x", {"q_proj": "8"}, {"q_proj": False}],
    "init_lora_weights": [None, 1, "somehow"],
}
BAD_VALUES = [(field, value) for field, values in BAD.items() for value in values]


@pytest.mark.parametrize(
    ("field", "value"), BAD_VALUES, ids=[f"{f}={str(v)[:12]}" for f, v in BAD_VALUES]
)
def test_a_field_of_a_wrong_type_or_value_is_refused_by_name(good, field, value):
    error = refused(good, {field: value})
    assert (error.reason, error.param) == ("bad_config", field)
    assert field in error.message


def test_other_tasks_are_refused(good):
    assert refused(good, {"task_type": "SEQ_CLS"}).param == "task_type"
    assert refused(good, {"task_type": "SEQ_CLS"}).reason == "unsupported_feature"
    attempt(good, {"task_type": None})


def test_layers_beside_a_pattern_are_refused_as_in_peft(good):
    error = refused(good, {"target_modules": ".*q_proj", "layers_to_transform": [0]})
    assert error.reason == "bad_config"
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft.LoraConfig(target_modules=".*q_proj", layers_to_transform=[0])


# modules


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": []},
        {"target_modules": ["proj"]},
        {"target_modules": "q_proj"},
        {"target_modules": ""},
        {"exclude_modules": ["q_proj", "v_proj"]},
        {"exclude_modules": ".*"},
        {"layers_to_transform": 99},
        {"layers_to_transform": [0], "layers_pattern": "h"},
    ],
    ids=str,
)
def test_matching_nothing_is_refused_with_names(good, changes):
    error = refused(good, changes)
    assert error.reason == "no_module_matched"
    assert "q_proj, k_proj" in error.message
    assert "model.layers.0.self_attn.q_proj" in error.message


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (["q_proj", "norm"], "a normalization"),
        (".*", "input_layernorm"),
    ],
    ids=str,
)
def test_sites_that_take_no_lora_are_refused_by_name(good, targets, kind):
    error = refused(good, {"target_modules": targets})
    assert error.reason == "unsupported_site"
    assert kind in error.message


@pytest.mark.parametrize(
    "pattern",
    [
        "(", "[", "*", "a**", "\\", r"\1", r"(a)\1", r"\p{L}", "(?:a){e<=1}.*", "a{1,2,3}", "{",
        "a{b}",
        "(?i:q_proj)", "(?#x)q", "(?P=a)", "(?(1)a|b)", "(?|a|b)", "[[a]]", "[a--b]", "[a&&b]",
        "[a||b]", "[a~~b]",
        "(?<=a+)b", "q_proj\n", "q_projé", "(?L)a", "a" * 3000, "(" * 40 + "a" + ")" * 40,
        "((((a{1000}){1000}){1000}){1000}){1000}", "(?R)", "(?1)", r"\Kq", r"\L<names>", "x(?i)y",
        "(?P<a>.)(?P<a>.)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_pattern_that_is_none_or_is_not_let_through_is_refused(good, field, pattern):
    error = refused(good, {field: pattern})
    assert (error.reason, error.param) == ("bad_config", field)


@pytest.mark.parametrize(
    "field",
    ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"],
)
def test_a_pattern_that_would_never_end_is_cut_short(good, field, monkeypatch):
    monkeypatch.setattr("manyhats.adapters.formats.job.Matcher", lambda: Matcher(seconds=0.05))
    endless = "(.|..)+[XYZ]!?"
    changes = {field: {endless: 2} if field in ("rank_pattern", "alpha_pattern") else endless}
    if field == "layers_pattern":
        changes["layers_to_transform"] = [0]
    error = refused(good, changes)
    assert (error.reason, error.param) == ("bad_config", field)
    assert "takes too long to match" in error.message


# tensors


def test_a_tensor_that_nobody_wants_is_refused_with_its_name(good):
    extra = good[1] | {f"{P}.0.self_attn.k_proj.lora_A.weight": torch.zeros(4, 32)}
    error = refused(good, None, extra)
    assert error.reason == "unused_tensors"
    assert f"{P}.0.self_attn.k_proj.lora_A.weight" in error.message


def test_keys_that_peft_does_not_write_are_not_guessed_at(good):
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in good[1].items()}
    named = {
        name.replace("lora_A.weight", "lora_A.default.weight"): t for name, t in good[1].items()
    }
    for tensors in (bare, named):
        error = refused(good, None, tensors)
        assert error.reason == "unused_tensors"
        assert "missing: base_model.model.model.layers.0" in error.message


def test_a_tensor_that_is_not_there_is_refused_with_its_name(good):
    name = f"{P}.1.self_attn.v_proj.lora_B.weight"
    error = refused(good, None, {k: v for k, v in good[1].items() if k != name})
    assert error.reason == "missing_tensors"
    assert name in error.message


def test_targets_without_tensors_are_refused(good):
    assert (
        refused(good, {"target_modules": ["q_proj", "v_proj", "o_proj"]}).reason
        == "missing_tensors"
    )
    assert refused(good, {"target_modules": ["q_proj"]}).reason == "unused_tensors"
    assert refused(good, {"layers_to_transform": [0, 1]}).reason == "unused_tensors"


@pytest.mark.parametrize(
    "changes",
    [{"r": 3}, {"rank_pattern": {"q_proj": 5}}, {"rank_pattern": {r".*\.1\..*v_proj": 1}}],
    ids=str,
)
def test_a_rank_that_the_tensors_do_not_have_is_refused(good, changes):
    error = refused(good, changes)
    assert error.reason == "shape_mismatch"
    assert "lora_A.weight has shape [4, 32]" in error.message


def test_an_adapter_of_another_base_is_refused(good, bases, train):
    """Other architecture, other width, other depth."""
    other = train("qwen2", r=4, target_modules=["q_proj", "v_proj"])
    spec = bases["qwen2"].spec
    other.compile(bases["llama"].spec)  # same names and shapes: nothing can tell them apart
    assert refused(good, spec=bases["gpt2"].spec).reason == "no_module_matched"
    wide = dataclasses.replace(
        spec, sites={n: dataclasses.replace(s, in_features=64) for n, s in spec.sites.items()}
    )
    error = refused(good, {"base_model_name_or_path": "tiny-llama"}, spec=wide)
    assert error.reason == "shape_mismatch"
    assert "another base" in error.message
    assert "tiny-llama" in error.message
    shallow = dataclasses.replace(
        spec, sites={n: s for n, s in spec.sites.items() if ".2." not in n}
    )
    assert refused(good, spec=shallow).reason == "unused_tensors"
    extra = {
        n.replace("layers.2", "layers.3"): dataclasses.replace(
            s, name=n.replace("layers.2", "layers.3")
        )
        for n, s in spec.sites.items()
    }
    error = refused(good, spec=dataclasses.replace(spec, sites=dict(spec.sites) | extra))
    assert error.reason == "missing_tensors"
    assert "layers.3" in error.message


def test_rank_over_the_bound_is_refused(good):
    for changes in ({"r": 65}, {"rank_pattern": {"q_proj": 65}}):
        error = refused(good, changes)
        assert error.reason == "rank_too_large"
        assert "65" in error.message
        assert "64" in error.message
    assert refused(good, limits=dataclasses.replace(LIMITS, max_rank=3)).reason == "rank_too_large"
    attempt(good, limits=dataclasses.replace(LIMITS, max_rank=4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(good, value, matrix, dtype):
    name = f"{P}.2.self_attn.v_proj.lora_{matrix}.weight"
    tensors = {k: v.to(dtype, copy=True) for k, v in good[1].items()}
    tensors[name][-1, -1] = value
    error = refused(good, None, tensors)
    assert error.reason == "non_finite"
    assert name in error.message


def test_a_value_that_does_not_survive_scaling_or_the_dtype_is_refused(good):
    name = f"{P}.0.self_attn.q_proj.lora_B.weight"
    tensors = {k: v.clone() for k, v in good[1].items()}
    tensors[name][0, 0] = 40000.0
    attempt(good, None, tensors, dtype=torch.bfloat16)
    error = refused(good, None, tensors, dtype=torch.float16)  # alpha 8 over r 4: twice that
    assert error.reason == "non_finite"
    assert name in error.message
    assert refused(good, {"lora_alpha": 1e300}).reason == "non_finite"


# biases


def test_a_trained_bias_that_the_base_does_not_have_is_refused(good, bases, train):
    extra = good[1] | {f"{P}.0.self_attn.q_proj.base_layer.bias": torch.ones(32)}
    error = refused(good, {"bias": "all"}, extra)
    assert error.reason == "unused_tensors"
    assert "model.layers.0.self_attn.q_proj has no bias" in error.message


def test_biases_must_be_declared_and_complete(bases, train):
    saved = train("qwen2", r=2, bias="all", target_modules=["q_proj"])
    parts = (saved.config, saved.tensors, bases["qwen2"].spec)
    assert refused(parts, {"bias": "none"}).reason == "unused_tensors"
    assert refused(parts, {"bias": "lora_only"}).reason == "unused_tensors"
    name = f"{P}.0.self_attn.k_proj.bias"
    error = refused(parts, None, {k: v for k, v in saved.tensors.items() if k != name})
    assert error.reason == "missing_tensors"
    assert name in error.message
    error = refused(parts, None, saved.tensors | {name: torch.ones(3)})
    assert error.reason == "shape_mismatch"
    error = refused(parts, None, saved.tensors | {name: torch.full((16,), math.nan)})
    assert error.reason == "non_finite"
    # the targeted module's bias has another name than the rest
    renamed = {k.replace(".base_layer", ""): v for k, v in saved.tensors.items()}
    assert refused(parts, None, renamed).reason == "unused_tensors"


def test_a_trained_bias_of_the_head_is_a_part_and_an_untrained_one_is_nothing(bases, train):
    saved = train("qwen2", r=2, bias="all", target_modules=["q_proj"])
    spec = bases["qwen2"].spec
    head = dataclasses.replace(spec.sites["lm_head"], bias=torch.ones(97))
    spec = dataclasses.replace(spec, sites=dict(spec.sites) | {"lm_head": head})
    parts = (saved.config, saved.tensors, spec)
    name = "base_model.model.lm_head.bias"
    assert "lm_head" not in attempt(parts, None, saved.tensors | {name: torch.ones(97)}).sites
    found = attempt(parts, None, saved.tensors | {name: torch.zeros(97)})
    assert torch.equal(found.sites["lm_head"].bias, -torch.ones(97))


# anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["q_proj", "all-linear", "none", "all", "lora_only", "(", ".*", "LORA"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8) | st.just("q_proj"), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = sorted(TABLE.known)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(
        st.sampled_from(FIELDS) | st.text(max_size=8), JSON, min_size=1, max_size=3
    )
)
def test_any_configuration_compiles_or_is_refused(good, changes):
    text = json.dumps(good[0] | changes).encode()
    try:
        config = read_config(text, LIMITS)
        weights = parse_weights(save(good[1]), LIMITS)
        compile_adapter(config, weights, good[2], LIMITS, digest="d", dtype=torch.float32)
    except AdapterRejectedError as error:
        assert error.reason
        error.message.encode()  # fit to be sent
