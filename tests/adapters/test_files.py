"""Finding and reading an adapter's two files: containment, kinds of files, bounds, JSON."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manyhats.adapters.files import (
    AdapterLimits,
    locate,
    read_config,
    read_config_file,
    read_file,
    read_weights,
)
from manyhats.errors import AdapterRejectedError

LIMITS = AdapterLimits()
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.ones(2, 3)}, folder / WEIGHTS)
    return folder


@pytest.fixture
def root(tmp_path):
    """A folder that adapters may come from; ``outside`` beside it is not."""
    fill(tmp_path / "root" / "good")
    fill(tmp_path / "outside")
    return tmp_path / "root"


def reason(call, *args) -> str:
    with pytest.raises(AdapterRejectedError) as caught:
        call(*args)
    assert len(str(caught.value)) < 1000
    return caught.value.reason


def test_a_folder_within_a_root_is_found_and_read(root, tmp_path):
    files = locate(root / "good", [tmp_path / "elsewhere", root])
    assert (files.config_path, files.weights_path) == (
        root / "good" / CONFIG,
        root / "good" / WEIGHTS,
    )
    assert read_config_file(files.config_path, LIMITS) == {"peft_type": "LORA"}
    assert torch.equal(read_weights(files.weights_path, LIMITS).load("a"), torch.ones(2, 3))


def test_a_root_may_be_an_adapter_or_a_link_itself(root, tmp_path):
    assert locate(root / "good", [root / "good"]).config_path.name == CONFIG
    (tmp_path / "link").symlink_to(root)
    assert (
        locate(tmp_path / "link" / "good", [tmp_path / "link"]).config_path
        == root / "good" / CONFIG
    )
    assert locate(root / "good", [tmp_path / "link"]).config_path == root / "good" / CONFIG


def test_links_within_the_roots_are_followed(root):
    (root / "alias").symlink_to(root / "good")
    (root / "mixed").mkdir()
    for name in (CONFIG, WEIGHTS):
        (root / "mixed" / name).symlink_to(root / "good" / name)
    for name in ("alias", "mixed"):
        assert locate(root / name, [root]).weights_path == root / "good" / WEIGHTS


@pytest.mark.parametrize(
    "path", ["../outside", "good/../../outside", "/etc", "..", "nowhere/../../outside"]
)
def test_a_folder_outside_is_refused(root, path):
    assert reason(locate, root / path, [root]) == "path_not_allowed"


def test_without_roots_nothing_is_allowed(root):
    assert reason(locate, root / "good", []) == "path_not_allowed"


def test_a_sibling_that_begins_like_a_root_is_outside(root, tmp_path):
    fill(tmp_path / "root2" / "good")
    assert reason(locate, tmp_path / "root2" / "good", [root]) == "path_not_allowed"


def test_what_exists_outside_is_not_told(root, tmp_path):
    messages = []
    for path in (tmp_path / "outside", tmp_path / "absent1"):
        with pytest.raises(AdapterRejectedError) as caught:
            locate(path, [root])
        messages.append(str(caught.value).replace(str(path), "PATH"))
    assert messages[0] == messages[1]


def test_a_linked_folder_that_leads_outside_is_refused(root, tmp_path):
    (root / "escape").symlink_to(tmp_path / "outside")
    assert reason(locate, root / "escape", [root]) == "path_not_allowed"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_linked_file_that_leads_outside_is_refused(root, tmp_path, name):
    (root / "good" / name).unlink()
    (root / "good" / name).symlink_to(tmp_path / "outside" / name)
    assert reason(locate, root / "good", [root]) == "path_not_allowed"
    (root / "good" / name).unlink()
    (root / "good" / name).symlink_to("../../outside/absent")
    assert reason(locate, root / "good", [root]) == "path_not_allowed"


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "loop/good"])
def test_a_path_that_is_none_is_refused(root, path):
    (root / "loop").symlink_to(root / "loop")
    assert reason(locate, root / path, [root]) in ("path_not_allowed", "missing_file")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(root, name):
    (root / "good" / name).unlink()
    with pytest.raises(AdapterRejectedError, match=name) as caught:
        locate(root / "good", [root])
    assert caught.value.reason == "missing_file"


def test_a_missing_folder_is_said_to_be_missing(root):
    assert reason(locate, root / "absent", [root]) == "missing_file"
    assert reason(locate, root / "good" / CONFIG, [root]) == "missing_file"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_as_such_and_never_opened(root, name):
    (root / "good" / WEIGHTS).rename(root / "good" / name)
    assert reason(locate, root / "good", [root]) == "pickle_refused"


def test_a_pickle_beside_safetensors_is_ignored(root):
    (root / "good" / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert locate(root / "good", [root]).weights_path.name == WEIGHTS


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_only_regular_files_are_taken(root, kind, name, monkeypatch):
    (root / "good" / name).unlink()
    monkeypatch.chdir(root / "good")  # the path of a socket is short
    if kind == "fifo":
        os.mkfifo(name)
    elif kind == "folder":
        Path(name).mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    assert reason(locate, root / "good", [root]) == "path_not_allowed"
    # nor where it took the file's place later; opening a FIFO must not wait for a writer
    found: list[str] = []
    reader = threading.Thread(
        target=lambda: found.append(reason(read_file, root / "good" / name, 100)), daemon=True
    )
    reader.start()
    reader.join(timeout=20)
    assert found == ["path_not_allowed"]


def test_a_device_is_not_read():
    assert reason(read_file, Path("/dev/zero"), 100) == "path_not_allowed"


def test_a_link_that_took_a_file_s_place_is_not_followed(root, tmp_path):
    found = locate(root / "good", [root])
    found.weights_path.unlink()
    found.weights_path.symlink_to(tmp_path / "outside" / WEIGHTS)
    assert reason(read_weights, found.weights_path, LIMITS) == "path_not_allowed"
    found.weights_path.unlink()
    assert reason(read_weights, found.weights_path, LIMITS) == "missing_file"


def test_sizes_are_bounded_before_reading(root):
    weights, config = root / "good" / WEIGHTS, root / "good" / CONFIG
    size = weights.stat().st_size
    read_weights(weights, AdapterLimits(max_bytes=size))
    assert reason(read_weights, weights, AdapterLimits(max_bytes=size - 1)) == "too_large"
    assert reason(read_config_file, config, AdapterLimits(max_config_bytes=5)) == "too_large"
    with (root / "sparse").open("wb") as file:
        file.truncate(2**40)  # nothing would survive reading it
    assert reason(read_weights, root / "sparse", LIMITS) == "too_large"
    assert len(read_file(weights, size)) == size


def test_the_file_is_copied_so_its_owner_cannot_change_what_was_checked(root):
    path = root / "good" / WEIGHTS
    weights = read_weights(path, LIMITS)
    os.truncate(path, 0)
    assert torch.equal(weights.load("a"), torch.ones(2, 3))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"3", b"null", b'"LORA"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{'a': 1}",
        b'{"a": 1,}',
        b'{"a": 1} {"b": 2}', b'{"a": NaN}', b'{"a": [Infinity]}', b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}', b'{"a": "\\ud800"}', b'{"a": ["\\udfff"]}',
        b'{"\\ud800": 1}',
        b'{"a": "\x01"}', b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a":' * 17 + b"1" + b"}" * 17, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000,
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_a_bad_configuration_text_is_refused(text):
    assert reason(read_config, text, LIMITS) == "bad_config"


def test_a_good_configuration_text_is_read():
    deep = b'{"a":' * 15 + b"{}" + b"}" * 15
    assert read_config(deep, LIMITS)
    text = '{"r": 8, "lora_alpha": 1.5e1, "x": [true, null, "\\u00e9é\\ud83d\\ude00"]}'
    assert read_config(text.encode(), LIMITS) == json.loads(text)


def test_a_configuration_over_the_bound_is_refused():
    text = b'{"a": "' + b"x" * (LIMITS.max_config_bytes - 9) + b'"}'
    assert len(text) == LIMITS.max_config_bytes
    read_config(text, LIMITS)
    assert reason(read_config, text + b" ", LIMITS) == "too_large"
