"""What of AdapterHub's cannot be served exactly is refused by name; so is every file that is not
whole.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from support.adapterhub import (
    FIXTURES,
    LIMITS,
    NAMES,
    PROMPT,
    base_of,
    compile_parts,
    expected,
    exporter,
    files_of,
)
from support.models import tiny_model
from support.sites import describe_plain

from manyhats.adapters.files import locate
from manyhats.adapters.parts import SiteKind
from manyhats.errors import AdapterRejectedError

GATES = "averaged over the whole sequence"


def refused(config, tensors, base="llama", **more):
    with pytest.raises(AdapterRejectedError) as caught:
        compile_parts(config, tensors, base, **more)
    assert len(str(caught.value)) < 2000
    return caught.value


def changed(name, **fields):
    """The fixture's files with fields of its method changed, of every member's in a composition."""
    config, tensors = files_of(name)
    for file in config.get("adapters", [config]):
        file["config"] = file["config"] | fields
    return config, tensors


@pytest.mark.parametrize(
    ("name", "fields", "reason", "says"),
    [
        ("houlsby", {"use_gating": True}, "unsupported_feature", GATES),
        ("lora", {"use_gating": True}, "unsupported_feature", GATES),
        ("prefix", {"use_gating": True}, "unsupported_feature", GATES),
        ("pfeiffer", {"inv_adapter": "nice"}, "unsupported_feature", "invertible"),
        ("pfeiffer", {"ln_before": True}, "unsupported_feature", "a norm inside a bottleneck"),
        ("pfeiffer", {"ln_after": True}, "unsupported_feature", "a norm inside a bottleneck"),
        ("pfeiffer", {"original_ln_after": False}, "unsupported_feature", "leave out the stream"),
        ("pfeiffer", {"residual_before_ln": False}, "unsupported_feature", "add it twice"),
        ("pfeiffer", {"residual_before_ln": "post_add"}, "bad_config", "post_add"),
        ("pfeiffer", {"non_linearity": "selu"}, "bad_config", "selu"),
        ("pfeiffer", {"reduction_factor": 0}, "bad_config", "reduction_factor"),
        ("pfeiffer", {"reduction_factor": 1e-9}, "rank_too_large", "4096"),
        ("pfeiffer", {"reduction_factor": {"1": 8}}, "bad_config", "reduction_factor"),
        ("pfeiffer", {"scaling": "gated"}, "bad_config", "scaling"),
        ("pfeiffer", {"leave_out": [True]}, "bad_config", "leave_out"),
        ("pfeiffer", {"leave_out": [0, 1]}, "no_module_matched", "no place"),
        ("pfeiffer", {"newer": 1}, "bad_config", "newer"),
        ("pfeiffer", {"architecture": "reft"}, "unsupported_family", "chosen positions"),
        ("pfeiffer", {"architecture": "prompt_tuning"}, "unsupported_family", "no decoder"),
        ("pfeiffer", {"architecture": "mtl_lora"}, "unsupported_family", "tasks"),
        ("pfeiffer", {"architecture": "other"}, "unsupported_family", "other"),
        ("pfeiffer", {"architecture": ["x"]}, "unsupported_family", "x"),
        ("compacter", {"phm_dim": 3}, "bad_config", "a divisor of 32 and 8"),
        ("lora", {"use_dora": True}, "unsupported_feature", "AdapterHub's DoRA"),
        ("lora", {"vera_d": 0.1}, "unsupported_feature", "AdapterHub's VeRA"),
        ("lora", {"r": 65}, "rank_too_large", "64"),
        ("ia3", {"r": 2}, "bad_config", "r 1"),
        ("prefix", {"leave_out": [0]}, "unsupported_feature", "left out of some layers"),
        ("prefix", {"prefix_length": 513}, "too_large", "512"),
        ("prefix", {"bottleneck_size": 5000}, "rank_too_large", "4096"),
        ("prefix", {"non_linearity": 7}, "bad_config", "non_linearity"),
    ],
)
def test_a_method_that_is_not_exact_is_refused_by_name(name, fields, reason, says):
    error = refused(*changed(name, **fields))
    assert (error.reason, says in error.message) == (reason, True), error.message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "bert"}, "unsupported_feature"),
        ({"model_type": None}, "unsupported_feature"),
        ({"version": None}, "unsupported_feature"),
        ({"version": "3.2.1"}, "unsupported_feature"),
        ({"version": "adapters.0.1.2"}, "unsupported_feature"),
        ({"name": ""}, "bad_config"),
        ({"config": None}, "bad_config"),
        ({"config": {"architecture": "union", "configs": []}}, "bad_config"),
        ({"config": {"architecture": "union", "configs": [3]}}, "bad_config"),
        ({"head_type": "causal_lm"}, "unsupported_feature"),
        ({"num_labels": 2}, "unsupported_feature"),
        ({"later": 1}, "bad_config"),
    ],
)
def test_what_is_around_the_method_is_checked(fields, reason):
    config, tensors = files_of("pfeiffer")
    assert refused(config | fields, tensors).reason == reason


@pytest.mark.parametrize("name", ["pfeiffer", "lora"])
def test_a_union_with_two_methods_at_one_place_is_refused(name):
    config, tensors = files_of(name)
    config["config"] = {"architecture": "union", "configs": [config["config"]] * 2}
    assert refused(config, tensors).param == "configs"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("model.invertible_adapters.pfeiffer.F.0.weight", "invertible"),
        ("invertible_adapters.pfeiffer.F.0.weight", "invertible"),
        ("heads.pfeiffer.0.weight", "a prediction head"),
        ("model.layers.0.self_attn.prefix_tuning.prefix_gates.pfeiffer.weight", GATES),
    ],
)
def test_heads_invertible_adapters_and_gates_are_named(extra, says):
    config, tensors = files_of("pfeiffer")
    error = refused(config, tensors | {extra: torch.ones(2, 2)})
    assert (error.reason, says in error.message) == ("unsupported_feature", True)


def composed(way, *names, fusion=None):
    """Members put together as the script does, without its files."""
    files = [files_of(name) for name in names]
    config = {"composition": way, "adapters": [config for config, _ in files]}
    if fusion is not None:
        config["fusion"] = fusion
    return config, {name: t for _, tensors in files for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["parallel", "pfeiffer"], "loses the output"),
        (["parallel", "parallel_learned"], "loses the output"),
        (["adapter_plus", "pfeiffer"], "add it twice"),
        (["lora", "ia3"], "stacked at one module"),
        (["prefix", "prefix_flat"], "several prefixes"),
    ],
)
def test_a_stack_that_is_not_exact_is_refused(names, says):
    error = refused(*composed("stack", *names))
    assert (error.reason, says in error.message) == ("unsupported_feature", True), error.message


def test_stacked_lora_where_the_library_has_none_is_refused():
    error = refused(*composed("stack", "gpt2_lora", "gpt2_ia3"), "gpt2")
    assert "composes no LoRA there" in error.message
    config, tensors = composed("stack", "lora", "pfeiffer")
    other = copy.deepcopy(config["adapters"][0]) | {"name": "again"}
    config["adapters"].append(other)
    more = {k.replace(".lora.", ".again."): t.clone() for k, t in tensors.items() if ".loras." in k}
    assert "differ in size" in refused(config, tensors | more).message


def test_a_prefix_without_rotation_is_refused():
    config, tensors = files_of("prefix_flat")
    error = refused(config | {"model_type": "gpt2"}, tensors, "gpt2")
    assert (error.reason, "take no positions" in error.message) == ("unsupported_site", True)


def test_only_rotations_that_a_prefix_can_be_moved_by_are_told_of():
    def rotary(name):
        sites = describe_plain(tiny_model(name)).sites.values()
        return [s.rotary for s in sites if s.kind is SiteKind.ATTENTION]

    assert all(len(frequencies) == 4 for frequencies in rotary("llama"))
    for name in ("gpt2", "mistral", "gemma3"):  # no rotation, a window, two rotations
        assert rotary(name) == [None] * len(rotary(name))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": True}, "a temperature that falls"),
        ({"query": False}, "without a query"),
        ({"key": False}, "without a key"),
        ({"residual_before": True}, "residual_before"),
        ({"query_before_ln": True}, "query_before_ln"),
    ],
)
def test_a_fusion_that_is_not_exact_is_refused(fields, says):
    config, tensors = files_of("fuse_pfeiffer")
    config["fusion"]["config"] |= fields
    error = refused(config, tensors)
    assert (error.reason, says in error.message) == ("unsupported_feature", True)


def test_a_fusion_over_other_adapters_is_refused():
    config, tensors = files_of("fuse_pfeiffer")
    config["adapters"].reverse()
    assert (refused(config, tensors).param) == "fusion"
    for field, value in {"is_parallel": True, "leave_out": [0], "mh_adapter": True}.items():
        config, tensors = files_of("fuse_pfeiffer")
        config["adapters"][1]["config"][field] = value
        assert refused(config, tensors).reason == "unsupported_feature"
    config, tensors = composed(
        "fuse", "lora", "pfeiffer", fusion={"name": "lora,pfeiffer", "config": {}}
    )
    assert "not one bottleneck" in refused(config, tensors).message


@pytest.mark.parametrize(
    "change",
    [
        {"composition": "split"},
        {"adapters": []},
        {"adapters": [3]},
        {"adapters": None},
        {"fusion": {}},
        {"more": 1},
    ],
)
def test_a_composition_is_checked(change):
    config, tensors = composed("stack", "houlsby", "pfeiffer")
    assert refused(config | change, tensors).reason == "bad_config"


def test_members_have_names_of_their_own_and_one_base():
    config, tensors = composed("stack", "houlsby", "pfeiffer")
    twice = copy.deepcopy(config)
    twice["adapters"][1]["name"] = "houlsby"
    assert refused(twice, tensors).param == "adapters"
    config["adapters"][1]["model_type"] = "gpt2"
    assert refused(config, tensors).param == "model_type"


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_needed_fits_and_is_finite(name):
    config, tensors = files_of(name)
    base = base_of(name)
    first = sorted(tensors)[0]
    left = {k: t for k, t in tensors.items() if k != first} | {"x": torch.ones(1)}
    error = refused(config, left, base)
    assert (error.reason, first.partition(".")[2] in error.message) == ("unused_tensors", True)
    del left["x"]
    if left:
        assert refused(config, left, base).reason == "missing_tensors"
    for key, tensor in tensors.items():
        if ".1." in key:  # the layers are alike
            continue
        error = refused(config, tensors | {key: tensor[None]}, base)
        assert (error.reason, key in error.message) == ("shape_mismatch", True)
        poisoned = tensor.clone()
        poisoned.view(-1)[-1] = math.nan
        error = refused(config, tensors | {key: poisoned}, base)
        assert (error.reason, key in error.message) == ("non_finite", True)


def test_an_adapter_for_another_base_is_refused():
    config, tensors = files_of("gpt2_houlsby")
    assert refused(config, tensors, "llama").reason in ("unused_tensors", "missing_tensors")
    assert refused(*files_of("lora"), "gpt2").reason == "unsupported_site"


def test_what_is_expanded_and_a_merged_module_s_rank_are_bounded():
    limits = dataclasses.replace(LIMITS, max_bytes=8000)  # the file has less
    error = refused(*files_of("compacter_shared"), limits=limits)
    assert (error.reason, "8000" in error.message) == ("too_large", True)
    limits = dataclasses.replace(LIMITS, max_rank=3)
    error = refused(*files_of("gpt2_lora"), "gpt2", limits=limits)
    assert (error.reason, "2 of q, k and v" in error.message) == ("rank_too_large", True)


def test_the_bound_of_virtual_tokens_holds():
    config, tensors = files_of("prefix")
    limits = dataclasses.replace(LIMITS, max_virtual_tokens=2)
    assert refused(config, tensors, limits=limits).param == "prefix_length"


def copied(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for file in (FIXTURES / "saved" / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("head", ["head_config.json", "model_head.safetensors"])
def test_a_folder_with_a_head_is_refused_by_server_and_script(tmp_path, head):
    folder = copied(tmp_path, "houlsby")
    assert locate(folder, [tmp_path]).weights_path.name == "adapter.safetensors"
    (folder / head).write_text("{}")
    with pytest.raises(AdapterRejectedError, match="with_head=False") as caught:
        locate(folder, [tmp_path])
    assert caught.value.reason == "unsupported_feature"
    (folder / "head_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="with_head=False"):
        exporter().export(tmp_path / "out", [folder])


def test_the_library_s_pickle_is_refused_and_exported_by_the_script(tmp_path):
    folder = copied(tmp_path, "houlsby")
    config, tensors = files_of("houlsby")
    (folder / "adapter.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_adapter.bin")
    with pytest.raises(AdapterRejectedError) as caught:
        locate(folder, [tmp_path])
    assert caught.value.reason == "pickle_refused"
    exporter().export(tmp_path / "out", [folder])
    files = locate(tmp_path / "out", [tmp_path])
    assert json.loads(files.config_path.read_text("utf-8")) == config


def test_the_script_wants_to_be_told_what_several_adapters_are(tmp_path, monkeypatch):
    folders = [str(FIXTURES / "saved" / name) for name in ("lora", "pfeiffer")]
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "out"), *folders])
    with pytest.raises(SystemExit):
        exporter().main()
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "out"), *folders, "--stack"])
    exporter().main()
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert written == files_of("stack_families")[0]


def test_the_expected_logits_differ_between_all_adapters():
    last = torch.stack([expected(n).logits[-1] for n in NAMES if base_of(n) == "llama"])
    assert len(PROMPT) == 8
    assert torch.pdist(last).min() > 0.1
