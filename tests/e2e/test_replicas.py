"""Two real servers on one real Redis and one folder of adapters: what is changed on one is served
by the other, a quota holds across both, and neither Redis' absence nor a kill -9 does any harm.
"""

from __future__ import annotations

import logging
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from support.models import tiny_model, tiny_tokenizer
from support.polling import PATIENCE_S, until
from support.random_lora import write_random_lora
from support.redis_server import RedisServer
from support.server import Server, running_server

from manyhats.lifecycle.audit import broken_link

pytestmark = pytest.mark.e2e

logger = logging.getLogger(__name__)

ADMIN = {"authorization": "Bearer admin-secret"}
PROMPT = [5, 17, 42, 9]
NEW_TOKENS = 4
CONTENTS = 8


@dataclass
class Replica:
    """One of the servers."""

    home: Path
    server: Server

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.server.base_url, timeout=PATIENCE_S, headers=ADMIN)

    def register(self, name: str, path: Path, **more) -> httpx.Response:
        body = {"name": name, "path": str(path), **more}
        return self.http.post("/admin/adapters", json=body)

    def change(self, name: str, action: str, **body) -> httpx.Response:
        return self.http.post(f"/admin/adapters/{name}/{action}", json=body)

    def ask(self, model: str, **more) -> httpx.Response:
        body = {"model": model, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
        return self.http.post("/v1/completions", json={**body, "ignore_eos": True}, **more)

    def served(self, model: str) -> str:
        """What served a request; empty where it is not known."""
        return self.ask(model).headers.get("x-manyhats-served-by", "")

    def store(self) -> tuple[str, float]:
        shown = self.http.get("/readyz").json()["store"]
        return shown, self.server.value("manyhats_store_up", store="registry")


class Pair:
    """Both servers, and what they share."""

    def __init__(self, folder: Path, redis: RedisServer, stack: ExitStack) -> None:
        self.redis = redis
        self.adapters = folder / "adapters"
        self._folder = folder
        self._stack = stack
        with ThreadPoolExecutor(2) as pool:
            self.first, self.second = pool.map(self.start, ("one", "two"))

    def start(self, name: str) -> Replica:
        flags = ("--model", str(self._folder / "tiny"), "--adapter-root", str(self.adapters))
        flags += ("--kernels", "torch", "--quantization", "none", "--dtype", "fp32")
        flags += ("--kv-cache-mb", "16", "--threads", "1", "--drain-s", "1", "--metrics-open")
        flags += ("--admin-api-keys", "admin-secret", "--redis-url", self.redis.url)
        flags += ("--store", str(self._folder / "store"))
        home = self._folder / name
        replica = Replica(home, self._stack.enter_context(running_server(home, *flags)))
        self._stack.callback(replica.http.close)
        return replica


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    tiny_model("llama").save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    for seed in range(CONTENTS):
        path = folder / "adapters" / f"v{seed}"
        write_random_lora(path, folder / "tiny", rank=2, targets=("q_proj",), seed=seed, scale=0.9)
    redis = RedisServer(folder, persistent=True)
    redis.start()
    with ExitStack() as stack:
        stack.callback(redis.stop)
        yield Pair(folder, redis, stack)


def test_what_is_changed_on_one_is_served_by_the_other(pair):
    first, second = pair.first, pair.second
    assert first.register("a", pair.adapters / "v0").status_code == 201
    until(lambda: second.served("a") == "a@1")
    assert second.register("a", pair.adapters / "v1", promote=False).status_code == 201
    until(lambda: first.served("a@2") == "a@2")
    texts = {}
    for version in (1, 2):
        answers = [replica.ask(f"a@{version}").json() for replica in (first, second)]
        here, there = (answer["choices"][0]["text"] for answer in answers)
        assert here == there
        texts[version] = here
    assert texts[1] != texts[2], "the adapters move the answer"
    seconds = []
    for number in range(10):
        version = 2 - number % 2
        replica, other = (first, second) if number % 3 else (second, first)
        assert replica.change("a", "promote", version=version).status_code == 200
        seconds.append(until(lambda o=other, v=version: o.served("a") == f"a@{v}"))
    logger.info("seconds from a promote's answer to its effect on the other: %s", sorted(seconds))
    assert first.change("a", "rollback", to="baseline").status_code == 200
    until(lambda: second.served("a") == "baseline")
    assert second.http.delete("/admin/adapters/a@1").status_code == 200
    until(lambda: first.ask("a@1").status_code == 404)


def test_one_quota_holds_across_both_and_so_does_the_usage(pair):
    first, second = pair.first, pair.second
    each = len(PROMPT) + NEW_TOKENS
    tenant = {"id": "acme", "quotas": {"tokens_per_day": 6 * each}}
    assert first.http.post("/admin/tenants", json=tenant).status_code == 201
    issued = first.http.post("/admin/tenants/acme/keys", json={}).json()["key"]
    key = {"authorization": f"Bearer {issued}"}
    until(lambda: second.http.get("/v1/models", headers=key).status_code == 200)
    base = second.http.get("/v1/models", headers=key).json()["data"][0]["id"]
    statuses = [(first, second)[i % 2].ask(base, headers=key).status_code for i in range(12)]
    assert statuses == [200] * 6 + [429] * 6

    def usage(replica):
        rows = replica.http.get("/admin/usage", params={"tenant": "acme"}).json()["data"]
        return [(r["requests"], r["prompt_tokens"], r["output_tokens"]) for r in rows]

    for replica in (first, second):
        until(lambda r=replica: usage(r) == [(6, 6 * len(PROMPT), 6 * NEW_TOKENS)])


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_redis_away_under_load(pair, how):
    """Not one request fails; changes are refused in words; after it is back all goes on."""
    first, second = pair.first, pair.second
    name = f"r-{how}"
    for seed in (0, 1):
        assert first.register(name, pair.adapters / f"v{seed}").status_code == 201
    until(lambda: second.served(name) == f"{name}@2")
    done, answers = threading.Event(), []

    def client(replica):
        url = replica.server.base_url
        with httpx.Client(base_url=url, timeout=PATIENCE_S, headers=ADMIN) as http:
            body = {"model": name, "prompt": PROMPT, "max_tokens": 2}
            while not done.is_set():
                answer = http.post("/v1/completions", json=body)
                answers.append((answer.status_code, answer.headers.get("x-manyhats-served-by")))

    threads = [threading.Thread(target=client, args=(r,)) for r in (first, second) for _ in "ab"]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answers) > 20)
        pair.redis.stop(signal.SIGKILL) if how == "killed" else pair.redis.pause()
        for replica in (first, second):
            until(lambda r=replica: r.store() == ("unreachable", 0))
            refused = replica.change(name, "promote", version=1)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                503,
                "service_unavailable",
            )
            assert "Redis" in refused.json()["error"]["message"]
            assert replica.register("n", pair.adapters / "v2").status_code == 503
        seen = len(answers)
        until(lambda: len(answers) > seen + 20)
        pair.redis.start() if how == "killed" else pair.redis.resume()
        for replica in (first, second):
            until(lambda r=replica: r.store() == ("reachable", 1))
        assert second.change(name, "promote", version=1).status_code == 200
        until(lambda: first.served(name) == f"{name}@1")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in answers} == {200}
    assert {served for _, served in answers} <= {f"{name}@1", f"{name}@2"}
    assert first.http.get("/admin/adapters/n").status_code == 404


def test_a_server_killed_while_it_registers_leaves_what_it_acknowledged(pair):
    first, second = pair.first, pair.second
    acknowledged: list[str] = []

    def work():
        for number in range(1000):
            try:
                answer = first.register(f"k{number}", pair.adapters / f"v{number % CONTENTS}")
            except httpx.TransportError:
                return
            if answer.status_code == 201:
                acknowledged.append(f"k{number}")

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: len(acknowledged) >= 7)
    first.server.process.kill()
    thread.join()

    def names(replica):
        listed = replica.http.get("/admin/adapters").json()["data"]
        return {card["name"] for card in listed if card["name"].startswith("k")}

    in_flight = f"k{len(acknowledged)}"
    until(lambda: names(second) >= set(acknowledged))
    again = pair.start("one")
    assert names(second) == names(again)
    assert names(again) - {in_flight} == set(acknowledged)
    swept = again.http.post("/admin/gc", json={"dry_run": True}).json()
    assert swept["digests"] == [], "no orphan bytes"
    assert again.served(acknowledged[-1]) == f"{acknowledged[-1]}@1"
    entries = again.http.get("/admin/audit", params={"limit": 1000}).json()["data"]
    assert broken_link(entries)[1] is None
