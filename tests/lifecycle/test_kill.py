"""kill -9 at random moments of registrations and route changes: what was acknowledged is there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.adapter_service import open_adapters, write_adapter

from manyhats.lifecycle.audit import broken_link
from manyhats.types import DEFAULT_TENANT

ROUNDS = 10
CONTENTS = 6

# Drives the service as the admin API does. Says what it is about to do, and the name's whole state
# once it is done.
DRIVER = """
import json, random, sys
from pathlib import Path
from support.adapter_service import open_adapters
from manyhats.errors import ManyhatsError
from manyhats.lifecycle.audit import Cause
from manyhats.types import DEFAULT_TENANT as T

def state(adapters, name):
    entry = adapters.registry.entry(name)
    if entry is None:
        return None
    versions = [[r.ref.version, r.ref.digest, r.state.value] for r in entry.versions]
    return {"versions": versions, "route": entry.route.shown()}

home, seed = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(seed)
with open_adapters(home, max_versions=10**6) as adapters:
    routes, why = adapters.service.rollouts, Cause("driver", f"round {seed}")
    print("open", flush=True)
    while True:
        name = draw.choice("abc")
        entry = adapters.registry.entry(name)
        version = draw.choice(entry.versions).ref.version if entry else 1
        folder = str(adapters.root / str(draw.randrange(CONTENTS)))
        do = draw.choice([
            lambda: adapters.service.register_folder(name, folder, tenant=T),
            lambda: adapters.service.register_folder(name, folder, tenant=T),
            lambda: routes.promote(name, T, why, version),
            lambda: routes.canary(name, T, why, version=version, percent=draw.choice([0, 5, 50])),
            lambda: routes.rollback(name, T, why, draw.choice([None, 0, version])),
            lambda: routes.retire(name, T, why, version, retired=draw.random() < 0.5),
            lambda: adapters.service.delete(f"{name}@{version}", T, force=True),
            lambda: adapters.service.delete(name, T, force=draw.random() < 0.2),
        ])
        print(json.dumps({"begins": name}), flush=True)
        try:
            do()
        except ManyhatsError:
            pass
        print(json.dumps({"name": name, "state": state(adapters, name)}), flush=True)
""".replace("CONTENTS", str(CONTENTS))


def run_and_kill(home: Path, seed: int, operations: int, delay_s: float) -> list[str]:
    """What the driver said until it was killed ``delay_s`` after so many operations."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DRIVER, str(home), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(1 + 2 * operations)]
        threading.Timer(delay_s, process.send_signal, [signal.SIGKILL]).start()
        lines += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    assert lines[0] == "open\n"
    return [line for line in lines[1:] if line.endswith("\n")]


def state(adapters, name):
    entry = adapters.registry.entry(name)
    if entry is None:
        return None
    versions = [[r.ref.version, r.ref.digest, r.state.value] for r in entry.versions]
    return {"versions": versions, "route": entry.route.shown()}


@pytest.mark.timeout(180)
def test_what_was_acknowledged_survives_kill_9(tmp_path):
    draw = random.Random(20)
    for seed in range(CONTENTS):
        write_adapter(tmp_path / "allowed" / str(seed), seed)
    known: dict[str, object] = dict.fromkeys("abc")
    told, interrupted = 0, 0
    for round_ in range(ROUNDS):
        lines = run_and_kill(tmp_path, round_, draw.randrange(1, 25), draw.uniform(0, 0.02))
        said = [json.loads(line) for line in lines]
        known.update((line["name"], line["state"]) for line in said if "name" in line)
        open_ones = {line["begins"] for line in said[-1:] if "begins" in line}
        interrupted += len(open_ones)
        with open_adapters(tmp_path, max_versions=10**6) as again:
            for name in sorted(set("abc") - open_ones):
                assert state(again, name) == known[name], (round_, name)
            # The one on its way happened whole or not at all: the log's last word on it is true.
            for name in open_ones:
                known[name] = state(again, name)
            rollouts = again.service.rollouts
            entries = [e.shown() for e in rollouts.audit(name=None, after=0, limit=10**6)]
            assert broken_link(entries)[1] is None
            for name in "abc":
                last = [e for e in entries if e["name"] == name and "retire" not in e["action"]]
                route = last[-1]["after"].get("route", last[-1]["after"]) if last else {}
                now = state(again, name)
                assert (now["route"] if now else {}) == route, (round_, name)
            assert len(entries) >= told
            told = len(entries)
            kept = {r.ref.digest for r in again.service._registry.list(DEFAULT_TENANT)}
            assert again.store.list() == sorted(kept), "no orphan bytes, none missing"
            assert again.leftovers() == []
            for digest in kept:
                again.store.verify(digest)
    assert told > ROUNDS
    assert interrupted, "no operation was ever on its way: the test shows little"
