"""Plant bugs in the Triton kernels, one at a time, and see that the workloads catch each.

    python tests/ops/mutate.py

Each bug is a patch to the source of one module, loaded from a temporary copy and put in the
module's place; the kernels run in Triton's interpreter, or on the GPU where there is one. A bug
counts as caught when the check of its workload, which passes without it, fails. Prints one line a
bug; exits with 1 when one goes unnoticed or a patch no longer fits the source.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which torch does not do
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.triton_backend import DEVICE, bits, triton_backend

from manyhats_kernels import batch, testing
from manyhats_kernels.reference import ReferenceBackend
from manyhats_kernels.triton import backend, lora, lora_kernels, plan


@dataclass(frozen=True)
class Bug:
    """A patch to a module's source, and the workload that catches it."""

    name: str
    module: ModuleType
    old: str
    new: str
    workload: str


BUGS = (
    Bug(
        "last K column dropped",
        lora_kernels,
        "inside = columns < k_end",
        "inside = (columns < k_end) & (columns < n_in - 1)",
        "last_slot",
    ),
    Bug(
        "ragged tail dropped",
        lora_kernels,
        "range(k_begin, k_end, BLOCK_K)",
        "range(k_begin, k_end - BLOCK_K + 1, BLOCK_K)",
        "last_slot",
    ),
    Bug(
        "ragged tail of the outputs dropped",
        lora_kernels,
        "inside = columns < n_out",
        "inside = columns < n_out // BLOCK_N * BLOCK_N",
        "last_slot",
    ),
    Bug(
        "ragged tail of the ranks dropped",
        lora_kernels,
        "        own = ranks < count\n        shrunk",
        "        own = ranks < count // BLOCK_R * BLOCK_R\n        shrunk",
        "rank_1",
    ),
    Bug(
        "base rows given slot 0",
        batch,
        'host = _int_array(slots, "slots")',
        'host = _int_array(slots, "slots").clip(0)',
        "last_slot",
    ),
    Bug(
        "last slot never computed",
        lora_kernels,
        "if (begin >= end) | ",
        "if (begin >= end) | (tile == tl.num_programs(0) - 1) | ",
        "last_slot",
    ),
    Bug(
        "long segments cut",
        plan,
        "pieces = -(-(edges[:, 2] - edges[:, 1]) // tokens)",
        "pieces = np.minimum(-(-(edges[:, 2] - edges[:, 1]) // tokens), 2)",
        "long_segment",
    ),
    Bug(
        "16-bit accumulation",
        lora_kernels,
        "sums = tl.dot(x_part, a_part, sums, input_precision=PRECISION)",
        "sums = tl.dot(x_part, a_part, sums, input_precision=PRECISION)"
        ".to(tl.float16).to(tl.float32)",
        "last_slot",
    ),
    Bug(
        "scale applied twice",
        lora_kernels,
        "tl.dot(shrunk, b_part.to(tl.float32), sums",
        "tl.dot(shrunk, 2.0 * b_part.to(tl.float32), sums",
        "last_slot",
    ),
    Bug(
        "another slot's rows read",
        lora_kernels,
        "start = tl.load(start_of + slot)",
        "start = tl.load(start_of + tl.maximum(slot - 1, 0))",
        "last_slot",
    ),
    Bug(
        "a part of the sum left out",
        lora_kernels,
        "tl.static_range(SPLIT_K)",
        "tl.static_range(SPLIT_K // 2)",
        "last_slot",
    ),
    Bug(
        "the output overwritten, not added to",
        lora_kernels,
        "sums = tl.load(y_tile, mask=shown, other=0.0).to(tl.float32)",
        "sums = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)",
        "last_slot",
    ),
)


def check(workload: str) -> None:
    """AssertionError unless lora_add computes the workload: fp32, 37 -> 70, ragged in every way."""
    case = testing.lora_case(testing.WORKLOADS[workload](), 37, 70, torch.float32, device=DEVICE)
    (_, y), (_, expected) = case.fresh_y(), case.fresh_y()
    triton_backend().lora_add(y, case.x, case.a, case.b, case.rows, case.batch)
    slots = testing.WORKLOADS[workload]().slots
    sound = batch.AdapterBatch.build(slots, case.batch.num_slots, DEVICE)
    ReferenceBackend().lora_add(expected, case.x, case.a, case.b, case.rows, sound)
    testing.assert_close(y, expected)
    base = sound.slots == -1
    if not torch.equal(bits(y[base]), bits(case.y[base])):
        raise AssertionError("a token of the base changed")


def mutated(bug: Bug, folder: Path) -> ModuleType:
    """The module with the bug in it, loaded from a copy."""
    source = Path(str(bug.module.__file__)).read_text("utf-8")
    if source.count(bug.old) != 1:
        raise LookupError(f"{bug.name}: {bug.old!r} is {source.count(bug.old)} times in the source")
    name = f"mutant_{bug.module.__name__.rpartition('.')[2]}"
    path = folder / f"{name}_{BUGS.index(bug)}.py"
    path.write_text(source.replace(bug.old, bug.new), "utf-8")
    spec = util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LookupError(f"{path} cannot be loaded")
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def planted(bug: Bug, folder: Path) -> Iterator[None]:
    """The bug, where the module's users find it."""
    module = mutated(bug, folder)
    users = {
        lora_kernels: (lora, "lora_kernels", module),
        plan: (backend, "token_tiles", getattr(module, "token_tiles", None)),
        batch: (testing, "AdapterBatch", getattr(module, "AdapterBatch", None)),
    }
    user, name, value = users[bug.module]
    sound = getattr(user, name)
    setattr(user, name, value)
    try:
        yield
    finally:
        setattr(user, name, sound)


def main() -> int:
    """Check without a bug, then with each."""
    for workload in sorted({bug.workload for bug in BUGS}):
        check(workload)
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        for bug in BUGS:
            with planted(bug, Path(folder)):
                try:
                    check(bug.workload)
                except AssertionError as error:
                    print(f"caught: {bug.name} by {bug.workload}: {error}")
                else:
                    unnoticed += 1
                    print(f"UNNOTICED: {bug.name} by {bug.workload}")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
