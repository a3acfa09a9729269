"""The scenarios' shapes, and the command that runs them. Locust itself is in an environment of its
own (`make loadtest`).
"""

from __future__ import annotations

import ast
import importlib
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

LOADTESTS = Path(__file__).resolve().parents[2] / "loadtests"
sys.path[:0] = [str(LOADTESTS), str(LOADTESTS / "locust")]
run_locust = importlib.import_module("run_locust")
shapes = importlib.import_module("shapes")

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def users(profile, run_s: float = 100.0, most: int = 50) -> list[int | None]:
    return [
        shapes.users_at(profile, float(t), run_s, most) for t in (0, 39, 40, 59, 60, 80, 99, 100)
    ]


def test_users_over_a_run() -> None:
    assert users(shapes.steady) == [50] * 7 + [None]
    assert users(shapes.spike) == [5, 5, 50, 50, 5, 5, 5, None]
    assert users(shapes.ramp) == [1, 25, 25, 37, 38, 50, 50, None]
    assert users(shapes.spike, most=3)[0] == 1, "somebody is always there"


def test_every_scenario_has_a_file_that_says_what_it_is() -> None:
    helpers = {"common", "rollouts", "shapes"}
    files = {path.stem: path for path in (LOADTESTS / "locust").glob("*.py")}
    assert set(files) - helpers == set(run_locust.SCENARIOS)
    for name in run_locust.SCENARIOS:
        tree = ast.parse(files[name].read_text("utf-8"))
        assert ast.get_docstring(tree), name
        bases = {ast.unparse(b) for n in tree.body if isinstance(n, ast.ClassDef) for b in n.bases}
        assert {"Shape", "CompletionUser"} <= bases | {
            "CompletionUser" if "Operator" in bases else ""
        }


def test_what_is_given_goes_to_locust_over_the_defaults() -> None:
    made = run_locust.command("spike", ["--host", "http://h", "--users=9"], NOW)
    assert made[made.index("-f") + 1] == str(LOADTESTS / "locust" / "spike.py")
    assert "--headless" in made
    assert "--users" not in made
    assert made[made.index("--run-time") + 1] == "60s"
    report = Path(made[made.index("--html") + 1])
    assert (report.parent.name, report.name) == ("results", "locust-spike-20260102-030405.html")
    assert made[-3:] == ["--host", "http://h", "--users=9"]
    own = run_locust.command("soak", ["--html", "x.html"], NOW)
    assert own.count("--html") == 1


def test_an_unknown_scenario_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_locust.main(["storm"]) == 2
    assert "cold_adapters|noisy_neighbour" in capsys.readouterr().err
