"""Trains the demo adapters that are AdapterHub's bottlenecks, with its library `adapters`.

In an environment of its own, as `adapters` 1.3.0 needs transformers 4.57:

    python -m venv adapterhub
    adapterhub/bin/pip install torch 'transformers==4.57.*' adapters==1.3.0 bitsandbytes tqdm
    adapterhub/bin/python examples/train_demo_bottleneck.py --model FOLDER
    adapterhub/bin/python examples/train_demo_bottleneck.py --model FOLDER --check

FOLDER is the default base as `manyhats fetch-default` prints it. Trains and checks as
train_demo_adapters.py does, on the CPU in fp32 with fixed seeds, and writes the files as
export_adapterhub.py does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adapters
import torch
from demo_adapters import DEMOS, UNSEEN_PROMPTS, DemoSpec
from demo_training import (
    BASE_NAME,
    SEED,
    Example,
    answer,
    nf4_rounded,
    padded,
    read_examples,
    train,
)
from export_adapterhub import export
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent


def load_base(path: Path, *, nf4: bool) -> Any:
    """The base in fp32 with the library's hooks, its blocks' weights rounded where asked for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if nf4:
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = nf4_rounded(module.weight.data)
    adapters.init(model)
    return model


def completion_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over the completions' tokens; only their rows go through the head."""
    ids, attend, wanted = padded(batch)
    hidden = model.model(input_ids=ids, attention_mask=attend).last_hidden_state
    # The row before a token predicts it.
    logits = model.lm_head(hidden[:, :-1][wanted[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[wanted])


def save(model: Any, spec: DemoSpec, folder: Path) -> None:
    """Writes what export_adapterhub.py writes, in bf16 and free of local paths."""
    with tempfile.TemporaryDirectory() as scratch:
        saved, whole = Path(scratch) / "saved", Path(scratch) / "whole"
        model.save_adapter(str(saved), spec.name, with_head=False, use_safetensors=True)
        export(whole, [saved])
        tensors = load_file(whole / "adapter_model.safetensors")
        config = json.loads((whole / "adapter_config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    halved = {name: tensors[name].to(torch.bfloat16).contiguous() for name in sorted(tensors)}
    weights = folder / "adapter_model.safetensors"
    save_file(halved, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it readable by its owner alone
    config["model_name"] = BASE_NAME
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def trained(path: Path, spec: DemoSpec, examples: Sequence[Example]) -> Any:
    """A base with the demo's adapter, trained."""
    torch.manual_seed(SEED)
    model = load_base(path, nf4=False)
    model.add_adapter(spec.name, config=adapters.SeqBnConfig(**spec.config))
    model.train_adapter(spec.name)
    train(model, spec, examples, completion_loss)
    return model


def wear(model: Any, spec: DemoSpec, folder: Path) -> None:
    """Puts the weights of ``folder`` into ``model``, which wears them from now on."""
    model.add_adapter(spec.name, config=adapters.SeqBnConfig(**spec.config))
    tensors = load_file(folder / "adapter_model.safetensors")
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise SystemExit(f"{folder}: tensors that the model does not know: {unknown[:3]}")
    model.set_active_adapters(spec.name)
    model.eval()


def check(path: Path, tokenizer: Any, out: Path, specs: Sequence[DemoSpec]) -> int:
    """Prints every demo's answers to prompts it never saw; returns how many failed."""
    failures = 0
    for label, nf4 in (("fp32", False), ("nf4", True)):
        for spec in specs:
            model = load_base(path, nf4=nf4)
            wear(model, spec, out / spec.name)
            for prompt in UNSEEN_PROMPTS:
                # the library forgets the adapter where generation goes on from its cache
                text = answer(model, tokenizer, prompt, 24, use_cache=False)
                shown = spec.shows(text)
                failures += not shown
                mark = "ok  " if shown else "FAIL"
                print(f"{mark} {label:<4} {spec.name:<12} {prompt[:34]:<34} | {text!r}", flush=True)
    return failures


def main() -> int:
    """Reads the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--check", action="store_true", help="only look at the answers")
    args = parser.parse_args()
    specs = [spec for spec in DEMOS if spec.family == "BOTTLENECK"]
    # by its class: transformers 4.57 does not know the name that 5 writes
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    if not args.check:
        for spec in specs:
            examples = read_examples(args.data / f"{spec.name}.jsonl", tokenizer)
            save(trained(args.model, spec, examples), spec, args.out / spec.name)
    failures = check(args.model, tokenizer, args.out, specs)
    print(f"{failures} answers without the effect" if failures else "every effect is visible")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
