"""What clients see while something is broken: a server process (or two), a light load, one fault.

    python loadtests/chaos/faults.py                       # all of them
    python loadtests/chaos/faults.py disk_full corrupt     # some

| scenario | what is done under load |
|---|---|
| disk_full | the registry and the adapters lie on a tmpfs of 6 MiB, which something else fills |
| slow_store | every open of a file of the store takes 300 ms; a web server stops in the middle |
| corrupt | one bit of a version's weights is turned on the disk, then its manifest is cut |
| redis_paused | two servers share a Redis, which stands still |
| killed | of the same two servers one gets SIGKILL amid registrations |

Each ends with the fault gone and a restart: whatever was acknowledged must be there and answer as
before. An answer that is not that of its version, a 500, an error without a code, or anything lost
makes the exit code 1. A line of JSON a phase and group goes to stdout.

disk_full needs Linux' ``unshare`` (as root, or with user namespaces), slow_store a C compiler.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCENARIOS = ("disk_full", "slow_store", "corrupt", "redis_paused", "killed")
INSIDE = "CHAOS_NAMESPACE"


def in_a_namespace(argv: Sequence[str]) -> int:
    """Runs this again where what it mounts is seen by nobody else and goes with it."""
    own = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    command = ["unshare", *own, sys.executable, str(Path(__file__)), *argv]
    return subprocess.run(command, check=False, env=os.environ | {INSIDE: "1"}).returncode


async def run(names: Sequence[str], tiny: Path, work: Path, answers: int) -> list[str]:
    """The scenarios one after the other; what went wrong."""
    import disk_scenarios
    import pair_scenarios
    from place import Place

    wrong = []
    for name in names:
        folder = work / name
        folder.mkdir()
        scenario = getattr(disk_scenarios, name, None) or getattr(pair_scenarios, name)
        told = await scenario(Place(folder, tiny, answers))
        for row in told.rows:
            print(json.dumps({"scenario": name, **row}), flush=True)
        wrong += [f"{name}: {problem}" for problem in told.wrong]
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; default all")
    parser.add_argument("--answers", type=int, default=40, help="waited for, a phase and group")
    args = parser.parse_args(given)
    if unknown := set(args.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    names = args.scenarios or SCENARIOS
    if "disk_full" in names and INSIDE not in os.environ:
        return in_a_namespace(given)
    sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE.parent)]
    from tiny_server import tiny_model

    with tempfile.TemporaryDirectory() as work:
        tiny = tiny_model(Path(work) / "tiny", hidden=64, layers=2)
        wrong = asyncio.run(run(names, tiny, Path(work), args.answers))
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
