"""What is another tenant's does not exist: not listed, not usable, and no word tells of it."""

from __future__ import annotations

from functools import partial

import pytest
from support.adapter_service import BASE_ID, open_adapters, write_adapter

from manyhats.errors import ConflictError, ModelNotFoundError, NotFoundError, PermissionDeniedError
from manyhats.lifecycle.audit import Cause
from manyhats.lifecycle.compositions import NamedComposition, resolve_composition
from manyhats.scheduler.blocks import BlockManager
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.model import Grant, Quotas, Tenant, Visibility
from manyhats.tenancy.store_sqlite import SqliteTenantStore
from manyhats.types import DEFAULT_TENANT, CompositionKind, SamplingParams, Sequence, TenantId

A, B, C = TenantId("a"), TenantId("b"), TenantId("c")


@pytest.fixture
def tenants():
    directory = TenantDirectory(SqliteTenantStore(":memory:"))
    for tenant in (A, B, C):
        directory.create(Tenant(id=tenant))
    return directory


@pytest.fixture
def adapters(tmp_path, tenants):
    with open_adapters(tmp_path / "home", access=tenants) as adapters:
        yield adapters


def register(adapters, name, tenant, seed=0):
    folder = write_adapter(adapters.root / f"{name}-{seed}", seed)
    return adapters.service.register_folder(name, str(folder), tenant=tenant)


def grant(tenants, visibility, *shared_with, name="secret", owner=A):
    tenants.share(
        Grant(name=name, owner=owner, visibility=visibility, shared_with=tuple(shared_with))
    )


def refusal(call, name, tenant):
    with pytest.raises(ModelNotFoundError) as caught:
        call(name, tenant)
    return caught.value.message


def names(adapters, tenant):
    return [str(card.ref) for card in adapters.service.list(tenant)]


def test_a_private_adapter_is_as_one_that_does_not_exist(adapters):
    """The same words but for the name, whatever is asked."""
    service = adapters.service
    register(adapters, "secret", A)
    register(adapters, "secret", A, seed=1)
    assert names(adapters, A) == ["secret@1", "secret@2"]
    for tenant in (B, DEFAULT_TENANT):
        assert names(adapters, tenant) == []
        for call in (service.resolve, service.get, service.visible, service.entry):
            for form in ("{}", "{}@1", "{}@7", "{}t"):
                there = refusal(call, form.format("secret"), tenant)
                absent = refusal(call, form.format("public"), tenant)
                assert there.replace("secret", "public") == absent
        refusal(service.delete, "secret", tenant)
    assert names(adapters, A) == ["secret@1", "secret@2"]


def test_near_names_are_those_that_the_caller_may_use(adapters, tenants):
    register(adapters, "secret-one", A)
    register(adapters, "secret-two", B)
    assert "near names: secret-two" in refusal(adapters.service.resolve, "secret-tw", B)
    assert "secret-one" not in refusal(adapters.service.resolve, "secret-on", B)
    grant(tenants, Visibility.PUBLIC, name="secret-one")
    assert "secret-one" in refusal(adapters.service.resolve, "secret-on", B)
    tenants.forget("secret-one")
    assert "secret-one" not in refusal(adapters.service.resolve, "secret-on", B)


def test_shared_with_the_named_ones_alone(adapters, tenants):
    card = register(adapters, "secret", A)
    grant(tenants, Visibility.SHARED, B)
    assert adapters.service.resolve("secret", B) == card.ref
    assert names(adapters, B) == ["secret@1"]
    assert names(adapters, C) == []
    refusal(adapters.service.resolve, "secret", C)
    grant(tenants, Visibility.PRIVATE)
    refusal(adapters.service.resolve, "secret", B)


def test_public_for_everybody_and_its_owners_to_change(adapters, tenants):
    card = register(adapters, "secret", A)
    grant(tenants, Visibility.PUBLIC)
    for tenant in (A, B, C, DEFAULT_TENANT):
        assert adapters.service.resolve("secret@1", tenant) == card.ref
    refusal(adapters.service.delete, "secret", B)
    refusal(adapters.service.entry, "secret", B)
    assert adapters.service.visible("secret", B) == adapters.service.entry("secret", A)


def test_what_was_said_of_a_name_goes_with_it(adapters, tenants):
    register(adapters, "secret", A)
    grant(tenants, Visibility.PUBLIC)
    adapters.service.delete("secret", A)
    register(adapters, "secret", A)
    assert names(adapters, B) == []


def test_a_name_that_keeps_a_version_keeps_what_was_said_of_it(adapters, tenants):
    for seed in (0, 1):
        register(adapters, "secret", A, seed=seed)
    grant(tenants, Visibility.SHARED, B)
    with pytest.raises(ConflictError):
        adapters.service.delete("secret", A)
    assert names(adapters, B) == ["secret@1", "secret@2"]
    adapters.service.delete("secret@1", A)
    assert names(adapters, B) == ["secret@2"]
    adapters.service.delete("secret@2", A)
    assert tenants.grant("secret", A) is None


def test_who_may_use_a_name_gets_its_route_and_may_not_change_it(adapters, tenants):
    for seed in (0, 1):
        register(adapters, "secret", A, seed=seed)
    grant(tenants, Visibility.SHARED, B)
    rollouts, cause = adapters.service.rollouts, Cause("b/operator")
    with pytest.raises(ModelNotFoundError):
        rollouts.promote("secret", B, cause, 1)
    with pytest.raises(ModelNotFoundError):
        rollouts.retire("secret", B, cause, 1)
    assert adapters.service.resolve("secret", B).version == 2
    rollouts.promote("secret", A, cause, 1)
    assert adapters.service.resolve("secret", B).version == 1
    rollouts.retire("secret", A, cause, 2)
    assert names(adapters, B) == ["secret@1"]


def test_a_shared_adapter_is_composed_by_request_and_not_registered_in_a_composition(
    adapters, tenants
):
    register(adapters, "secret", A)
    register(adapters, "mine", B, seed=1)
    wanted = NamedComposition(CompositionKind.STACK, ("secret", "mine"))
    compose = partial(adapters.service.register_composition, "both", wanted)
    with pytest.raises(ModelNotFoundError, match="secret"):
        compose(tenant=B)
    grant(tenants, Visibility.SHARED, B)
    with pytest.raises(PermissionDeniedError, match="secret@1 is another tenant's"):
        compose(tenant=B)
    resolve = partial(adapters.service.resolve, tenant=B)
    assert resolve_composition(wanted, resolve, "adapter").composition is not None
    assert names(adapters, B) == ["mine@1", "secret@1"]


def test_a_grant_says_nothing_of_another_owners_adapter(adapters, tenants):
    register(adapters, "secret", B)
    grant(tenants, Visibility.PUBLIC, owner=A)
    assert names(adapters, C) == []
    assert tenants.grant("secret", B) is None


def test_a_tenant_that_comes_back_was_given_nothing(adapters, tenants):
    register(adapters, "secret", A)
    grant(tenants, Visibility.SHARED, B, C)
    tenants.delete(B)
    tenants.create(Tenant(id=B))
    assert (names(adapters, B), names(adapters, C)) == ([], ["secret@1"])


def test_only_tenants_that_are_there_can_be_given_anything(adapters, tenants):
    with pytest.raises(NotFoundError, match="nobody"):
        grant(tenants, Visibility.SHARED, "nobody")
    assert tenants.grant("secret", A) is None


def test_the_base_is_everybodys(adapters):
    assert adapters.service.resolve(BASE_ID, B) is None


def test_no_cache_block_is_shared_between_tenants():
    """Equal base, adapter and tokens: B finds nothing of A's, so no time tells what A has asked."""
    blocks = BlockManager(100, 4, prefix_cache=True, base_digest="base")

    def sequence(number, tenant):
        params = SamplingParams(max_tokens=1, seed=0)
        return Sequence(number, f"r{number}", 0, tenant, params, None, 0.0, 41, list(range(41)))

    first = sequence(0, A)
    blocks.match(first)
    blocks.allocate(first, 41)
    blocks.commit(first, 41)
    blocks.free(first)
    assert blocks.match(sequence(1, B)) == 0
    assert blocks.match(sequence(2, A)) == 40


@pytest.mark.parametrize(
    ("quotas", "named"), [({"adapters": 1}, "adapters"), ({"adapter_bytes": 300}, "adapter_bytes")]
)
def test_a_tenants_adapters_are_bounded(adapters, tenants, quotas, named):
    register(adapters, "one", A)
    tenants.update(Tenant(id=A, quotas=Quotas(**quotas)))
    with pytest.raises(PermissionDeniedError, match=rf"^{named}: .* its quota is") as caught:
        register(adapters, "two", A, seed=1)
    assert caught.value.param == named
    assert adapters.leftovers() == []
    assert names(adapters, A) == ["one@1"]
    assert register(adapters, "one", A).ref.version == 1, "what is there is not counted twice"
    register(adapters, "three", B, seed=2)
