"""Two plain applications of residual parts, written apart from each other, say the same."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model
from support.oracle import Oracle
from support.random_parts import random_adapter
from support.sites import describe_plain
from torch import nn

from manyhats.adapters.parts import SiteParts
from manyhats.engine.model.parts_reference import PartsReference
from manyhats.engine.model.stream_reference import with_stream_parts

PROMPT = [3, 41, 15, 9, 126, 5, 35]


@pytest.mark.parametrize(
    "kind", ["parallel", "of_output", "alone", "gated", "stack", "fusion", "two fused"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_reference_is_the_oracle(name, kind):
    model = tiny_model(name)
    spec = describe_plain(model)
    adapter = random_adapter(kind, spec)
    found = PartsReference(model, spec, adapter).logits(PROMPT)
    oracle = Oracle(model, spec)
    wanted = oracle.logits(PROMPT, adapter)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (wanted - oracle.logits(PROMPT, None)).abs().max() > 1e-2
    # and leaves nothing behind
    with torch.no_grad():
        bare = model(input_ids=torch.tensor([PROMPT])).logits[0]
    assert torch.equal(bare, oracle.logits(PROMPT, None))


def test_a_layer_that_is_not_known_is_named():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    with (
        pytest.raises(ValueError, match=r"layer\.after_mlp"),
        with_stream_parts(model, "layer.after_mlp", SiteParts()),
    ):
        raise AssertionError
