"""Mutated files of every family: accepted with finite parts, or refused with a reason code.

A case mutates the configuration (types, values, names, unknown fields), the safetensors header
(names, dtypes, shapes, offsets, duplicates, nesting) or the tensors, and nothing but
AdapterRejectedError comes out.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from support import adapterhub
from support.families import TABLES, Good, good_adapters

from manyhats.adapters.finite import all_finite
from manyhats.engine.model.spec import site_modules
from manyhats.engine.model.weights import LoadedWeights
from manyhats.errors import AdapterRejectedError

CASES = 2000
REASONS = {
    "unsupported_family", "unsupported_feature", "unsupported_site", "no_module_matched",
    "unused_tensors", "missing_tensors", "shape_mismatch", "rank_too_large", "unsupported_dtype",
    "non_finite", "bad_header", "bad_config", "pickle_refused", "too_large",
}  # fmt: skip
WORDS = [
    "q_proj", "down_proj", "lm_head", "embed_tokens", "norm", "self_attn", "all-linear", ".*",
    "(", ".*q_proj", "all", "none", "lora_only", "bat", "mini", "road_4", "LORA", "VERA", "ß", "\0",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.sampled_from([0, 2**31, 2**64, -(2**70), 10**400, 1e300, -0.0, 1e-45])
    | st.floats(allow_nan=True, width=32)
    | st.text(max_size=6)
    | st.sampled_from(WORDS)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=2)
    ),
    max_leaves=4,
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 24, 2**40, -1]), max_size=4)
DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "", None])
NUMBERS = st.sampled_from([0.0, 1e-45, 3e38, -3e38, 1e20, float("nan"), float("inf")])


@st.composite
def configurations(draw: st.DrawFn, good: Good) -> bytes:
    """The good one with fields changed, sometimes broken as text."""
    config = copy.deepcopy(good.config)
    table = TABLES.get(config.get("peft_type"))
    inner = config
    if draw(st.booleans()):  # AdapterHub's methods lie deeper
        inner = config["adapters"][0] if "adapters" in config else config
        inner = inner.get("config", inner)
    known = sorted(inner) + (sorted(table.known) if table is not None else [])
    names = st.sampled_from(known * 4) if draw(st.booleans()) else st.text(max_size=8)
    inner |= draw(st.dictionaries(names, VALUES, max_size=2))
    text = json.dumps(config)
    kind = draw(st.sampled_from(["whole"] * 9 + ["cut", "twice", "deep", "bytes"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))].encode()
    if kind == "twice":
        return text.replace("{", '{"peft_type": "LORA",', 1).encode()
    if kind == "deep":
        return text.replace("{", '{"x": ' + "[" * 400 + "]" * 400 + ",", 1).encode()
    if kind == "bytes":
        data = bytearray(text.encode())
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    return text.encode()


@st.composite
def weights(draw: st.DrawFn, good: Good) -> bytes:
    """The good ones with tensors or the header changed."""
    tensors = dict(good.tensors)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(tensors)))
        mutate_tensor(draw, tensors, name)
        if not tensors:
            break
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    if draw(st.integers(0, 3)):
        return data
    return mutate_header(draw, data)


def mutate_tensor(draw: st.DrawFn, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Dropped, renamed, reshaped, of another dtype, or with an extreme value."""
    kind = draw(st.sampled_from(["drop", "rename", "shape", "dtype", "value", "scale", "swap"]))
    tensor = tensors[name]
    if kind in ("drop", "rename"):
        del tensors[name]
        if kind == "rename":
            tensors[draw(st.text(max_size=12)) or "x"] = tensor
    elif kind == "shape":
        changed = [tensor.flatten(), tensor[None], tensor[:0], tensor.repeat_interleave(2, 0)]
        tensors[name] = draw(st.sampled_from(changed))
    elif kind == "dtype":
        dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int32]))
        tensors[name] = tensor.to(dtype)
    elif kind == "value" and tensor.numel():
        tensor = tensor.float().clone()
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(NUMBERS)
        tensors[name] = tensor
    elif kind == "scale":
        tensors[name] = tensor.float() * draw(NUMBERS)
    else:
        other = draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[other] = tensors[other], tensors[name]


def mutate_header(draw: st.DrawFn, data: bytes) -> bytes:
    """The same bytes under a header that says something else."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    kind = draw(st.sampled_from(["entry", "name", "twice", "length", "flip", "cut", "nest"]))
    text = None
    if names and kind in ("entry", "name", "nest"):
        name = draw(st.sampled_from(names))
        if kind == "entry":
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            header[name][field] = draw({"dtype": DTYPES, "shape": SHAPES}.get(field, VALUES))
        elif kind == "name":
            header[draw(st.text(max_size=600))] = header.pop(name)
        else:
            header[name] = {"a": header[name]}
    elif names and kind == "twice":
        entry = json.dumps({names[0]: header[names[0]]})[1:-1]
        text = ("{" + entry + "," + json.dumps(header)[1:]).encode()
    elif kind == "length":
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    elif kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    elif kind == "flip":
        changed = bytearray(data)
        changed[draw(st.integers(0, min(len(data), length + 16) - 1))] ^= draw(st.integers(1, 255))
        return bytes(changed)
    text = json.dumps(header).encode() if text is None else text
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@cache
def seeds() -> dict[str, Good]:
    """One of every family, and three of AdapterHub's."""
    found = dict(good_adapters())
    for name in ("compacter_shared", "mam", "fuse_pfeiffer"):
        base = adapterhub.bases()["llama"]
        weights = LoadedWeights(site_modules(base.model, base.spec))
        found[f"adapterhub {name}"] = Good(*adapterhub.files_of(name), base.spec, weights)
    return found


@settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_mutated_file_is_accepted_and_finite_or_refused_with_a_reason(data):
    good = seeds()[data.draw(st.sampled_from(sorted(seeds())))]
    side = data.draw(st.sampled_from(["config", "weights", "both"]))
    config = json.dumps(good.config).encode()
    file = save({name: tensor.contiguous() for name, tensor in good.tensors.items()})
    if side != "weights":
        config = data.draw(configurations(good))
    if side != "config":
        file = data.draw(weights(good))
    try:
        compiled = good.compile(config, file)
    except AdapterRejectedError as error:
        event(error.reason)
        assert error.reason in REASONS
        assert len(error.message.encode()) < 4000  # fit to be sent
        return
    event("accepted")
    for name, parts in compiled.sites.items():
        assert name in good.spec.sites
        assert all(t.dtype == torch.int64 or all_finite(t) for t in parts.tensors())


def test_the_good_ones_pass_unmutated():
    for good in seeds().values():
        assert good.attempt().sites
