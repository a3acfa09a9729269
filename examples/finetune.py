"""Fine-tunes a LoRA adapter over a 4-bit base with PEFT and transformers' Trainer, then gives it to
a running server.

    python examples/finetune.py examples/data/pirate.jsonl --name parrot --quick
    python examples/finetune.py mine.jsonl --name mine --model ~/models/Qwen3-8B --ranks 4,8,16 \\
        --register http://127.0.0.1:8000 --evaluate --canary 5

A line of the data is {"prompt": ..., "completion": ...}. The recipe:

- the base in NF4 (bitsandbytes), as the server has it, so that the adapter learns over the very
  weights that it will be worn over;
- a start at exactly the base: B is zero, so the first step begins where the base ends;
- two phases: first the adapters of the attention alone, at the full learning rate, then all of
  them, at half of it. Each warms up over a tenth of its steps and falls by a cosine; gradients are
  clipped at a norm of 1;
- a share of the pairs is held out. After each epoch their loss is taken; a phase ends once it falls
  no more, and the best weights that were ever seen are kept, the untrained ones included;
- that for each rank; of those whose loss is within 1 % of the best, the smallest is kept.

Needs a running server (its key in MANYHATS_KEY) with --register only. Over the default base --quick
takes less than four minutes of one CPU core, the registration included.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx
import torch
from finetune_data import Pair, read_pairs, split
from finetune_recipe import Outcome, Recipe, choose, load_base, train
from registering import RefusedError, canary, evaluate, register
from transformers import AutoTokenizer


def default_model() -> Path:
    """The server's default base model, fetched and converted on first use."""
    from manyhats.config import Settings
    from manyhats.engine.model.default import ensure_default_model

    return ensure_default_model(Settings().home)


def tune(args: argparse.Namespace, recipe: Recipe) -> tuple[Outcome, list[Pair]]:
    """The best rank, written to ``args.out``, and the pairs that were held out."""
    source = args.model or str(default_model())
    tokenizer = AutoTokenizer.from_pretrained(source)
    pairs = read_pairs(args.data, tokenizer, args.max_length)[: args.pairs]
    data = split(pairs, recipe.held_out)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    base = load_base(source)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".finetune-") as scratch:
        outcomes = [
            train(base, rank, recipe, data, pad, Path(scratch) / f"rank-{rank}")
            for rank in recipe.ranks
        ]
        print("\n  rank  bare base   held out")
        for found in outcomes:
            print(f"  {found.rank:4}  {found.before:9.4f}  {found.loss:9.4f}")
        best = choose(outcomes)
        best.folder.rename(args.out)
    print(f"rank {best.rank} is in {args.out}")
    return best, data[1]


def hand_over(args: argparse.Namespace, best: Outcome, held_out: Sequence[Pair]) -> int:
    """Registers the adapter, evaluates it and gives it its share, as far as that is asked for.

    Returns 2 where the evaluation was not passed. Raises RefusedError.
    """
    key = os.environ.get("MANYHATS_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    metadata = {"rank": str(best.rank), "held_out_loss": f"{best.loss:.4f}"}
    with httpx.Client(base_url=args.register, headers=headers, timeout=600) as server:
        promote = False if args.evaluate or args.canary is not None else None
        card = register(
            server,
            args.name,
            args.out,
            probes=[pair.probe for pair in held_out],
            metadata=metadata,
            promote=promote,
        )
        called = f"{args.name}@{card['version']}"
        print(f"{called} is registered{', the stable version' if card['stable'] else ''}")
        if args.evaluate:
            report = evaluate(server, args.name, card["version"])
            for row in report["rows"]:
                print(f"  {row['measure']:34} {row['value']} {'' if row['passed'] else 'FAILED'}")
            if not report["passed"]:
                print(f"{called} has not passed its evaluation", file=sys.stderr)
                return 2
        if args.canary is not None and not card["stable"]:
            canary(server, args.name, card["version"], args.canary)
            print(f"{called} is a canary for {args.canary:g} % of the callers")
        elif args.canary is not None:
            print(f"{called} is the first of its name and so stable: it is no canary")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="JSONL: a prompt and a completion a line")
    parser.add_argument("--name", required=True, help="the adapter's name")
    parser.add_argument("--model", help="folder or hub id of the base; default: the server's own")
    parser.add_argument("--out", type=Path, help="new folder for the adapter; default: ./NAME")
    parser.add_argument("--ranks", help="tried one after the other; default 4,8,16")
    parser.add_argument("--epochs", type=int, help="at most, a phase; default 4")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of the first phase")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a pair")
    parser.add_argument(
        "--quick", action="store_true", help="24 pairs; by default ranks 2,8 and 2 epochs"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--register", metavar="URL", help="give it to the server there")
    parser.add_argument("--evaluate", action="store_true", help="and have it evaluated")
    parser.add_argument("--canary", type=float, metavar="PERCENT", help="and give it this share")
    args = parser.parse_args(argv)
    args.out = args.out or Path(args.name)
    args.pairs = 24 if args.quick else None
    args.ranks = args.ranks or ("2,8" if args.quick else "4,8,16")
    args.epochs = args.epochs or (2 if args.quick else 4)
    if args.register is None and (args.evaluate or args.canary is not None):
        parser.error("--evaluate and --canary need --register")
    if args.out.exists():
        parser.error(f"--out: {args.out} is there already")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and hands over if asked to; 1 for what was refused, 2 for a failed evaluation."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    try:
        ranks = tuple(sorted({int(rank) for rank in args.ranks.split(",")}))
        recipe = Recipe(ranks, args.epochs, args.batch, args.learning_rate)
        best, held_out = tune(args, recipe)
        return hand_over(args, best, held_out) if args.register else 0
    except (ValueError, OSError, RefusedError, httpx.HTTPError) as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
