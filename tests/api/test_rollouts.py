"""The admin routes that change routes, over a real service; and what a request says of its side."""

from __future__ import annotations

import json

import pytest
from pydantic import SecretStr
from support.adapter_service import config_bytes, open_adapters, weights_bytes, write_adapter
from support.api import Api, assert_error, settings_of

from manyhats.api import admin, audit, rollouts
from manyhats.lifecycle.audit import broken_link
from manyhats.lifecycle.routes import RouteHint, Side
from manyhats.tenancy.model import Role


class Routed(Api):
    """The whole application over a real adapter service and a fake engine."""

    def admin(self, name, action, **body):
        return self.post(f"/admin/adapters/{name}/{action}", body)

    def served(self, model="a", **options) -> str:
        answer = self.complete(model=model, **options)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-manyhats-served-by"]

    def stable(self, name="a"):
        return self.get(f"/admin/adapters/{name}").json()["route"]["stable"]


@pytest.fixture
def adapters(tmp_path):
    with open_adapters(tmp_path) as adapters:
        yield adapters


@pytest.fixture
def api(adapters):
    api = Routed(directory=adapters.service, routers=(admin.router, audit.router, rollouts.router))
    for seed in range(3):
        path = str(write_adapter(adapters.root / str(seed), seed))
        answer = api.post("/admin/adapters", {"name": "a", "path": path})
        assert answer.status_code == 201
    return api


def test_each_change_holds_for_the_next_request(api):
    assert api.served() == "a@3"
    answer = api.admin("a", "promote", version=1, reason="older is better")
    assert answer.json() == {"name": "a", "route": {"stable": 1, "previous": 3, "canary": None}}
    assert api.served() == "a@1"
    canary = api.admin("a", "canary", version=2, percent=100).json()["route"]["canary"]
    assert canary == {"version": 2, "percent": 100.0, "schedule": None}
    assert api.served() == "a@2"
    assert api.served(headers={"x-manyhats-route": "stable"}) == "a@1"
    api.admin("a", "canary", percent=0)
    assert api.served(headers={"x-manyhats-route": "canary"}) == "a@1"
    assert api.admin("a", "rollback").json()["route"]["stable"] == 3
    assert api.served() == "a@3"
    assert api.admin("a", "rollback", to="baseline").json()["route"]["stable"] == "baseline"
    assert api.served() == "baseline"
    assert api.engine.requests[-1].adapter is None
    assert api.complete(model="a").json()["model"] == "a"
    assert api.served("a@2") == "a@2"
    api.admin("a", "rollback", to=2)
    assert api.served() == "a@2"


def test_models_show_what_a_name_means(api):
    base = api.engine.model.id

    def listed():
        return [(m["id"], m["root"]) for m in api.get("/v1/models").json()["data"]]

    assert listed() == [(base, base), ("a", "a@3"), ("a@2", "a@2"), ("a@1", "a@1")]
    api.admin("a", "promote", version=2)
    api.admin("a", "retire", version=1)
    assert listed() == [(base, base), ("a", "a@2"), ("a@3", "a@3")]
    api.admin("a", "rollback", to="baseline")
    assert listed() == [(base, base), ("a", base), ("a@3", "a@3"), ("a@2", "a@2")]
    for card in api.get("/v1/models").json()["data"][1:]:
        assert api.get(f"/v1/models/{card['id']}").json() == card
    assert api.get("/v1/models/a").json()["parent"] == base
    assert api.get("/v1/models/a@1").status_code == 404


def test_a_schedule_is_started_held_and_resumed(api):
    body = {"version": 1, "schedule": {"step_s": 600}}
    canary = api.admin("a", "canary", **body).json()["route"]["canary"]
    assert canary["percent"] == 5.0
    assert canary["schedule"]["steps"] == [5.0, 25.0, 50.0, 100.0]
    held = api.admin("a", "canary/hold", reason="lunch").json()["route"]["canary"]["schedule"]
    assert held["held"] == "lunch"
    assert api.admin("a", "canary/resume").json()["route"]["canary"]["schedule"]["held"] == ""
    assert api.admin("a", "promote").json()["route"]["stable"] == 1


@pytest.mark.parametrize(
    ("action", "body", "status", "param"),
    [
        ("promote", {"version": 0}, 400, "version"),
        ("promote", {"version": True}, 400, "version"),
        ("promote", {"version": 9}, 404, "version"),
        ("promote", {"version": 1, "why": "x"}, 400, "why"),
        ("promote", {"version": 1, "reason": "x" * 1001}, 400, "reason"),
        ("promote", {}, 409, None),
        ("canary", {"version": 1}, 400, "percent"),
        ("canary", {"version": 1, "percent": 5, "schedule": {"step_s": 1}}, 400, "percent"),
        ("canary", {"version": 1, "percent": 100.5}, 400, "percent"),
        ("canary", {"version": 3, "percent": 5}, 409, "version"),
        ("canary", {"version": 1, "schedule": {"step_s": 0}}, 400, "schedule.step_s"),
        ("canary", {"version": 1, "schedule": {"step_s": 1, "steps": [9, 5]}}, 400, "steps"),
        ("canary/hold", {}, 409, None),
        ("rollback", {"to": "yesterday"}, 400, None),
        ("rollback", {"to": 9}, 404, "to"),
        ("retire", {}, 400, "version"),
        ("retire", {"version": 3}, 409, None),
    ],
)
def test_a_bad_change_names_the_field_and_changes_nothing(api, action, body, status, param):
    before = api.get("/admin/adapters/a").json(), api.get("/admin/audit").json()
    answer = api.admin("a", action, **body)
    assert answer.status_code == status, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param
    assert (api.get("/admin/adapters/a").json(), api.get("/admin/audit").json()) == before
    assert api.admin("nobody", action, **body).status_code in (status, 404)


def test_the_log_is_read_in_pages_and_its_chain_can_be_checked(api):
    for _ in range(4):
        api.admin("a", "rollback", reason="to and fro")
    entries, more = [], True
    while more:
        after = entries[-1]["seq"] if entries else 0
        page = api.get(f"/admin/audit?after={after}&limit=3").json()
        entries, more = entries + page["data"], page["has_more"]
    assert broken_link(entries) == (7, None, entries[-1]["hash"])
    assert [e["action"] for e in entries] == ["register"] * 3 + ["rollback"] * 4
    assert {(e["actor"], e["reason"]) for e in entries[3:]} == {("default/admin", "to and fro")}
    assert api.get("/admin/audit?name=nobody").json() == {
        "object": "list", "data": [], "has_more": False,
    }  # fmt: skip
    for query in ("limit=0", "limit=1001", "after=-1", "after=x", f"after={2**63}"):
        assert api.get(f"/admin/audit?{query}").status_code == 400, query


def test_what_is_said_at_registration_is_kept(api, adapters):
    said = {"revision": "abc123", "metadata": {"epochs": "3"}, "promote": False, "reason": "try"}
    path = str(write_adapter(adapters.root / "9", 9))
    body = {"name": "a", "path": path, "source": "hub:me/a", **said}
    assert api.post("/admin/adapters", body).json()["stable"] is False
    texts = {**said, "promote": "false", "metadata": '{"epochs": "3"}', "source": "hub:me/a"}
    files = {"weights": ("w", weights_bytes(10)), "config": ("c", config_bytes())}
    uploaded = api.send("POST", "/admin/adapters", data={"name": "a", **texts}, files=files)
    assert uploaded.status_code == 201, uploaded.text
    shown = api.get("/admin/adapters/a").json()
    assert shown["route"]["stable"] == 3
    for version in shown["versions"][3:]:
        kept = {key: version[key] for key in ("source", "revision", "metadata", "by")}
        assert kept == {
            "source": "hub:me/a", "revision": "abc123", "metadata": {"epochs": "3"},
            "by": "default/admin",
        }  # fmt: skip
    last = api.get("/admin/audit?after=4").json()["data"][0]
    assert (last["reason"], last["after"]["version"]) == ("try", 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("promote", "yes"),
        ("promote", '"true"'),
        ("metadata", "{"),
        ("metadata", "[]"),
        ("metadata", json.dumps({"x": "y" * 17000})),
        ("metadata", json.dumps({str(i): "" for i in range(65)})),
        ("revision", "x" * 257),
        ("revision", "x" * 2000),
        ("source", ""),
    ],
)
def test_a_bad_part_of_an_upload_is_named(api, adapters, field, value):
    files = {"weights": ("w", weights_bytes(11)), "config": ("c", config_bytes())}
    answer = api.send("POST", "/admin/adapters", data={"name": "b", field: value}, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
    assert len(adapters.store.list()) == 3
    assert adapters.leftovers() == []


def test_one_version_is_deleted_by_its_number(api):
    assert api.send("DELETE", "/admin/adapters/a@3").status_code == 409
    answer = api.send("DELETE", "/admin/adapters/a@1?reason=old")
    assert answer.json() == {"name": "a@1", "deleted": True, "versions": [1]}
    assert api.stable() == 3
    assert api.get("/admin/audit?after=3").json()["data"][0]["reason"] == "old"


def hint(api, headers=None, **body) -> RouteHint:
    assert api.complete(model="pirate", headers=headers, **body).status_code == 200
    return api.directory.hints[-1]


def test_a_request_sticks_by_its_user_else_its_key_else_not_at_all():
    api = Api()
    assert hint(api) == RouteHint()
    assert hint(api, {"authorization": "Bearer none"}) == RouteHint(), "no key is configured"
    ada = hint(api, user="ada")
    assert ada.sticky
    assert hint(api, user="ada") == ada == hint(api, safety_identifier="ada")
    assert hint(api, user="bob") != ada
    api.chat(model="pirate", user="ada", headers={"x-manyhats-route": "Canary"})
    assert api.directory.hints[-1] == RouteHint(ada.sticky, Side.CANARY)

    keyed = Api(settings=settings_of(api_keys=(SecretStr("one"), SecretStr("two"))))
    one, two = (hint(keyed, {"authorization": f"Bearer {key}"}) for key in ("one", "two"))
    assert one.sticky
    assert one != two
    assert hint(keyed, {"authorization": "Bearer two"}, user="ada") == ada


def test_a_canary_sticks_to_the_issued_key_and_the_log_names_who_started_it(adapters):
    settings = settings_of(admin_api_keys=(SecretStr("root"),))
    routers = (admin.router, audit.router, rollouts.router)
    api = Routed(settings=settings, directory=adapters.service, routers=routers)
    record, key = api.tenants.issue("default", Role.OPERATOR, note="olga")
    olga = {"authorization": f"Bearer {key}"}
    for seed in range(2):
        body = {"name": "a", "path": str(write_adapter(adapters.root / str(seed), seed))}
        assert api.post("/admin/adapters", body, headers=olga).status_code == 201
    body = {"version": 1, "percent": 50, "reason": "a look"}
    assert api.post("/admin/adapters/a/canary", body, headers=olga).status_code == 200

    issued = [api.tenants.issue("default", Role.TENANT)[1] for _ in range(24)]
    served = [
        {api.served(headers={"authorization": f"Bearer {key}"}) for _ in range(3)} for key in issued
    ]
    assert {len(one) for one in served} == {1}, "a key stays on its side"
    assert set.union(*served) == {"a@1", "a@2"}
    log = api.get("/admin/audit", headers={"authorization": "Bearer root"}).json()["data"]
    assert {entry["actor"] for entry in log} == {f"default/operator/{record.id}"}
    assert (log[-1]["action"], log[-1]["reason"]) == ("canary", "a look")


@pytest.mark.parametrize("value", ["", "canari", "canary, stable"])
def test_a_side_that_does_not_exist_is_refused(value):
    api = Api()
    for call in (api.complete, api.chat):
        answer = call(model="pirate", headers={"x-manyhats-route": value})
        assert_error(answer, 400, "invalid_request", "x-manyhats-route", "'canary' or 'stable'")
    assert api.directory.hints == []


def test_the_description_tells_the_bodies():
    described = (
        Routed(routers=(admin.router, audit.router, rollouts.router)).get("/openapi.json").json()
    )
    for path in described["paths"]:
        for method, operation in described["paths"][path].items():
            if path.startswith(("/admin/", "/v1/load", "/v1/unload")):
                assert operation["description"], path
                assert ("requestBody" in operation) == (method in ("post", "put")), path
