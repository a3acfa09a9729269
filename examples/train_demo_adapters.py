"""Trains the demo adapters of ``examples/adapters`` with PEFT, then checks that each one's effect
is visible.

    python examples/train_demo_adapters.py                 # all, on the server's default base
    python examples/train_demo_adapters.py --only pirate   # one of them
    python examples/train_demo_adapters.py --check         # no training: only look at the answers

Runs on the CPU in fp32 with fixed seeds. The loss is taken on the completion alone; an eighth of
each data file is held out, and training stops as soon as that loss no longer falls.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from demo_adapters import DEMOS, UNSEEN_PROMPTS, DemoSpec
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 20240
BATCH = 8
MAX_EPOCHS = 4
HELD_OUT = 10
MIN_GAIN = 0.03
"""Relative fall of the held-out loss below which training stops."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized pair. ``ids``: prompt and completion; the completion starts at ``start``."""

    ids: list[int]
    start: int


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """The pairs of a JSONL file, put through the chat template.

    Raises KeyError or ValueError on a bad line.
    """
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        messages = [{"role": "user", "content": pair["prompt"]}]
        head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
        answer = tokenizer(pair["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        examples.append(Example(ids=prompt + answer, start=len(prompt)))
    return examples


def batches(examples: Sequence[Example], generator: torch.Generator) -> Iterator[list[Example]]:
    """Batches of similar length in random order, so that little is spent on padding."""
    by_length = sorted(examples, key=lambda e: len(e.ids))
    groups = [by_length[i : i + BATCH] for i in range(0, len(by_length), BATCH)]
    for i in torch.randperm(len(groups), generator=generator).tolist():
        yield groups[i]


def completion_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over the completions' tokens; only their rows go through the head."""
    width = max(len(e.ids) for e in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    attend = torch.zeros(len(batch), width, dtype=torch.long)
    wanted = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        attend[row, : len(example.ids)] = 1
        wanted[row, example.start : len(example.ids)] = True
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


@torch.no_grad()
def held_out_loss(model: Any, examples: Sequence[Example]) -> float:
    """Mean loss over the held-out pairs."""
    return float(completion_loss(model, examples))


def nf4_rounded(weight: torch.Tensor) -> torch.Tensor:
    """What an NF4 layer multiplies by in place of ``weight``."""
    packed, state = quantize_4bit(weight, quant_type="nf4")
    rounded: torch.Tensor = dequantize_4bit(packed, state)
    return rounded


def both_roundings(model: Any) -> list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """Every linear weight of the blocks, with its value as it is and as NF4 rounds it."""
    weights = []
    for module in model.get_base_model().model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            weight = module.weight
            weights.append((weight, (weight.data, nf4_rounded(weight.data))))
    return weights


def adam_with_decay(
    weights: Sequence[torch.nn.Parameter], peak: float, total: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW whose rate rises to ``peak`` in eight steps and falls to a tenth at step ``total``."""
    optimizer = torch.optim.AdamW(weights, lr=peak, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 8, 1.0 - 0.9 * step / total)
    )
    return optimizer, schedule


def train(model: Any, spec: DemoSpec, examples: Sequence[Example]) -> None:
    """Trains ``model``'s adapter in place until the held-out loss stops falling.

    Keeps the best epoch's weights.
    """
    generator = torch.Generator().manual_seed(SEED)
    kept_out, kept_in = examples[:HELD_OUT], examples[HELD_OUT:]
    weights = [p for p in model.parameters() if p.requires_grad]
    total = MAX_EPOCHS * math.ceil(len(kept_in) / BATCH)
    optimizer, schedule = adam_with_decay(weights, spec.learning_rate, total)
    best, best_weights = math.inf, [w.detach().clone() for w in weights]
    # Turn by turn over either, so that the effect holds on both.
    swapped = both_roundings(model) if spec.nf4_aware else []
    with tqdm(total=total, desc=f"{spec.name:>12}", unit="step") as bar:
        for epoch in range(MAX_EPOCHS):
            for batch in batches(kept_in, generator):
                for weight, roundings in swapped:
                    weight.data = roundings[bar.n % 2]
                loss = completion_loss(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", held_out=f"{best:.3f}")
            now = held_out_loss(model, kept_out)
            fell = now < best * (1.0 - MIN_GAIN)
            if now < best:
                best, best_weights = now, [w.detach().clone() for w in weights]
            bar.set_postfix(epoch=epoch + 1, held_out=f"{best:.3f}")
            if not fell:
                break
    with torch.no_grad():
        for weight, kept in zip(weights, best_weights, strict=True):
            weight.copy_(kept)


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


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 80) -> str:
    """The greedy answer to one chat message."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(
        **encoded,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


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
        "--only", action="append", choices=[d.name for d in DEMOS], help="repeatable"
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
    specs = [d for d in DEMOS if not args.only or d.name in args.only]
    path = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not args.check:
        for spec in specs:
            torch.manual_seed(SEED)
            model = get_peft_model(load_base(path, nf4=False), configuration(spec))
            if spec.starts_as is not None:
                start_prefix(model, tokenizer, spec.starts_as)
            train(model, spec, read_examples(args.data / f"{spec.name}.jsonl", tokenizer))
            save(model, spec, args.out / spec.name)
    failures = check(path, tokenizer, args.out, specs)
    print(f"{failures} answers without the effect" if failures else "every effect is visible")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
