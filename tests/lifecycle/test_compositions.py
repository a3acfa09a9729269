"""Compositions: names to versions, one digest for one content, and registered like adapters."""

from __future__ import annotations

import hashlib

import pytest
from support.adapter_service import BASE_ID, open_adapters, write_adapter

from manyhats.errors import (
    AdapterRejectedError,
    ConflictError,
    ModelNotFoundError,
    RequestError,
)
from manyhats.lifecycle.compositions import (
    BASE_DIGEST,
    NamedComposition,
    composed,
    resolve_composition,
    shown,
)
from manyhats.types import DEFAULT_TENANT, AdapterRef, CompositionKind, Digest, TenantId

A, B = (AdapterRef(name, v, Digest(digit * 64), n) for name, v, digit, n in (
    ("a", 1, "f", 2), ("b", 3, "0", 1),
))  # fmt: skip
STACK, WEIGHTED = CompositionKind.STACK, CompositionKind.WEIGHTED
ENSEMBLE = CompositionKind.ENSEMBLE
BASE = AdapterRef(BASE_ID, 0, BASE_DIGEST)
NESTED = composed(ENSEMBLE, [composed(STACK, [A, B], ()), BASE, A], ())


@pytest.fixture
def adapters(tmp_path):
    with open_adapters(tmp_path / "home") as adapters:
        for seed, name in enumerate("abc"):
            folder = write_adapter(adapters.root / name, seed)
            adapters.service.register_folder(name, str(folder), tenant=DEFAULT_TENANT)
        yield adapters


def register(adapters, name, kind, *names, weights=(), tenant=DEFAULT_TENANT):
    wanted = NamedComposition(kind, names, weights)
    return adapters.service.register_composition(name, wanted, tenant=tenant)


def test_what_a_composition_is_called_and_its_digest():
    stack = composed(STACK, [A, B], ())
    assert (str(stack), stack.label, stack.virtual_tokens) == ("stack(a@1,b@3)", "(stack)", 3)
    text = '{"stack":["' + "f" * 64 + '","' + "0" * 64 + '"]}'
    assert stack.digest == hashlib.sha256(text.encode()).hexdigest()
    assert composed(STACK, [B, A], ()).digest != stack.digest
    weighted = composed(WEIGHTED, [A, B], [0.7, 3])
    assert str(weighted) == "weighted(a@1:0.7,b@3:3)"
    text = '{"weighted":[["' + "0" * 64 + '",3.0],["' + "f" * 64 + '",0.7]]}'
    assert weighted.digest == hashlib.sha256(text.encode()).hexdigest()
    turned = composed(WEIGHTED, [B, A], [3.0, 0.7])
    assert (turned.digest, turned.composition) == (weighted.digest, weighted.composition)
    assert composed(WEIGHTED, [A, B], [0.3, 0.7]).digest != weighted.digest
    renamed = AdapterRef("other", 9, A.digest, 2)
    assert composed(STACK, [renamed, B], ()).digest == stack.digest


def test_an_ensemble_has_a_lane_a_member():
    assert str(NESTED) == f"ensemble(stack(a@1,b@3),{BASE_ID},a@1)"
    assert NESTED.virtual_tokens == 3, "the most that one lane has"
    assert NESTED.lanes[0] is None, "in the order of the digests"
    assert set(NESTED.lanes[1:]) == {A, composed(STACK, [A, B], ())}
    assert composed(ENSEMBLE, [A, B], ()).digest == composed(ENSEMBLE, [B, A], ()).digest
    assert composed(ENSEMBLE, [A, B], [1, 1]).digest != composed(ENSEMBLE, [A, B], [2, 1]).digest
    stack = composed(STACK, [A, B], ())
    assert stack.lanes == (stack,)


def test_names_are_resolved_for_the_tenant(adapters):
    def ask(*names, tenant=DEFAULT_TENANT):
        def resolve(name):
            return adapters.service.resolve(name, tenant)

        return resolve_composition(NamedComposition(STACK, names), resolve, "adapter")

    assert str(ask("b", "a@1")) == "stack(b@1,a@1)"
    with pytest.raises(ModelNotFoundError, match=r"adapter.stack\[1\]: no model .*'x'") as caught:
        ask("a", "x")
    assert caught.value.param == "adapter.stack[1]"
    with pytest.raises(ModelNotFoundError):
        ask("a", "b", tenant=TenantId("another"))
    with pytest.raises(RequestError, match=r"stack\[1\]: a@1 is named twice"):
        ask("a", "a@1")
    with pytest.raises(RequestError, match=r"'tiny-base' is the base model"):
        ask(BASE_ID, "a")


def test_a_registered_composition_is_a_version_like_any(adapters):
    card = register(adapters, "mix", WEIGHTED, "a", "b@1", weights=(0.7, 0.3))
    assert (str(card.ref), card.family, card.max_rank) == ("mix@1", "weighted", 4)
    service = adapters.service
    assert service.resolve("mix", DEFAULT_TENANT) == card.ref
    assert card.ref.label == "mix"
    assert shown(card.ref.composition) == {
        "weighted": {
            str(m): w
            for m, w in zip(card.ref.composition.members, card.ref.composition.weights, strict=True)
        }
    }
    assert register(adapters, "mix", WEIGHTED, "b", "a", weights=(0.3, 0.7)) == card
    assert register(adapters, "mix", STACK, "a", "b").ref.version == 2
    assert [r.source for r in service.entry("mix", DEFAULT_TENANT).versions] == [
        "weighted(a@1:0.7,b@1:0.3)",
        "stack(a@1,b@1)",
    ]
    with pytest.raises(RequestError, match="mix@2 is a composition itself"):
        register(adapters, "more", STACK, "mix", "c")
    with pytest.raises(ConflictError):
        register(adapters, BASE_ID, STACK, "a", "b")
    with pytest.raises(ModelNotFoundError) as caught:
        register(adapters, "more", STACK, "a", "x")
    assert caught.value.param == "composition.stack[1]"


def test_a_registered_ensemble_holds_its_members(adapters):
    register(adapters, "mix", STACK, "a", "b")
    card = register(adapters, "team", ENSEMBLE, "mix", "c", BASE_ID, weights=(2.0, 1.0, 1.0))
    assert (str(card.ref), card.family, card.max_rank) == ("team@1", "ensemble", 4)
    service = adapters.service
    assert service.resolve("team", DEFAULT_TENANT) == card.ref
    assert {str(m) for m in card.ref.composition.members} == {"mix@1", "c@1", BASE_ID}
    for name in ("mix", "c"):
        with pytest.raises(ConflictError, match="team@1"):
            service.delete(name, DEFAULT_TENANT)
    for kind in (STACK, ENSEMBLE):
        with pytest.raises(RequestError, match=r"team@1 is an? .* itself"):
            register(adapters, "more", kind, "team", "a")
    assert register(adapters, "lone", ENSEMBLE, BASE_ID).max_rank == 0
    service.delete("team", DEFAULT_TENANT)
    service.delete("mix", DEFAULT_TENANT)
    again = register(adapters, "team", ENSEMBLE, "a", "c").ref
    assert again.version == 2


def test_members_are_pinned(adapters):
    card = register(adapters, "mix", STACK, "a", "b")
    write_adapter(adapters.root / "a", seed=9)
    newer = adapters.service.register_folder("a", str(adapters.root / "a"), tenant=DEFAULT_TENANT)
    assert newer.ref.version == 2
    mix = adapters.service.resolve("mix", DEFAULT_TENANT)
    assert mix == card.ref
    assert [str(m) for m in mix.composition.members] == ["a@1", "b@1"]


def test_a_member_cannot_be_deleted_before_its_compositions(adapters):
    register(adapters, "mix", STACK, "a", "b")
    with pytest.raises(ConflictError, match=r"'a' is a member of 1 .*: mix@1; delete") as caught:
        adapters.service.delete("a", DEFAULT_TENANT)
    assert caught.value.status == 409
    assert adapters.service.resolve("a", DEFAULT_TENANT).version == 1
    adapters.service.delete("c", DEFAULT_TENANT)
    [ref] = adapters.service.delete("mix", DEFAULT_TENANT)
    assert ref.composition is not None
    assert adapters.residency.dropped[-1] == ref
    adapters.service.delete("a", DEFAULT_TENANT)
    back = register(adapters, "mix", STACK, "b")
    assert back.ref.version == 2, "the counter stays"


def test_one_that_was_dropped_is_fetched_again(adapters):
    ref = register(adapters, "mix", STACK, "a", "b").ref
    adapters.service.delete("mix", DEFAULT_TENANT)
    again = register(adapters, "other", STACK, "a", "b").ref
    assert again.digest == ref.digest
    assert adapters.residency.prefetched == [again]


def test_a_bad_composition_is_not_registered(adapters):
    with pytest.raises(AdapterRejectedError, match=r"rank 10 .* the bound is 8"):
        for seed, name in ((11, "d"), (12, "e")):
            folder = write_adapter(adapters.root / name, seed, rank=5)
            adapters.service.register_folder(name, str(folder), tenant=DEFAULT_TENANT)
        register(adapters, "mix", STACK, "d", "e")
    with pytest.raises(ModelNotFoundError):
        adapters.service.resolve("mix", DEFAULT_TENANT)


def test_compositions_survive_a_restart(tmp_path, adapters):
    card = register(adapters, "mix", WEIGHTED, "a", "b", weights=(0.7, 0.3))
    adapters.registry.close()
    adapters.store.close()
    with open_adapters(adapters.home) as again:
        assert again.service.get("mix", DEFAULT_TENANT) == card
        assert len(again.store.list()) == 3, "nothing of the store was taken for an orphan"
