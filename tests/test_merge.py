"""``manyhats merge``: the folder it writes answers as the base that wears the adapter."""

from __future__ import annotations

import copy
import json
from contextlib import closing

import pytest
import torch
from safetensors.torch import save_file
from support.families import good_adapters
from support.models import tiny_model, tiny_tokenizer
from support.random_parts import VIRTUAL, random_adapter
from support.sites import describe_plain
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from manyhats import cli
from manyhats.adapters.parts import CompiledAdapter
from manyhats.adapters.store import AdapterStore
from manyhats.engine.model.merge import merge_adapter
from manyhats.engine.model.parts_reference import PartsReference
from manyhats.errors import AdapterRejectedError
from manyhats.lifecycle.compositions import composed
from manyhats.lifecycle.registry import Registry
from manyhats.lifecycle.store_redis import RedisRegistryStore
from manyhats.lifecycle.store_sqlite import SqliteRegistryStore
from manyhats.types import DEFAULT_TENANT, CompositionKind, Digest

IDS = [3, 17, 5, 9, 21, 4, 8]
MODELS = ("llama", "qwen2", "gpt2", "gemma3")


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def reloaded(model, folder):
    """As somebody else's transformers reads it."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "kind",
    [
        "low_rank", "input_scale", "output_scale", "dense", "gain", "head low_rank", "head rows",
        "head dense", "embedding low_rank", "embedding rows", "embedding dense",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_every_part_that_is_a_weight(name, kind, tmp_path):
    model = tiny_model(name)
    spec = describe_plain(model)
    adapter = random_adapter(kind, spec, 1)
    if kind.startswith("head"):  # a random one has a bias, and heads have no room for that
        sites = {n: _without_bias(p) for n, p in adapter.sites.items()}
        adapter = CompiledAdapter(adapter.digest, kind, sites)
    wanted = PartsReference(copy.deepcopy(model), spec, adapter).logits(IDS)
    before = logits(model)
    merge_adapter(model, spec, adapter)
    found = logits(reloaded(model, tmp_path / "merged"))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)


def _without_bias(parts):
    return type(parts)(
        low_rank=parts.low_rank,
        input_scale=parts.input_scale,
        output_scale=parts.output_scale,
        dense=parts.dense,
        rows=parts.rows,
    )


def test_biases_where_the_base_has_them(tmp_path):
    model = tiny_model("qwen2")
    spec = describe_plain(model)
    adapter = random_adapter("scales and more", spec, 2)
    with pytest.raises(AdapterRejectedError, match=r"o_proj: a bias cannot be merged"):
        merge_adapter(model, spec, adapter)
    sites = {n: p for n, p in adapter.sites.items() if spec.sites[n].bias is not None}
    adapter = CompiledAdapter(adapter.digest, "x", sites)
    assert len(sites) == 9
    wanted = PartsReference(copy.deepcopy(model), spec, adapter).logits(IDS)
    merge_adapter(model, spec, adapter)
    found = logits(reloaded(model, tmp_path / "merged"))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("gated", "bottlenecks"), ("prefix", "prefix"), ("soft prompt", "soft_prompt")],
)
def test_what_is_no_weight_is_refused_before_anything_changes(kind, part):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    spec = describe_plain(model)
    adapter = random_adapter(kind, spec)
    both = {**random_adapter("low_rank", spec).sites, **adapter.sites}
    whole = CompiledAdapter(Digest(""), kind, both, virtual_tokens=adapter.virtual_tokens)
    assert whole.virtual_tokens in (0, VIRTUAL)
    with pytest.raises(AdapterRejectedError, match=rf"cannot_merge: .*{part} cannot be merged"):
        merge_adapter(model, spec, whole)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_tied_embeddings_are_separated(tmp_path):
    config = copy.deepcopy(tiny_model("llama").config)
    config.tie_word_embeddings = True
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    spec = describe_plain(model)
    assert spec.sites["lm_head"].tied_to == "model.embed_tokens"
    adapter = random_adapter("embedding rows", spec)
    wanted = PartsReference(copy.deepcopy(model), spec, adapter).logits(IDS)
    head = model.lm_head.weight.detach().clone()
    merge_adapter(model, spec, adapter)
    again = reloaded(model, tmp_path / "merged")
    assert torch.equal(again.lm_head.weight, head)
    assert not torch.equal(again.model.embed_tokens.weight, head)
    assert torch.allclose(logits(again), wanted, rtol=1e-4, atol=1e-4)


# ---- the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny base with its tokenizer, and adapters of PEFT for it, as folders."""
    root = tmp_path_factory.mktemp("merge")
    good = good_adapters()
    good["lora"].model.save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    for name in ("lora", "dora", "ia3", "prefix_tuning"):
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(json.dumps(good[name].config))
        tensors = {k: t.contiguous() for k, t in good[name].tensors.items()}
        save_file(tensors, root / name / "adapter_model.safetensors")
    return root


def run(folders, adapter, out, *more):
    command = ["merge", adapter, "--out", str(out), "--model", str(folders / "base")]
    return CliRunner().invoke(cli.app, [*command, "--dtype", "fp32", *more])


@pytest.mark.parametrize("family", ["lora", "dora", "ia3"])
def test_a_folder_is_merged(folders, tmp_path, family):
    out, home = tmp_path / "out", tmp_path / "home"
    result = run(folders, str(folders / family), out, "--home", str(home))
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert merged.dtype == torch.float32
    good = good_adapters()[family]
    worn = PartsReference(good.model, good.spec, good.attempt(dtype=torch.float32))
    assert torch.allclose(logits(merged, [3, 7, 5]), worn.logits([3, 7, 5]), rtol=1e-4, atol=1e-4)
    assert "manyhats" not in (out / "config.json").read_text()
    text = AutoTokenizer.from_pretrained(out).decode([3, 7])
    assert text == tiny_tokenizer().decode([3, 7])
    assert sorted(p.name for p in out.parent.iterdir() if p.name.startswith(".")) == []
    assert sorted(p.name for p in (folders / family).iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.fixture
def registered(folders, tmp_path):
    """A home with lora and ia3 registered, and both stacked."""
    place = tmp_path / "home" / "bases" / "base"
    store, registry = AdapterStore(place / "adapters"), None
    registry = Registry(place / "registry.sqlite", max_versions=9)
    fields = {"tenant": DEFAULT_TENANT, "family": "x", "max_rank": 0, "nbytes": 1, "source": "x"}
    refs = []
    for name in ("lora", "ia3"):
        with store.stage(1 << 20) as staging:
            files = ("adapter_config.json", "adapter_model.safetensors")
            staging.copy(*(folders / name / file for file in files))
            refs.append(registry.add(name, store.commit(staging), **fields))
    both = composed(CompositionKind.STACK, refs, ())
    registry.add("both", both.digest, composition=both.composition, **fields)
    registry.close()
    store.close()
    return tmp_path / "home"


def test_names_are_merged(folders, registered, tmp_path):
    results = {}
    for name in ("lora", "ia3@1", "both"):
        result = run(folders, name, tmp_path / name, "--home", str(registered))
        assert result.exit_code == 0, result.output
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        results[name] = logits(merged, [3, 7, 5])
    good = good_adapters()["lora"]
    worn = PartsReference(good.model, good.spec, good.attempt(dtype=torch.float32))
    assert torch.allclose(results["lora"], worn.logits([3, 7, 5]), rtol=1e-4, atol=1e-4)
    twice = run(folders, "both", tmp_path / "both", "--home", str(registered))
    assert (twice.exit_code, "is there already" in twice.output) == (2, True)
    # ia3 over the folder that lora was merged into is both
    over = ["merge", str(folders / "ia3"), "--out", str(tmp_path / "over"), "--dtype", "fp32"]
    result = CliRunner().invoke(cli.app, [*over, "--model", str(tmp_path / "lora")])
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "over").eval()
    assert torch.allclose(logits(merged, [3, 7, 5]), results["both"], rtol=1e-4, atol=1e-4)


def test_names_are_merged_from_where_the_server_keeps_them(
    folders, registered, tmp_path, redis_url
):
    place, elsewhere = registered / "bases" / "base", tmp_path / "store"
    elsewhere.mkdir()
    (place / "adapters").rename(elsewhere / "base")  # a folder a base
    url = f"{redis_url.rsplit('/', 1)[0]}/7"
    with (
        closing(SqliteRegistryStore(place / "registry.sqlite")) as embedded,
        closing(RedisRegistryStore(url, "base")) as shared,
    ):
        shared.load(embedded.dump())
    (place / "registry.sqlite").unlink()
    where = ("--home", str(registered), "--store", str(elsewhere))
    assert run(folders, "both", tmp_path / "none", *where).exit_code == 2
    result = run(folders, "both", tmp_path / "both", *where, "--redis-url", url)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "both" / "model.safetensors").is_file()


def test_refusals_are_one_line(folders, registered, tmp_path):
    home = ("--home", str(registered))
    for adapter, words in (
        ("absent", "'absent' is no folder"),
        (str(folders / "prefix_tuning"), "prefix cannot be merged"),
    ):
        result = run(folders, adapter, tmp_path / "out", *home)
        assert result.exit_code == 2
        assert result.output.startswith("manyhats: ")
        assert words in result.output
        assert not (tmp_path / "out").exists()
