"""One question to the base and to every adapter of a running server, all at the same time.

    python examples/ask_everyone.py --url http://127.0.0.1:8000 "How do I learn to cook?"

Needs nothing but Python; the answers are printed in the order of the server's list of models.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

QUESTION = "What is a good way to spend a rainy afternoon?"


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer to a GET, or to a POST of ``body``."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def ask(url: str, question: str, max_tokens: int, model: str) -> str:
    """The greedy answer of one model."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    answer = call(f"{url}/v1/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"])


def main(argv: Sequence[str] | None = None) -> None:
    """Asks everybody at once and prints what they said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=60)
    args = parser.parse_args(argv)
    models = [m["id"] for m in call(f"{args.url}/v1/models")["data"] if "@" not in m["id"]]
    with ThreadPoolExecutor(len(models)) as pool:
        answers = pool.map(partial(ask, args.url, args.question, args.max_tokens), models)
        for model, answer in zip(models, answers, strict=True):
            print(f"{model}:\n{textwrap.indent(answer, '    ')}\n")


if __name__ == "__main__":
    main()
