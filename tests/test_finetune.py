"""The fine-tuning example: it trains what its recipe says, held to transformers and PEFT."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.models import tiny_model, tiny_tokenizer
from support.pages import ROOT

sys.path.insert(0, str(ROOT / "examples"))
finetune = importlib.import_module("finetune")
finetune_data = importlib.import_module("finetune_data")
finetune_recipe = importlib.import_module("finetune_recipe")

PAIRS = [
    {"prompt": f"w{5 + i} w{60 + i}" + " w9" * (i % 3), "completion": "w20 w21 w22"}
    for i in range(24)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


@pytest.fixture
def pairs(data):
    return finetune_data.read_pairs(data, tiny_tokenizer(), 64)


def loss_of(model, pairs):
    """The mean over pairs of transformers' loss on the completion, one pair at a time."""
    total = 0.0
    for pair in pairs:
        labels = [-100] * pair.start + pair.ids[pair.start :]
        with torch.no_grad():
            out = model(torch.tensor([pair.ids]), labels=torch.tensor([labels]))
        total += out.loss.item()
    return total / len(pairs)


def test_it_begins_at_the_base_and_keeps_the_best_weights(source, pairs, tmp_path):
    recipe = finetune_recipe.Recipe(ranks=(2,), epochs=2, batch=4, learning_rate=5e-3)
    trained_on, held_out = finetune_data.split(pairs, recipe.held_out)
    base = finetune_recipe.load_base(str(source))
    before = loss_of(base, held_out)
    found = finetune_recipe.train(base, 2, recipe, (trained_on, held_out), 0, tmp_path / "rank-2")
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.loss < 0.9 * before
    # The base is bare again, and the saved weights are those of the loss that was told.
    assert loss_of(base, held_out) == pytest.approx(before, rel=1e-6)
    again = PeftModel.from_pretrained(finetune_recipe.load_base(str(source)), tmp_path / "rank-2")
    assert loss_of(again.eval(), held_out) == pytest.approx(found.loss, rel=1e-4)
    tensors = load_file(tmp_path / "rank-2" / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {2}
    assert any("mlp" in n and t.any() for n, t in tensors.items() if "lora_B" in n)


def test_the_first_phase_is_the_attention_alone(source):
    peft = finetune_recipe.get_peft_model(
        tiny_model("llama"),
        finetune_recipe.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
    )
    some = finetune_recipe.unfreeze(peft, "attention")
    learning = {n for n, p in peft.named_parameters() if p.requires_grad}
    assert learning and all("self_attn" in n and "lora_" in n for n in learning)
    every = finetune_recipe.unfreeze(peft, "all")
    assert every > some
    learning = {n for n, p in peft.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in peft.named_parameters() if "lora_" in n}


class Control:
    should_training_stop = False


def test_the_best_weights_survive_a_worse_phase_and_a_loss_that_is_no_number():
    model = torch.nn.Module()
    model.lora_A = torch.nn.Parameter(torch.zeros(3))
    best, control = finetune_recipe.KeepBest(model, min_gain=0.1), Control()

    def told(loss, weight):
        with torch.no_grad():
            model.lora_A.fill_(weight)
        best.on_evaluate(None, None, control, metrics={"eval_loss": loss})
        return control.should_training_stop

    assert [told(4.0, 0), told(2.0, 1), told(1.9, 2), told(3.0, 3)] == [False, False, True, True]
    assert told(float("nan"), 4)
    best.restore()
    assert (best.loss, model.lora_A.tolist()) == (1.9, [2.0, 2.0, 2.0])


def test_the_smallest_rank_that_is_about_as_good_is_taken(tmp_path):
    def outcome(rank, loss):
        return finetune_recipe.Outcome(rank, 3.0, loss, tmp_path)

    assert finetune_recipe.choose([outcome(4, 1.2), outcome(8, 1.005), outcome(16, 1.0)]).rank == 8
    assert finetune_recipe.choose([outcome(4, 1.02), outcome(8, 1.0)]).rank == 8


def test_a_batch_has_its_loss_on_the_completions_alone(pairs):
    batch = finetune_data.collate(pairs[:3], pad=0)
    for row, pair in enumerate(pairs[:3]):
        end = len(pair.ids)
        assert batch["labels"][row, : pair.start].tolist() == [-100] * pair.start
        assert batch["labels"][row, pair.start : end].tolist() == [20, 21, 22, 2]
        assert set(batch["labels"][row, end:].tolist()) <= {-100}
        assert batch["attention_mask"][row].sum() == end
    assert pairs[0].probe == PAIRS[0]


def test_what_is_wrong_is_named(source, data, tmp_path, capsys):
    data.write_text('{"prompt": "w5", "completion": "w6"}\n{"prompt": "w5"}\n')
    argv = [str(data), "--name", "a", "--model", str(source), "--out", str(tmp_path / "a")]
    assert finetune.main([*argv, "--threads", "1"]) == 1
    assert "line 2: KeyError('completion')" in capsys.readouterr().err
    data.write_text('{"prompt": "w5", "completion": "w6"}\n')
    assert finetune.main([*argv, "--threads", "1"]) == 1
    assert "1 pairs are too few" in capsys.readouterr().err
    data.write_text('{"prompt": "w5 w5 w5", "completion": "w6"}\n')
    assert finetune.main([*argv, "--threads", "1", "--max-length", "3"]) == 1
    assert "--max-length is 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune.main([*argv, "--canary", "5"])
    assert "need --register" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
