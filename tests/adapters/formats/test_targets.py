"""Module matching against PEFT's own functions, over made-up names and configurations."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from manyhats.adapters.files import AdapterLimits
from manyhats.adapters.formats.lora_config import parse_settings
from manyhats.adapters.formats.patterns import Matcher, is_literal, literal_suffix
from manyhats.adapters.formats.targets import PatternTable, matched_sites
from manyhats.adapters.parts import BaseSpec, SiteKind, SiteSpec
from manyhats.errors import AdapterRejectedError

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.10.mlp.up_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.0.mlp.experts.11.up_proj",
    "transformer.h.1.attn.c_attn",
    "encoder.h.1.layers.0.q_proj",
    "q_proj",
    "up_proj",
    "vq_proj",
    "layers.0.q_proj",
]
BASE = BaseSpec("d", 11, {n: SiteSpec(n, SiteKind.LINEAR, 4, 4) for n in NAMES})

suffixes = st.builds(
    lambda name, cut: ".".join(name.split(".")[-cut:]), st.sampled_from(NAMES), st.integers(1, 6)
) | st.sampled_from(["", ".", "proj", "0", "layers", "q_proj."])
PIECES = [
    ".*", "model", r"\.", ".", "layers", r"\d+", "[01]", "[^.]+", "(q|v)_proj", "q_proj",
    "(?:up|c)_",
    "proj", "attn",
    "$", "^", "?", "|", "(?!.*mlp)", "(?=.)", "self_attn", r"\d{1,2}", "{,2}", "h", "1",
    "+", "(?i)", "(?<!v)", r"\w", r"\b",
]  # fmt: skip
REFUSAL = r"brace|not supported|no regular expression"
patterns = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


def ours(**fields):
    config = {"peft_type": "LORA"} | {k: v for k, v in fields.items() if v is not None}
    found = parse_settings(config, AdapterLimits())
    try:
        return [site.name for site in matched_sites(found.selection, BASE, Matcher())]
    except AdapterRejectedError as error:
        if error.reason != "no_module_matched":
            raise
        return []


def theirs(target_modules, exclude_modules=None, layers_to_transform=None, layers_pattern=None):
    config = SimpleNamespace(
        target_modules=set(target_modules) if isinstance(target_modules, list) else target_modules,
        exclude_modules=set(exclude_modules)
        if isinstance(exclude_modules, list)
        else exclude_modules,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        modules_to_save=None,
        target_parameters=None,
    )
    return [name for name in NAMES if check_target_module_exists(config, name)]


@settings(max_examples=150, deadline=None)
@given(
    targets=st.lists(suffixes, max_size=4),
    excluded=st.none() | st.lists(suffixes, max_size=2),
    layers=st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
    names=st.none() | st.sampled_from(
        ["layers", "h", "experts", "", "h|layers", ["layers", "h"], ["h", "layers"], [""]]
    ),
)  # fmt: skip
def test_lists_match_as_in_peft(targets, excluded, layers, names):
    if layers is None:
        names = None
    wanted = theirs(targets, excluded, layers, names)
    assert (
        ours(
            target_modules=targets,
            exclude_modules=excluded,
            layers_to_transform=layers,
            layers_pattern=names,
        )
        == wanted
    )


@settings(max_examples=200, deadline=None)
@given(pattern=patterns, excluded=st.none() | patterns)
def test_patterns_match_as_in_peft(pattern, excluded):
    try:
        wanted = theirs(pattern, excluded)
    except re.error:
        with pytest.raises(AdapterRejectedError) as caught:
            ours(target_modules=pattern, exclude_modules=excluded)
        assert caught.value.reason == "bad_config"
        return
    if pattern.lower() == "all-linear":
        return
    try:
        found = ours(target_modules=pattern, exclude_modules=excluded)
    except AdapterRejectedError as error:
        assert error.reason == "bad_config"
        # what PEFT would take and we do not is said to be so
        assert re.search(REFUSAL, error.message)
        return
    assert found == wanted


def test_the_pieces_are_not_refused_wholesale():
    """The test above proves nothing of patterns that are refused."""
    for pattern in (
        r"model\.layers\.\d+\..*(q|v)_proj",
        r"(?!.*mlp).*_proj$",
        "(?i).*Q_PROJ",
        r".*\d{1,2}.*up_proj",
    ):
        assert ours(target_modules=pattern) == theirs(pattern) != []


@settings(max_examples=150, deadline=None)
@given(
    keys=st.lists(suffixes | patterns, max_size=4, unique=True),
    name=st.sampled_from(NAMES),
)
def test_rank_and_alpha_patterns_choose_as_in_peft(keys, name):
    values = {key: index for index, key in enumerate(keys)}
    try:
        wanted = values.get(get_pattern_key(values.keys(), name))
    except re.error:
        with pytest.raises(AdapterRejectedError, match="bad_config"):
            PatternTable(values, "rank_pattern", Matcher()).get(name, None)
        return
    try:
        found = PatternTable(values, "rank_pattern", Matcher()).get(name, None)
    except AdapterRejectedError as error:
        assert re.search(REFUSAL, error.message)
    else:
        assert found == wanted


@settings(max_examples=150, deadline=None)
@given(pattern=suffixes | st.text(alphabet="qv_.proj01", max_size=8), name=st.sampled_from(NAMES))
def test_literal_keys_need_no_regular_expression(pattern, name):
    found = literal_suffix(pattern, name)
    if is_literal(pattern):
        assert found is (re.match(rf"(.*\.)?({pattern})$", name) is not None)
    else:
        assert pattern == ""


def test_hundreds_of_literal_keys_are_quick():
    keys = {f"model.layers.{i}.self_attn.q_proj": 1 for i in range(2000)}
    table = PatternTable(keys, "rank_pattern", Matcher(seconds=0.0))  # none may be compiled
    assert table.get("model.layers.1999.self_attn.q_proj", 8) == 1
    assert table.get("model.layers.1999.self_attn.k_proj", 8) == 8
