"""How long a request may take and how urgent it is, as the API hands it on."""

from __future__ import annotations

import time

import pytest
from support.api import Api, assert_error, settings_of

from manyhats.errors import DeadlineExceededError
from manyhats.tenancy.model import Quotas, Role, Tenant


def terms(api) -> tuple[float | None, int]:
    """(seconds until the deadline of the last request, its urgency)."""
    request = api.engine.requests[-1]
    left = None if request.deadline is None else request.deadline - time.monotonic()
    return left, request.urgency


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_the_header_or_else_the_setting(kind):
    api = Api(settings=settings_of(timeout_s=1000.0))
    call = getattr(api, kind)
    assert call().status_code == 200
    left, urgency = terms(api)
    assert 900 < left <= 1000
    assert urgency == 0
    assert call(headers={"x-manyhats-timeout": "50.5"}, priority=-3).status_code == 200
    left, urgency = terms(api)
    assert 0 < left <= 50.5
    assert urgency == -3
    plain = Api()
    plain.complete()
    assert terms(plain) == (None, 0)


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "x", "86401", "1,2"])
def test_a_bad_header_names_the_bound(value):
    answer = Api().complete(headers={"x-manyhats-timeout": value})
    assert_error(answer, 400, "invalid_request", "x-manyhats-timeout", "at most 86400")


def test_a_priority_is_bounded_by_the_tenants_quota_but_not_for_operators():
    api = Api(settings=settings_of(admin_api_keys=("root",)))
    api.tenants.create(Tenant(id="acme", quotas=Quotas(priority=5)))
    api.tenants.create(Tenant(id="free", quotas=Quotas(priority=None)))

    def ask(tenant, role, priority):
        headers = {"authorization": f"Bearer {api.tenants.issue(tenant, role)[1]}"}
        return api.complete(headers=headers, priority=priority)

    assert ask("acme", Role.TENANT, 5).status_code == 200
    refused = ask("acme", Role.TENANT, 6)
    assert_error(refused, 403, "permission_denied", "priority", "quota of 5")
    assert ask("acme", Role.OPERATOR, 100).status_code == 200
    assert ask("free", Role.TENANT, 100).status_code == 200
    assert ask("default", Role.TENANT, 1).status_code == 403
    assert ask("default", Role.TENANT, -100).status_code == 200
    assert ask("default", Role.TENANT, 101).status_code == 400


def test_a_request_out_of_time_is_a_504():
    api = Api()
    api.engine.error = DeadlineExceededError("the request's time was up", param="timeout")
    assert_error(api.complete(), 504, "deadline_exceeded", "timeout", "time was up")
