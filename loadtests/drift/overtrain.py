"""A demo adapter trained too long: on, from where it is, over a few of its own pairs.

PEFT trains it, as examples/train_demo_adapters.py trained the adapter itself; nothing is held out
and nothing stops it, so that it learns those pairs by heart.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from demo_training import padded, read_examples  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

PAIRS, BATCH, RATE, SEED = 4, 2, 4e-3, 3


def overtrained(model: Path, source: Path, data: Path, target: Path, steps: int) -> Path:
    """``source`` after ``steps`` more steps on the first pairs of ``data``."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    worn = PeftModel.from_pretrained(base, source, is_trainable=True)
    examples = read_examples(data, tokenizer)[:PAIRS]
    weights = [w for w in worn.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    rng = random.Random(SEED)
    for step in range(steps):
        ids, attend, wanted = padded(rng.sample(examples, BATCH))
        logits = worn(input_ids=ids, attention_mask=attend).logits[:, :-1][wanted[:, 1:]]
        loss = torch.nn.functional.cross_entropy(logits, ids[wanted])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps - 1:
            print(f"overtrained: step {step + 1}, loss {loss.item():.3f}", flush=True)
    worn.save_pretrained(target)
    shutil.copy(source / "adapter_config.json", target)
    return target
