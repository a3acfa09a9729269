"""Versions from the store are hashed beside their compilation: damaged bytes give nothing."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
from support.models import tiny_model
from support.sites import describe_plain

from manyhats.adapters.folder import AdapterFolder
from manyhats.adapters.store import AdapterStore
from manyhats.app import _compile_folder
from manyhats.config import Settings
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.errors import AdapterLoadError, AdapterRejectedError
from manyhats.lifecycle.loading import load_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def compile_folder():
    """As the server does it, over a tiny base."""
    model = tiny_model("llama")
    spec = describe_plain(model, "a" * 64)
    return partial(
        _compile_folder,
        settings=Settings(),
        base=SimpleNamespace(spec=spec, dtype=torch.float32, module=model),
        base_weights=LoadedWeights(site_modules(model, spec)),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A DoRA adapter: what its norms are is kept beside it."""
    folder = tmp_path_factory.mktemp("dora")
    config = peft.LoraConfig(use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(copy.deepcopy(tiny_model("llama")), config).save_pretrained(folder)
    return folder


@pytest.fixture
def version(tmp_path, trained):
    store = AdapterStore(tmp_path / "store")
    with store.stage(1 << 20) as staging:
        staging.copy(trained / CONFIG, trained / WEIGHTS)
        yield store, store.commit(staging)
    store.close()


def derived(store, digest):
    return sorted(path.name for path in store.path(digest).glob("*derived*"))


def damage(store, digest, name, place):
    path = store.path(digest) / name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_an_intact_version_is_loaded_and_its_norms_kept(version, compile_folder, trained):
    store, digest = version
    adapter = load_adapter(store, compile_folder, digest)
    assert adapter.digest == digest
    assert len(derived(store, digest)) == 1
    registered = compile_folder(AdapterFolder(trained))
    for name, parts in adapter.sites.items():
        pairs = zip(parts.tensors(), registered.sites[name].tensors(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "place"), [(CONFIG, 5), (CONFIG, -3), (WEIGHTS, 30), (WEIGHTS, -1), (WEIGHTS, -500)]
)
def test_a_damaged_byte_is_told_as_such_and_leaves_nothing(version, compile_folder, name, place):
    """Whether the file can still be read or not."""
    store, digest = version
    damage(store, digest, name, place)
    with pytest.raises(AdapterLoadError, match=f"{name} of adapter {digest} is damaged"):
        load_adapter(store, compile_folder, digest)
    assert derived(store, digest) == []


def test_damage_that_is_no_number_is_told_as_damage(version, compile_folder):
    """Values of a version were looked at when it was registered; its digest is what is held to."""
    store, digest = version
    path = store.path(digest) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a float32 that is NaN
    path.write_bytes(data)
    with pytest.raises(AdapterLoadError, match="damaged on the disk"):
        load_adapter(store, compile_folder, digest)
    with pytest.raises(AdapterRejectedError, match="NaN or infinite"):
        compile_folder(AdapterFolder(store.path(digest)))


def test_who_compiles_damaged_bytes_gets_no_adapter_from_it(version, compile_folder):
    """The check is the compilation's own too, before it keeps what it computed."""
    store, digest = version
    damage(store, digest, WEIGHTS, -1)
    with pytest.raises(AdapterLoadError, match="damaged"):
        compile_folder(store.open(digest))
    assert derived(store, digest) == []


def test_a_compilation_that_forgets_the_check_is_checked(version):
    store, digest = version
    damage(store, digest, WEIGHTS, -1)

    def careless(folder):
        folder.read(WEIGHTS, 1 << 20)
        return SimpleNamespace(digest=digest)

    with pytest.raises(AdapterLoadError, match="damaged"):
        load_adapter(store, careless, digest)


def test_a_file_of_many_stretches_is_hashed_in_their_order(tmp_path):
    store = AdapterStore(tmp_path / "store")
    content = b"".join(number.to_bytes(4, "big") for number in range(700_000))
    with store.stage(len(content)) as staging:
        staging.write(CONFIG, b"{}")
        staging.write(WEIGHTS, content)
        digest = store.commit(staging)
    folder = store.open(digest)
    assert folder.read(WEIGHTS, len(content)) == content
    folder.check()
    store.close()
