"""A disk that is full, one that is slow, and bytes that have changed on it, under a light load: a
short run of ``loadtests/chaos/faults.py``, which has the checks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest

pytestmark = pytest.mark.e2e

OWN = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
MAY_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        ["unshare", *OWN, "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        check=False,
    ).returncode
    == 0
)


def seen(repository, *arguments: str) -> dict[tuple[str, str], Counter[str]]:
    """What each group of clients saw in each phase; the script has found nothing wrong."""
    command = [sys.executable, str(repository / "loadtests" / "chaos" / "faults.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["phase"], row["group"]): Counter(row["outcomes"]) for row in rows}


@pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a tmpfs")
def test_a_full_disk_refuses_changes_and_serves_on(repository):
    told = seen(repository, "disk_full", "--answers", "3")
    assert set(told["disk full", "registrations"]) == {"503 service_unavailable"}
    for group in ("base", "adapters"):
        assert set(told["disk full", group]) == {"200"}
    assert told["disk full", "/readyz"] == {"200": 1}
    assert set(told["room again", "registrations"]) == {"201"}
    assert set(told["after kill -9 and a start", "all that was acknowledged"]) == {"200"}


def test_damaged_bytes_are_never_worn(repository):
    told = seen(repository, "corrupt", "--answers", "3")
    for phase in ("one bit turned", "manifest cut"):
        assert set(told[phase, "damaged adapter"]) == {"503 adapter_load_failed"}
        assert set(told[phase, "other adapters"]) == {"200"}
    assert set(told["rolled back", "damaged adapter"]) >= {"200"}
    assert set(told["afterwards", "all that was acknowledged"]) == {"200"}
