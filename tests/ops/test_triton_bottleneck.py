"""The Triton backend's bottleneck_add against PyTorch's own functions in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.triton_backend import DEVICE, bits, triton_backend
from torch.nn import functional

from manyhats_kernels.testing import WORKLOADS, LoraCase, Workload, assert_close, lora_case
from manyhats_kernels.triton.backend import ACTIVATIONS

FUNCTIONS = {
    "linear": lambda v: v,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda v: functional.gelu(v, approximate="tanh"),
    "swish": functional.silu,
    "tanh": torch.tanh,
    "leakyrelu": functional.leaky_relu,
}


@dataclass
class Case:
    """A lora_case with what a bottleneck has besides; NaN where no worn slot owns anything."""

    base: LoraCase
    activations: torch.Tensor
    inner_bias: torch.Tensor | None
    outer_bias: torch.Tensor | None

    def run(self) -> torch.Tensor:
        case, (_, y) = self.base, self.base.fresh_y()
        triton_backend().bottleneck_add(
            y,
            case.x,
            case.a,
            case.b,
            case.rows,
            self.activations,
            case.batch,
            inner_bias=self.inner_bias,
            outer_bias=self.outer_bias,
        )
        return y

    def expected(self) -> torch.Tensor:
        case, out = self.base, self.base.y.double().clone()
        for token, slot in enumerate(case.batch.slots.tolist()):
            if slot < 0 or not case.rows.count[slot]:
                continue
            start, count = int(case.rows.start[slot]), int(case.rows.count[slot])
            run = slice(start, start + count)
            inner = case.a[run].double() @ case.x[token].double()
            if self.inner_bias is not None:
                inner += self.inner_bias[run].double()
            inner = FUNCTIONS[ACTIVATIONS[int(self.activations[slot])]](inner)
            out[token] += inner @ case.b[run].double()
            if self.outer_bias is not None:
                out[token] += self.outer_bias[slot].double()
        return out


def bottleneck_case(
    workload: Workload, dtype: torch.dtype, codes: list[int], biases: str = "inner outer"
) -> Case:
    case = lora_case(workload, 33, 70, dtype, device=DEVICE)
    random = torch.Generator().manual_seed(5)
    worn = list(case.batch.worn)
    inner = torch.randn(case.a.shape[0], generator=random).to(DEVICE, dtype)
    inner[case.a[:, 0].isnan()] = float("nan")
    outer = torch.full((len(workload.counts), 70), float("nan"), device=DEVICE, dtype=dtype)
    outer[worn] = torch.randn(len(worn), 70, generator=random).to(DEVICE, dtype)
    return Case(
        case,
        torch.tensor(codes, dtype=torch.int32, device=DEVICE),
        inner if "inner" in biases else None,
        outer if "outer" in biases else None,
    )


def every_activation() -> Workload:
    tokens = [s for s in range(len(ACTIVATIONS)) for _ in range(2)]
    return Workload((*tokens, -1), tuple(range(15, 15 + len(ACTIVATIONS))))


def test_every_activation_is_known():
    assert set(ACTIVATIONS) == set(FUNCTIONS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_activation_in_one_batch(dtype):
    case = bottleneck_case(every_activation(), dtype, list(range(len(ACTIVATIONS))))
    y = case.run()
    assert_close(y, case.expected())
    assert torch.equal(bits(y[-1]), bits(case.base.y[-1]))


@pytest.mark.parametrize("biases", ["", "inner", "outer"])
def test_each_bias_may_be_missing(biases):
    case = bottleneck_case(WORKLOADS["last_slot"](), torch.float32, [2, 0, 0, 0, 3], biases)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("name", ["empty_segment", "long_segment", "ranks_mixed"])
def test_workloads(name):
    workload = WORKLOADS[name]()
    case = bottleneck_case(workload, torch.float32, [s % 7 for s in range(len(workload.counts))])
    y = case.run()
    assert_close(y, case.expected())
    slots = case.base.batch.slots.tolist()
    idle = [t for t, s in enumerate(slots) if s < 0 or not workload.counts[s]]
    assert torch.equal(bits(y[idle]), bits(case.base.y[idle])), "an idle token changed"


def test_large_values_do_not_overflow():
    case = bottleneck_case(every_activation(), torch.float32, list(range(len(ACTIVATIONS))))
    case.base.a.mul_(200.0)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": torch.zeros(3)}, "activations must be int32"),
        ({"activations": torch.zeros(2, dtype=torch.int32)}, "activations must be int32"),
        ({"inner_bias": torch.zeros(3)}, "inner_bias must be contiguous"),
        ({"outer_bias": torch.zeros(3, 69)}, "outer_bias must be contiguous"),
        ({"outer_bias": torch.zeros(3, 70).half()}, "outer_bias must be of y's"),
    ],
    ids=["type", "slots", "rows", "width", "dtype"],
)
def test_what_does_not_fit_is_refused(change, message):
    case = bottleneck_case(Workload((0, 1, 2), (4, 4, 4)), torch.float32, [1, 1, 1])
    for name, value in change.items():
        setattr(case, name, value.to(DEVICE))
    with pytest.raises(ValueError, match=message):
        case.run()
