"""Values are checked by their bits, all at once; the refusal still names the tensor."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from manyhats.adapters.files import AdapterLimits, parse_weights
from manyhats.adapters.finite import all_finite, finite_bytes
from manyhats.errors import AdapterRejectedError

LIMITS = AdapterLimits()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float_is_judged_as_torch_judges_it(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wrong = [x for x in every if all_finite(x[None]) != bool(x.isfinite())]
    assert wrong == []


@given(st.lists(st.floats(width=32), max_size=40), st.integers(0, 3))
def test_fp32_is_judged_as_python_judges_it_at_any_alignment(values, shift):
    data = bytearray(b"\xff" * shift + struct.pack(f"<{len(values)}f", *values))
    wanted = all(math.isfinite(value) for value in values)
    assert finite_bytes(data, shift, len(data), torch.float32) == wanted
    assert all_finite(torch.tensor(values, dtype=torch.float32)) == wanted


def test_a_view_that_is_turned_around_is_judged_by_its_own_values():
    whole = torch.ones(4, 6)
    whole[3, 5] = torch.inf
    assert all_finite(whole.t()[:5, :4])
    assert not all_finite(whole.t()[5:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["a", "m", "z"])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_a_value_that_is_not_finite_is_refused_by_its_tensor_s_name(value, dtype, name, place):
    """In the first, the middle and the last tensor, beside tensors of the other dtypes."""
    tensors = {key: torch.randn(3, 5).to(dtype) for key in "amz"}
    tensors |= {f"{key}{i}": torch.ones(3, 5).to(d) for key in "az" for i, d in enumerate(DTYPES)}
    tensors[name].view(-1)[place] = value
    weights = parse_weights(save(tensors), LIMITS)
    for key, tensor in tensors.items():
        if key != name:
            assert torch.equal(weights.load(key), tensor)
    for load in (lambda: weights.load(name), lambda: weights.load_alike(["a", "m", "z"])):
        with pytest.raises(AdapterRejectedError, match=f"'{name}' holds NaN or infinite") as caught:
            load()
        assert caught.value.reason == "non_finite"


@pytest.mark.parametrize(
    "names",
    [["a", "c", "e"], ["b", "d"], ["a", "b", "c", "d", "e"], ["a"], ["e", "c"], ["a", "b", "d"]],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_that_are_alike_come_as_one(names, dtype):
    """At even distances, uneven ones, against the file's order."""
    tensors = {name: torch.randn(4, 3).to(dtype) for name in "abcde"}
    whole = parse_weights(save(tensors), LIMITS).load_alike(names)
    assert torch.equal(whole, torch.stack([tensors[name] for name in names]))


def test_even_distances_in_bytes_that_torch_cannot_step_are_copied():
    """A tensor of two bytes between those of four."""
    tensors = {"a": torch.randn(2), "b": torch.ones(1, dtype=torch.float16), "c": torch.randn(2)}
    data, header, at = bytearray(), [], 0
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        dtype = "F32" if tensor.dtype == torch.float32 else "F16"
        header.append(
            f'"{name}":{{"dtype":"{dtype}","shape":[{len(tensor)}],'
            f'"data_offsets":[{at},{at + len(raw)}]}}'
        )
        data += raw
        at += len(raw)
    text = ("{" + ",".join(header) + "}").encode()
    weights = parse_weights(struct.pack("<Q", len(text)) + text + bytes(data), LIMITS)
    assert torch.equal(weights.load_alike(["a", "c"]), torch.stack([tensors["a"], tensors["c"]]))


def test_a_name_that_is_not_there_is_told():
    weights = parse_weights(save({"a": torch.ones(2)}), LIMITS)
    with pytest.raises(AdapterRejectedError, match="missing_tensors"):
        weights.load_alike(["a", "b"])


def test_files_of_one_header_keep_their_own_values():
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    files = [parse_weights(save({"a": tensor}), LIMITS) for tensor in (one, other)]
    assert files[0].tensors is files[1].tensors, "parsed once"
    assert torch.equal(files[0].load("a"), one)
    assert torch.equal(files[1].load("a"), other)
    with pytest.raises(TypeError):
        files[0].tensors["b"] = files[0].tensors["a"]


def test_a_known_header_before_too_few_bytes_is_refused():
    whole = save({"a": torch.ones(2, 3)})
    parse_weights(whole, LIMITS)
    with pytest.raises(AdapterRejectedError, match="truncated"):
        parse_weights(whole[:-1], LIMITS)
    with pytest.raises(AdapterRejectedError, match="over the bound of 0"):
        parse_weights(whole, AdapterLimits(max_tensors=0))


def test_values_that_are_known_to_be_finite_are_not_looked_at():
    data = save({"a": torch.tensor([float("inf"), 1.0])})
    with pytest.raises(AdapterRejectedError, match="NaN or infinite"):
        parse_weights(data, LIMITS).load("a")
    assert parse_weights(data, LIMITS, finite=True).load("a").tolist() == [float("inf"), 1.0]
