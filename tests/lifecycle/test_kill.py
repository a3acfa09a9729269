"""kill -9 at random moments: a few rounds of ``loadtests/chaos/kill.py``, which has the checks.

``CHAOS_ROUNDS=100`` runs as many as one likes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_what_was_acknowledged_survives_kill_9(repository, store):
    rounds = int(os.environ.get("CHAOS_ROUNDS", "6"))
    command = [sys.executable, str(repository / "loadtests" / "chaos" / "kill.py")]
    command += ["--store", store, "--rounds", str(rounds)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == rounds
    assert told["killed_within_one"], "no operation was ever on its way: it shows little"
    assert told["audit_entries"] > rounds
