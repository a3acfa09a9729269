"""Engine replicas behind Ray Serve's proxy, on CPUs: what affinity saves, a stream that passes
through, a replica that is killed, one more and one less.

Ray is no part of the default environment (400 MB): `make test-ray` makes one for this file.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.base import tiny_flags, write_adapters, write_base
from support.redis_server import RedisServer
from support.server import free_port

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, as it is imported
    ray = pytest.importorskip("ray", reason="needs Ray: `make test-ray`")
    from ray import serve

    from manyhats.fleet.affinity import ranking
    from manyhats.fleet.ray_serve import build

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("default"),  # Ray's own
]

logger = logging.getLogger(__name__)

NAMES = [f"hat-{i}" for i in range(24)]
SLOTS = 12
LONG = 500  # tokens; the tiny base has room for 512
MODELS = random.Random(3).choices(NAMES, k=120)
ADMIN = {"authorization": "Bearer of-the-fleet"}


@dataclass
class Fleet:
    """The application, its proxy's address, and what it is made of."""

    folder: Path
    base: str
    flags: str
    http: httpx.Client

    def deploy(self, **args: object) -> None:
        """Returns once as many replicas as asked for are ready."""
        fixed = {"flags": self.flags, "home": self.folder / "homes", "num_cpus": 0.1}
        app = build({**fixed, "drain_s": 5, "retry_s": 120, **args})
        serve.run(app, name="manyhats", route_prefix="/")

    def replicas(self, count: int) -> dict[str, tuple[int, str]]:
        """(process id, URL) of each replica's server by its name, once there are ``count``."""
        handle = serve.get_deployment_handle("Engine", app_name="manyhats")
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            found = {}
            for _ in range(12 * count):
                try:
                    name, pid, url = handle.about.remote().result(timeout_s=60)
                except (ray.exceptions.RayError, TimeoutError):
                    continue  # one that dies just now
                if psutil.pid_exists(pid):
                    found[name] = (pid, url)
            if len(found) == count:
                return found
        raise AssertionError(f"there are not {count} replicas but {found}")

    def ask(self, model: str, tokens: int = 3) -> httpx.Response:
        body = {"model": model, "prompt": "w7 w8 w9", "max_tokens": tokens, "ignore_eos": True}
        return self.http.post("/v1/completions", json=body)


def _until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@dataclass
class Clients:
    """Threads that ask without pause until ``stop``; every answer must be a 200."""

    fleet: Fleet
    count: int
    tokens: int = 8
    statuses: Counter[int] = field(default_factory=Counter)
    longest_s: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Clients:
        self._pool = ThreadPoolExecutor(self.count)
        self._running = [self._pool.submit(self._ask, i) for i in range(self.count)]
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._pool.shutdown()
        for future in self._running:
            future.result()

    def _ask(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._done.is_set():
            began = time.monotonic()
            answer = self.fleet.ask(draw.choice(NAMES), self.tokens)
            self.statuses[answer.status_code] += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def more(self, answers: int) -> None:
        """Returns after so many further answers."""
        wanted = self.statuses.total() + answers
        _until(lambda: self.statuses.total() >= wanted)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    base = write_base(folder / "tiny")
    write_adapters(folder / "adapters", base, NAMES)
    flags = (*tiny_flags(base), "--slots", str(SLOTS), "--threads", "1")
    flags += ("--store", str(folder / "store"), "--adapter-root", str(folder / "adapters"))
    flags += ("--no-parity-probe", "--metrics-open")
    redis, port = RedisServer(folder), free_port()
    with ExitStack() as stack:
        redis.start()
        stack.callback(redis.stop)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("MANYHATS_REDIS_URL", redis.url)
        patch.setenv("MANYHATS_ADMIN_API_KEYS", ADMIN["authorization"].removeprefix("Bearer "))
        # the paths of Ray's sockets must be short
        short = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="mh-", ignore_cleanup_errors=True)
        )
        stack.callback(ray.shutdown)
        ray.init(
            num_cpus=4, include_dashboard=False, _temp_dir=short, object_store_memory=80 << 20,
            log_to_driver=False,
        )  # fmt: skip
        stack.callback(serve.shutdown)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        limits = httpx.Limits(max_connections=None)
        http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=ADMIN, timeout=300, limits=limits
        )
        yield Fleet(folder, base.name, " ".join(flags), stack.enter_context(http))


@pytest.fixture(scope="module")
def two(fleet) -> Fleet:
    """Two replicas that know every adapter, registered through the proxy."""
    fleet.deploy(min_replicas=2, max_replicas=2)
    fleet.replicas(2)
    for name in NAMES:
        body = {"name": name, "path": str(fleet.folder / "adapters" / name)}
        answer = fleet.http.post("/admin/adapters", json=body)
        assert answer.status_code in (200, 201), answer.text
    for _, url in fleet.replicas(2).values():
        _until(lambda url=url: NAMES[-1] in httpx.get(f"{url}/v1/models", headers=ADMIN).text)
    return fleet


def _series(url: str, name: str, **labels: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    wanted = labels.items()
    return sum(s.value for s in samples if s.name == name and wanted <= s.labels.items())


def _loads(fleet: Fleet) -> dict[str, int]:
    """Loads to the device by replica that ``MODELS``, asked in turn, come to."""
    replicas = fleet.replicas(2)

    def now() -> dict[str, int]:
        total = "manyhats_adapter_loads_total"
        return {
            name: int(_series(url, total, tier="device")) for name, (_, url) in replicas.items()
        }

    before = now()
    for model in MODELS:
        answer = fleet.ask(model)
        assert (answer.status_code, answer.headers["x-manyhats-served-by"]) == (200, f"{model}@1")
    return {name: count - before[name] for name, count in now().items()}


def _predicted(replicas: list[str]) -> dict[str, int]:
    """The same of caches of the least recently used, where each request goes to the first."""
    caches = {name: OrderedDict[str, None]() for name in replicas}
    loads = dict.fromkeys(replicas, 0)
    for model in MODELS:
        home = ranking(model, replicas)[0]
        loads[home] += model not in caches[home]
        caches[home][model] = None
        caches[home].move_to_end(model)
        if len(caches[home]) > SLOTS:
            caches[home].popitem(last=False)
    return loads


def test_adapters_stay_where_the_ranking_has_them_and_serves_own_routing_scatters_them(two):
    affine = _loads(two)  # of new replicas: nothing was asked of them before
    assert affine == _predicted(list(affine))
    with Clients(two, 2) as clients:
        clients.more(10)
        # replaces both replicas: a rolling upgrade under load
        two.deploy(min_replicas=2, max_replicas=2, random_routing=True)
        clients.more(10)
    assert set(clients.statuses) == {200}, clients.statuses
    chance = _loads(two)
    logger.info("loads: %s by affinity, %s by chance", affine, chance)
    assert sum(affine.values()) < sum(chance.values())


def test_a_stream_passes_through_as_it_comes_and_a_hang_up_reaches_the_server(two):
    body = {"model": NAMES[0], "prompt": "w7 w8", "max_tokens": 30, "ignore_eos": True}
    body["stream"] = True
    urls = [url for _, url in two.replicas(2).values()]

    def running() -> float:
        return sum(_series(url, "manyhats_running") for url in urls)

    with two.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert len(events) >= 30
    # Sixty-four answers: one alone would be whole before the figure is read.
    body |= {"max_tokens": LONG, "n": 8, "prompt": [body["prompt"]] * 8}
    with two.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: its end would be the hang-up
        first = next(line for line in lines if line)
        assert json.loads(first.removeprefix("data: "))["choices"]
        assert running() >= 1, "the first event came while the server was still generating"
    _until(lambda: running() == 0)


@pytest.mark.parametrize("victim", ["server", "replica"])
def test_what_is_killed_is_replaced_and_no_client_sees_an_error(two, victim):
    before = two.replicas(2)
    with Clients(two, 4) as clients:
        clients.more(20)
        pid, _ = next(iter(before.values()))
        os.kill(pid if victim == "server" else psutil.Process(pid).ppid(), signal.SIGKILL)
        clients.more(20)
        after = two.replicas(2)
        clients.more(20)
    assert len(set(before) & set(after)) == 1, "one is new"
    assert set(clients.statuses) == {200}, clients.statuses
    logger.info("%s killed: %s, longest %.2f s", victim, clients.statuses, clients.longest_s)


def test_load_brings_a_second_replica_and_quiet_takes_it_away(two):
    bounds = {"min_replicas": 1, "max_replicas": 2, "target_requests": 2}
    two.deploy(**bounds, upscale_delay_s=0, downscale_delay_s=2)
    two.replicas(1)
    with Clients(two, 8, tokens=16) as clients:
        two.replicas(2)
        clients.more(10)
    assert set(clients.statuses) == {200}, clients.statuses
    two.replicas(1)
    assert two.ask(NAMES[0]).status_code == 200
