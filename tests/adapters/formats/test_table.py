"""docs/adapters.md says of every family of PEFT what the importers do."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from support.families import LIMITS, good_adapters

from manyhats.adapters.formats import IMPORTERS, REFUSED_FAMILIES
from manyhats.errors import AdapterRejectedError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "adapters.md"
ROW = re.compile(r"^\| `([A-Z0-9_]+)`([^|]*) \| (\w+) \| (.+) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def rows():
    return [match.groups() for match in ROW.finditer(PAGE.read_text("utf-8"))]


def test_every_family_has_its_row(rows):
    served = {name for name, _, how, _ in rows if how != "refused"}
    refused = {name: why for name, _, how, why in rows if how == "refused"}
    assert served == IMPORTERS.keys() - {"BITFIT"}
    assert refused == REFUSED_FAMILIES
    assert {how for _, _, how, _ in rows} == {"exact", "product", "weight", "refused"}


def test_the_plain_bias_file_is_described():
    assert '"peft_type": "BITFIT"' in PAGE.read_text("utf-8")


@pytest.mark.parametrize("name", sorted(good_adapters()))
def test_only_products_and_weights_are_ever_converted(name, rows):
    """By bounds that no change of a weight is within."""
    good = good_adapters()[name]
    ways = {how for family, _, how, _ in rows if family == good.config["peft_type"]} or {"exact"}
    limits = dataclasses.replace(LIMITS, max_rank=1, max_conversion_error=0.0, max_dense_bytes=0)
    message = ""
    try:
        good.attempt(limits=limits)
    except AdapterRejectedError as error:
        message = error.message
    assert ("max_conversion_error" in message) == (ways != {"exact"})


def test_every_reason_code_is_listed():
    text = PAGE.read_text("utf-8").split("## Reason codes")[1]
    listed = set(re.findall(r"`([a-z_]+)`", text))
    assert listed == set(re.findall(r"``([a-z_]+)``", inspect.getdoc(AdapterRejectedError))) - {
        "reason"
    }
