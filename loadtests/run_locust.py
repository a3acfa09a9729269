"""Runs one Locust scenario without its web page and writes an HTML report.

    make loadtest SCENARIO=spike LOADTEST="--host http://127.0.0.1:8000 --users 20 --run-time 2m"
    python loadtests/run_locust.py spike --host http://127.0.0.1:8000 --users 20 --run-time 2m

The first makes an environment for Locust alone; the second needs Locust (``manyhats[loadtest]``).
Whatever follows the scenario's name goes to Locust; ``--help`` there lists the scenarios' options.
Ends with 1 if anything failed that is not a 429.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCENARIOS = (
    "steady",
    "ramp",
    "spike",
    "soak",
    "cold_adapters",
    "noisy_neighbour",
    "rollout",
)


def command(scenario: str, given: Sequence[str], started: datetime) -> list[str]:
    """Locust's command line; the report is named by scenario and time unless ``given`` names it."""
    defaults = []
    for flag, value in (("--users", "8"), ("--run-time", "60s")):
        if not any(word == flag or word.startswith(f"{flag}=") for word in given):
            defaults += [flag, value]
    if not any(word.startswith(("--html", "--help")) for word in given):
        report = HERE / "results" / f"locust-{scenario}-{started:%Y%m%d-%H%M%S}.html"
        defaults += ["--html", str(report)]
    file = HERE / "locust" / f"{scenario}.py"
    # Users get the time that one answer may take to end their last request.
    fixed = ["--headless", "--only-summary", "--stop-timeout", "30"]
    return [sys.executable, "-m", "locust", "-f", str(file), *fixed, *defaults, *given]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the scenario; Locust's exit code."""
    scenario, *given = (sys.argv[1:] if argv is None else argv) or [""]
    if scenario not in SCENARIOS:
        print(f"usage: run_locust.py {'|'.join(SCENARIOS)} [locust's options]", file=sys.stderr)
        return 2
    if importlib.util.find_spec("gevent") is None:
        print("Locust is not installed here: use `make loadtest`", file=sys.stderr)
        return 2
    return subprocess.run(command(scenario, given, datetime.now(UTC)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
