"""What the soak takes for a growth, a pause and a sample. The run itself is half an hour long."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
watch = importlib.import_module("soak_watch")
load = importlib.import_module("soak_load")

METRICS = "".join(f"# HELP {name} x\n{name} {value}.0\n" for value, name in enumerate(watch.GAUGES))


def samples(memory: Callable[[int], float]) -> list[object]:
    return [watch.Sample(10.0 * i, memory(i), memory(i), 30, 9, {}) for i in range(100)]


def test_a_steady_growth_is_its_slope_and_a_warm_up_is_none() -> None:
    growing = watch.trend(samples(lambda i: 1000 + i), "rss_mib")
    assert growing.slope_per_h == pytest.approx(360)
    assert growing.growth == pytest.approx((1089.5 - 1029.5) / 1029.5)
    warm = watch.trend(samples(lambda i: 1000 + min(i, 20)), "rss_mib")
    assert (warm.slope_per_h, warm.growth) == (pytest.approx(0), 0)
    peak = watch.trend(samples(lambda i: 1000 + 500 * (i == 99)), "rss_mib")
    assert peak.growth == 0, "one high sample is no growth"
    with pytest.raises(ValueError, match="4 samples"):
        watch.trend(samples(lambda i: 1.0)[:4], "rss_mib")


def test_a_sample_is_of_the_process_and_has_every_gauge() -> None:
    taken = watch.sample(3.0, os.getpid(), METRICS)
    assert taken.rss_mib >= taken.anon_mib > 1
    assert taken.fds >= 3
    assert taken.gauges == {name: float(value) for value, name in enumerate(watch.GAUGES)}
    assert set(watch.AT_REST) <= set(watch.GAUGES)
    with pytest.raises(KeyError):
        watch.sample(3.0, os.getpid(), "manyhats_running 1\n")


def test_a_pause_of_the_machine_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 102.5, 162.5, 163.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(times))
    clock = watch.RunningClock(longest_s=2.0)
    seen = [clock.tick() for _ in range(4)]
    assert (seen[-1], clock.paused_s) == (3.0, 60.0)


@pytest.mark.parametrize(
    ("model", "served", "right"),
    [
        ("base", "baseline", True),
        ("soak-01", "soak-01@1", True),
        ("soak-churned", "soak-churned@17", True),
        (load.ROLLED, "baseline", True),
        ("soak-01", "baseline", False),
        ("soak-01", "soak-02@1", False),
        ("soak-01", "", False),
        ("base", "soak-01@1", False),
    ],
)
def test_an_answer_by_something_else_is_a_problem(model: str, served: str, right: bool) -> None:
    mix = load.Mix("base", ["soak-01"], 1.0, (1, 2), (1, 3), 100, 0.0)
    traffic = load.Traffic("http://127.0.0.1:1", {}, mix, 0)
    traffic._check_served(model, served)
    assert bool(traffic.tally.problems) is not right
