"""What every scenario stands on: the options, the adapters, a user that streams completions."""

from __future__ import annotations

import json
import random
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import gevent
from locust import HttpUser, LoadTestShape, events
from locust.env import Environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shapes import Profile, steady, users_at
from workload import AdapterChoice

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child")
DEFAULT_RUN_S = 60


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser, **_: Any) -> None:
    """The scenarios' own options, beside Locust's --host, --users and --run-time."""
    group = parser.add_argument_group("Manyhats")
    key = {"env_var": "MANYHATS_KEY", "default": "", "help": "API key of every request"}
    group.add_argument("--api-key", **key)  # type: ignore[arg-type]
    group.add_argument("--alpha", type=float, default=1.0, help="popularity of adapters: rank^-a")
    group.add_argument("--prompt-words", default="8-64", help="LOW-HIGH, uniform")
    group.add_argument("--answer-tokens", default="8-32", help="LOW-HIGH, uniform")
    group.add_argument("--think-s", type=float, default=0.2, help="mean pause between requests")
    group.add_argument("--rollout-adapter", default="", help="default: the first that is listed")
    group.add_argument("--rollout-s", type=float, default=2.0, help="between changes of a route")
    group.add_argument("--churn-path", default="", help="adapter folder for the soak's loads")


class Shape(LoadTestShape):
    """Users over the run by a profile of ``shapes``, up to --users, for --run-time."""

    abstract = True
    use_common_options = True
    profile: ClassVar[Profile] = staticmethod(steady)

    def tick(self) -> tuple[int, float] | None:
        """Users wanted now, and how fast to get there. None ends the run."""
        options = self.runner.environment.parsed_options
        run_s = float(options.run_time or DEFAULT_RUN_S)
        users = users_at(self.profile, self.get_run_time(), run_s, options.num_users or 1)
        return None if users is None else (users, float(max(users, 1)))


class CompletionUser(HttpUser):
    """Streams completions from adapters drawn by popularity.

    Each answer is two rows of the report: POST, until its end, and TTFT, until its first event. A
    429 is the server's stated refusal: it has a row of its own, is no failure, and its Retry-After
    is kept. Everything else that is not a whole answer is a failure.
    """

    abstract = True
    label = "completion"
    tenant = ""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.options = environment.parsed_options
        self.rng = random.Random()
        self.headers = {}
        if self.options.api_key:
            self.headers["authorization"] = f"Bearer {self.options.api_key}"
        if self.tenant:
            self.headers["x-manyhats-tenant"] = self.tenant

    def wait_time(self) -> float:
        """Exponential, so that the users together come as independent ones do."""
        return self.rng.expovariate(1.0 / self.options.think_s) if self.options.think_s else 0.0

    def on_start(self) -> None:
        """Learns which models there are."""
        with self.client.get("/v1/models", headers=self.headers, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"HTTP {answer.status_code}: {answer.text[:200]}")
                self.environment.runner.quit()
                return
            self.base, *others = [model["id"] for model in answer.json()["data"]]
        self.adapters = sorted(others)
        self.choice = AdapterChoice(max(1, len(others)), self.options.alpha)

    def popular(self) -> str:
        """An adapter by popularity; the base where there is none."""
        return self.adapters[self.choice.draw(self.rng)] if self.adapters else self.base

    def drawn(self, option: str) -> int:
        """A number out of an option's LOW-HIGH."""
        low, _, high = option.partition("-")
        return self.rng.randint(int(low), int(high or low))

    def ask(self, model: str, *, leave_after: int | None = None) -> str | None:
        """One streamed answer. ``leave_after``: hang up after so many events.

        Returns what served it (x-manyhats-served-by), None for a failed or refused request.
        """
        body = {
            "model": model,
            "prompt": " ".join(self.rng.choices(WORDS, k=self.drawn(self.options.prompt_words))),
            "max_tokens": self.drawn(self.options.answer_tokens),
            "stream": True,
        }
        started = time.perf_counter()
        with self.client.post(
            "/v1/completions",
            json=body,
            headers=self.headers,
            name=self.label,
            stream=True,
            catch_response=True,
        ) as answer:
            if answer.status_code == 429:
                answer.request_meta["name"] = f"{self.label} (429)"
                answer.success()
                gevent.sleep(float(answer.headers.get("retry-after", 1)))
                return None
            if answer.status_code != 200:
                answer.failure(f"HTTP {answer.status_code}: {answer.text[:200]}")
                return None
            problem = self._read(answer.iter_lines(), started, leave_after)
            answer.request_meta["response_time"] = 1000 * (time.perf_counter() - started)
            if problem is not None:
                answer.failure(problem)
                return None
            answer.success()
            answer.close()
            return str(answer.headers.get("x-manyhats-served-by", ""))

    def _read(self, lines: Iterator[bytes], started: float, leave_after: int | None) -> str | None:
        """Reads the events; what is wrong with them, or None."""
        count = 0
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]":
                return None
            event = json.loads(line[6:])
            if "error" in event:
                return f"stream error: {event['error']}"[:200]
            count += 1
            if count == 1:
                self._first_event(1000 * (time.perf_counter() - started))
            if count == leave_after:
                return None
        return "the stream ended without [DONE]"

    def _first_event(self, milliseconds: float) -> None:
        self.environment.events.request.fire(
            request_type="TTFT",
            name=self.label,
            response_time=milliseconds,
            response_length=0,
            exception=None,
            context={},
        )

    def admin(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A call of the admin API, by its method and the last part of its path in the report.

        The answer's JSON; None, and a failure in the report, unless it is a 2xx.
        """
        name = "admin " + path.rsplit("/", 1)[-1]
        with self.client.request(
            method, path, json=body, headers=self.headers, name=name, catch_response=True
        ) as answer:
            if not answer.ok:
                answer.failure(f"HTTP {answer.status_code}: {answer.text[:200]}")
                return None
            answer.success()
            return answer.json() if "json" in answer.headers.get("content-type", "") else {}
