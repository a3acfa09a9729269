"""The safetensors header: what is taken the library reads alike, the rest has a reason."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.files import AdapterLimits, parse_weights
from manyhats.errors import AdapterRejectedError

LIMITS = AdapterLimits(max_header_bytes=4096, max_tensors=8, max_bytes=2**16)


def build(header: Any, body: bytes = b"", *, length: int | None = None, pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(begin: int = 0, end: int = 24, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]} | changes


def refused(data: bytes, limits: AdapterLimits = LIMITS) -> AdapterRejectedError:
    with pytest.raises(AdapterRejectedError) as caught:
        weights = parse_weights(data, limits)
        for name in weights.tensors:
            weights.load(name)
    assert len(str(caught.value)) < 1000
    return caught.value


GOOD = build({"a": entry(), "__metadata__": {"format": "pt"}}, struct.pack("<6f", *range(6)))


def test_a_good_file_is_read():
    weights = parse_weights(GOOD, LIMITS)
    assert list(weights.tensors) == ["a"]
    assert weights.metadata == {"format": "pt"}
    assert weights.nbytes == len(GOOD)
    assert torch.equal(weights.load("a"), torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_the_library_writes_is_read_alike(dtype):
    torch.manual_seed(0)
    tensors = {
        "m": torch.randn(3, 5).to(dtype),
        "v": torch.randn(7).to(dtype),
        "r": torch.randn(1, 9).to(dtype),
    }
    weights = parse_weights(safetensors.torch.save(tensors), LIMITS)
    assert weights.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert weights.tensors[name].shape == tuple(tensor.shape)
        assert weights.tensors[name].dtype == dtype
        assert torch.equal(weights.load(name), tensor)


@pytest.mark.parametrize("pad", range(8))
def test_tensors_need_no_alignment(pad):
    data = build({"a": entry()}, struct.pack("<6f", *range(6)), pad=pad)
    assert torch.equal(parse_weights(data, LIMITS).load("a"), torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("length", [0x80, 0x180, 0x4B50 % 4096 | 0x50])
def test_a_header_whose_length_looks_like_a_pickle_is_a_header(length):
    """The first byte is the length's lowest: 0x80 opens a pickle and 128 bytes of header."""
    text = json.dumps({"a": entry()}).encode()
    data = build(text, struct.pack("<6f", *range(6)), pad=length - len(text))
    assert parse_weights(data, LIMITS).load("a").shape == (2, 3)


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))
    return file.getvalue()


def _torch_save(**how: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(300)}, file, **how)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"a": 1}),
        pickle.dumps([1] * 100, protocol=2),
        _zip(),
        _torch_save(),
        _torch_save(_use_new_zipfile_serialization=False),
        b"\x80",
        b"PK",
    ],
)
def test_pickles_are_refused_as_such(data):
    assert refused(data).reason == "pickle_refused"


@pytest.mark.parametrize("cut", [*range(9), 20, len(GOOD) - 24, len(GOOD) - 1])
def test_a_truncated_file_is_refused(cut):
    assert refused(GOOD[:cut]).reason == "bad_header"


E = struct.pack("<6f", *range(6))
BAD: dict[str, bytes] = {
    "garbage": b"\xde\xad\xbe\xef" * 20,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "length over the file": build({"a": entry()}, E, length=10**6),
    "length of 2**64 - 1": build({"a": entry()}, E, length=2**64 - 1),
    "length over the bound": build({"a": entry()}, E, pad=5000),
    "length too short": build({"a": entry()}, E, length=10),
    "not utf-8": build(b'{"\xff": 1}', E),
    "not json": build(b"{a: 1}", E),
    "an array": build(b"[1]", E),
    "leading space": build(b' {"a": 1}', E),
    "nan": build(b'{"a": NaN}', E),
    "overflowing float": build(b'{"a": 1e999}', E),
    "huge integer": build(b'{"a": ' + b"9" * 4000 + b"}", E),
    "deep": build(b'{"a": ' + b"[" * 1500 + b"]" * 1500 + b"}", E),
    "lone surrogate": build(b'{"\\ud800": {}}', E),
    "duplicate name": build(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), E),
    "duplicate field": build(
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}', E
    ),
    "metadata no object": build({"a": entry(), "__metadata__": []}, E),
    "metadata of numbers": build({"a": entry(), "__metadata__": {"n": 1}}, E),
    "entry no object": build({"a": 3}, E),
    "field missing": build({"a": {"dtype": "F32", "shape": [2, 3]}}, E),
    "field too many": build({"a": entry(extra=1)}, E),
    "empty name": build({"": entry()}, E),
    "long name": build({"x" * 600: entry()}, E),
    "dtype no string": build({"a": entry(dtype=4)}, E),
    "shape no list": build({"a": entry(shape=6)}, E),
    "shape of floats": build({"a": entry(shape=[2.0, 3])}, E),
    "shape of booleans": build({"a": entry(shape=[True, 6])}, E),
    "negative shape": build({"a": entry(shape=[-2, -3])}, E),
    "shape wraps 64 bits": build({"a": entry(shape=[2**62, 2**62])}, E),
    "shape over 64 bits": build({"a": entry(shape=[2**64, 3])}, E),
    "three offsets": build({"a": entry(data_offsets=[0, 24, 24])}, E),
    "one offset": build({"a": entry(data_offsets=[24])}, E),
    "offsets reversed": build({"a": entry(24, 0)}, E),
    "offsets beyond the file": build({"a": entry(24, 48)}, E),
    "too few bytes": build({"a": entry(0, 20)}, E[:20]),
    "too many bytes": build({"a": entry(0, 24, shape=[5])}, E),
    "gap before": build({"a": entry(4, 28)}, b"\0" * 4 + E),
    "gap between": build({"a": entry(), "b": entry(28, 52)}, E + b"\0" * 4 + E),
    "overlap": build({"a": entry(), "b": entry(12, 36)}, E + E[:12]),
    "same bytes twice": build({"a": entry(), "b": entry()}, E),
    "bytes of no tensor": build({"a": entry()}, E + b"\0"),
}  # fmt: skip


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_a_bad_header_is_refused(data):
    assert refused(data).reason == "bad_header"


@pytest.mark.parametrize(
    "dtype", ["F64", "I8", "I64", "U8", "BOOL", "F8_E4M3", "f32", "", "X" * 500]
)
def test_other_dtypes_are_refused_by_name(dtype):
    error = refused(build({"a": entry(dtype=dtype)}, E))
    assert error.reason == "unsupported_dtype"
    assert dtype[:50] in error.message


@pytest.mark.parametrize("shape", [[], [1, 2, 3, 1], [0, 1, 1, 3]], ids=str)
def test_shapes_of_no_or_over_three_dimensions_are_refused(shape):
    size = 4 * math.prod(shape)
    assert (
        refused(build({"a": entry(0, size, shape=shape)}, b"\0" * size)).reason == "shape_mismatch"
    )


@pytest.mark.parametrize("shape", [[0], [0, 3], [2, 0], [1, 2, 3]], ids=str)
def test_tensors_without_values_and_of_three_dimensions_are_read(shape):
    size = 4 * math.prod(shape)
    weights = parse_weights(build({"a": entry(0, size, shape=shape)}, b"\0" * size), LIMITS)
    assert torch.equal(weights.load("a"), torch.zeros(shape))


def test_more_tensors_or_bytes_than_the_bound_are_refused():
    def many(count: int) -> bytes:
        return build({f"t{i}": entry(24 * i, 24 * i + 24) for i in range(count)}, E * count)

    assert len(parse_weights(many(8), LIMITS).tensors) == 8
    error = refused(many(9))
    assert error.reason == "too_large"
    assert "8" in error.message
    assert refused(GOOD, AdapterLimits(max_bytes=len(GOOD) - 1)).reason == "too_large"
    parse_weights(GOOD, AdapterLimits(max_bytes=len(GOOD)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_when_loaded(value):
    error = refused(build({"a": entry()}, struct.pack("<6f", 0, 1, 2, 3, 4, value)))
    assert error.reason == "non_finite"
    assert "'a'" in error.message


def test_a_tensor_that_is_not_there_has_a_reason():
    with pytest.raises(AdapterRejectedError) as caught:
        parse_weights(GOOD, LIMITS).load("b")
    assert caught.value.reason == "missing_tensors"


def check_like_the_library(data: bytes) -> None:
    """What we take the library takes too, with equal tensors; what we refuse has a reason."""
    try:
        weights = parse_weights(data, LIMITS)
        found = {name: weights.load(name) for name in weights.tensors}
    except AdapterRejectedError as error:
        assert error.reason
        error.message.encode()
        return
    wanted = safetensors.torch.load(data)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name])


MANY = safetensors.torch.save(
    {
        "x": torch.arange(12.0).reshape(3, 4),
        "y": torch.ones(4, dtype=torch.float16),
        "z": torch.ones(1, 2),
    }
)
TOKENS = [
    b"0",
    b"-1",
    b"8",
    b"9" * 20,
    b"null",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b"F16",
    b"F64",
    b"NaN",
    b"x",
    b"\\u0000",
]


@settings(max_examples=200, deadline=None)
@given(
    at=st.integers(0, len(MANY)),
    cut=st.integers(0, 6),
    put=st.binary(max_size=4) | st.sampled_from(TOKENS),
)
def test_any_damage_is_refused_or_harmless(at, cut, put):
    check_like_the_library(MANY[:at] + put + MANY[at + cut :])


@settings(max_examples=200, deadline=None)
@given(at=st.integers(8, 260), cut=st.integers(0, 6), put=st.sampled_from(TOKENS))
def test_damage_under_a_length_that_fits_is_refused_or_harmless(at, cut, put):
    size = struct.unpack("<Q", MANY[:8])[0]
    text, body = MANY[8 : 8 + size], MANY[8 + size :]
    check_like_the_library(build(text[: at - 8] + put + text[at - 8 + cut :], body))


names = st.sampled_from(["a", "b", "__metadata__", "", "c.d"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 30) | st.floats()
    | st.sampled_from(["F32", "F16", "I8", "pt"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "format"]), inner, max_size=3
    ),
    max_leaves=8,
)  # fmt: skip
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64"]),
        "shape": st.lists(st.integers(0, 4), max_size=3),
        "data_offsets": st.tuples(st.integers(0, 24), st.integers(0, 48)).map(list),
    }
)


@settings(max_examples=200, deadline=None)
@given(header=st.dictionaries(names, values | entries, max_size=3), body=st.binary(max_size=48))
def test_any_header_is_refused_or_read_as_the_library_reads_it(header, body):
    check_like_the_library(build(header, body))
