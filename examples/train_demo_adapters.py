"""Trains the demo adapters of ``examples/adapters`` with PEFT, then checks that each one's effect
is visible.

    python examples/train_demo_adapters.py                 # all, on the server's default base
    python examples/train_demo_adapters.py --only pirate   # one of them
    python examples/train_demo_adapters.py --check         # no training: only look at the answers

Runs on the CPU in fp32 with fixed seeds (demo_training.py). AdapterHub's bottlenecks are trained
by train_demo_bottleneck.py, in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
PEFT_DEMOS = [demo for demo in DEMOS if demo.family != "BOTTLENECK"]


def completion_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over the completions' tokens; only their rows go through the head."""
    ids, attend, wanted = padded(batch)
    causal_lm = model.get_base_model()
    past = None
    if model.active_peft_config.is_prompt_learning:
        past = model.get_prompt(len(batch))
        virtual = attend.new_ones(len(batch), model.active_peft_config.num_virtual_tokens)
        attend = torch.cat((virtual, attend), dim=1)
    hidden = causal_lm.model(
        input_ids=ids, attention_mask=attend, past_key_values=past
    ).last_hidden_state
    # The row before a token predicts it.
    logits = causal_lm.lm_head(hidden[:, :-1][wanted[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[wanted])


def configuration(spec: DemoSpec) -> PeftConfig:
    """PEFT's configuration of a demo."""
    if spec.family == "LORA":
        return LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **spec.config)
    kind = {"IA3": IA3Config, "PREFIX_TUNING": PrefixTuningConfig}[spec.family]
    return kind(task_type="CAUSAL_LM", **spec.config)


@torch.no_grad()
def start_prefix(model: Any, tokenizer: Any, text: str) -> None:
    """The prefix starts as the keys and values of the first tokens of ``text``: from random ones,
    it would need far more than these few pairs.
    """
    prefix = model.prompt_encoder[model.active_adapter].embedding.weight
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    cache = model.get_base_model()(input_ids=ids[:, : len(prefix)]).past_key_values
    layers = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    prefix.copy_(torch.cat([part[0].transpose(0, 1).flatten(1) for part in layers], dim=1))


def both_roundings(model: Any) -> list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """Every linear weight of the blocks, with its value as it is and as NF4 rounds it."""
    weights = []
    for module in model.get_base_model().model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            weight = module.weight
            weights.append((weight, (weight.data, nf4_rounded(weight.data))))
    return weights


def trained(path: Path, tokenizer: Any, spec: DemoSpec, examples: Sequence[Example]) -> Any:
    """A base with the demo's adapter, trained."""
    torch.manual_seed(SEED)
    model = get_peft_model(load_base(path, nf4=False), configuration(spec))
    if spec.starts_as is not None:
        start_prefix(model, tokenizer, spec.starts_as)
    # Turn by turn over either, so that the effect holds on both.
    swapped = both_roundings(model) if spec.nf4_aware else []

    def swap(step: int) -> None:
        for weight, roundings in swapped:
            weight.data = roundings[step % 2]

    train(model, spec, examples, completion_loss, swap)
    return model


def save(model: Any, spec: DemoSpec, folder: Path) -> None:
    """Writes what PEFT writes, in bf16; the configuration is free of local paths."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tensors = load_file(Path(scratch) / "adapter_model.safetensors")
        config = json.loads((Path(scratch) / "adapter_config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    halved = {name: tensors[name].to(torch.bfloat16).contiguous() for name in sorted(tensors)}
    weights = folder / "adapter_model.safetensors"
    save_file(halved, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors leaves it readable by its owner alone
    config["base_model_name_or_path"] = BASE_NAME
    config |= spec.config  # sets of names would be written in any order
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def load_base(path: Path, *, nf4: bool) -> Any:
    """The base in fp32, its blocks' linear weights rounded to NF4 where that is asked for.

    Rounded, not quantized: PEFT's DoRA misreads the layout that bitsandbytes gives 4-bit weights on
    a CPU.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if nf4:
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = nf4_rounded(module.weight.data)
    return model


def check(path: Path, tokenizer: Any, adapters: Path, specs: Sequence[DemoSpec]) -> int:
    """Prints every demo's answers to prompts it never saw, in fp32 and on an NF4 base.

    Returns how many failed.
    """
    failures = 0
    for label, nf4 in (("fp32", False), ("nf4", True)):
        base = load_base(path, nf4=nf4)
        print(f"     {label:<4} {'(base)':<12} {answer(base, tokenizer, UNSEEN_PROMPTS[0])!r}")
        for spec in specs:  # a base each: PEFT mixes no families in one model
            model = PeftModel.from_pretrained(load_base(path, nf4=nf4), adapters / spec.name)
            model.eval()
            for prompt in UNSEEN_PROMPTS:
                text = answer(model, tokenizer, prompt)
                shown = spec.shows(text)
                failures += not shown
                mark = "ok  " if shown else "FAIL"
                print(f"{mark} {label:<4} {spec.name:<12} {prompt[:34]:<34} | {text!r}", flush=True)
    return failures


def default_model() -> Path:
    """The server's default base model, fetched and converted on first use."""
    from manyhats.config import Settings
    from manyhats.engine.model.default import ensure_default_model

    return ensure_default_model(Settings().home)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="folder of SmolLM2-135M-Instruct; default: the server's own"
    )
    parser.add_argument(
        "--only", action="append", choices=[d.name for d in PEFT_DEMOS], help="repeatable"
    )
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--check", action="store_true", help="only check what is there already")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and checks the chosen demos; 1 if an effect is not visible."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    specs = [d for d in PEFT_DEMOS if not args.only or d.name in args.only]
    path = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not args.check:
        for spec in specs:
            examples = read_examples(args.data / f"{spec.name}.jsonl", tokenizer)
            save(trained(path, tokenizer, spec, examples), spec, args.out / spec.name)
    failures = check(path, tokenizer, args.out, specs)
    print(f"{failures} answers without the effect" if failures else "every effect is visible")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
