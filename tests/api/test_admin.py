"""The admin routes over a real service: folders, uploads, and vLLM's two calls."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import anyio
import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from support.adapter_service import (
    BASE_ID,
    MAX_BYTES,
    config_bytes,
    open_adapters,
    weights_bytes,
    write_adapter,
)
from support.fake_engine import FakeEngine

from manyhats.api import admin, rollouts, vllm
from manyhats.api.handlers import install_handlers
from manyhats.api.limits import UPLOAD_SLACK, BodyLimitMiddleware
from manyhats.config import Settings
from manyhats.engine.interface import EngineStats, ResidentAdapter
from manyhats.lifecycle.evaluation.service import EvaluationService
from manyhats.lifecycle.evaluation.store import EvaluationStore
from manyhats.tenancy.directory import TenantDirectory
from manyhats.tenancy.store_sqlite import SqliteTenantStore
from manyhats.types import DEFAULT_TENANT


class Server:
    """A small application over the routes; ``call`` is one request, its answer whole."""

    def __init__(self, adapters, settings) -> None:
        self.adapters = adapters
        self.resident: tuple[ResidentAdapter, ...] = ()
        self.waiting: tuple[str, ...] = ()
        self.app = FastAPI()
        self.app.state.manyhats = SimpleNamespace(
            settings=settings,
            engine=SimpleNamespace(stats=self.stats),
            adapters=adapters.service,
            tenants=TenantDirectory(SqliteTenantStore(":memory:")),
            evaluations=EvaluationService(
                FakeEngine(),
                adapters.service,
                EvaluationStore(adapters.registry),
                lambda *_: None,
            ),
        )
        self.app.add_middleware(
            BodyLimitMiddleware, json_bytes=4096, upload_bytes=MAX_BYTES + UPLOAD_SLACK
        )
        install_handlers(self.app)
        self.app.include_router(admin.router)
        self.app.include_router(rollouts.router)
        self.app.include_router(vllm.router)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=0, waiting=0, kv_blocks_total=1, kv_blocks_used=0, kv_block_size=16,
            slots_total=4, rows_total=64, rows_used=2, host_bytes_used=160, host_bytes_total=1000,
            resident=self.resident, waiting_adapters=self.waiting, steps=0, failed_steps=0,
        )  # fmt: skip

    def call(self, method, path, **kwargs) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(run())

    def post(self, path, body, **kwargs) -> httpx.Response:
        return self.call("POST", path, json=body, **kwargs)

    def upload(self, name="up", config=None, weights=None) -> httpx.Response:
        files = {
            "weights": ("anything", weights_bytes() if weights is None else weights),
            "config": ("../../evil", config_bytes() if config is None else config),
        }
        return self.call("POST", "/admin/adapters", data={"name": name}, files=files)

    def assert_untouched(self) -> None:
        assert self.adapters.store.list() == []
        assert self.adapters.leftovers() == []
        assert self.adapters.service.list(DEFAULT_TENANT) == []


@pytest.fixture
def adapters(tmp_path):
    with open_adapters(tmp_path / "home") as adapters:
        yield adapters


@pytest.fixture
def server(adapters):
    return Server(adapters, Settings())


def folder(server, name="pirate", seed=0) -> str:
    return str(write_adapter(server.adapters.root / f"{name}-{seed}", seed))


def error(answer) -> dict:
    return answer.json()["error"]


def test_register_a_folder_show_list_and_delete(server):
    path = folder(server)
    answer = server.post("/admin/adapters", {"name": "pirate", "path": path})
    assert answer.status_code == 201
    card = answer.json()
    assert (card["name"], card["version"], card["family"], card["max_rank"]) == (
        "pirate",
        1,
        "lora",
        2,
    )
    assert (card["nbytes"], card["created"], card["resident"]) == (160, 1234, None)
    assert server.adapters.store.list() == [card["digest"]]
    assert server.post("/admin/adapters", {"name": "pirate", "path": path}).json() == card

    server.post("/admin/adapters", {"name": "pirate", "path": folder(server, seed=1)})
    listed = server.call("GET", "/admin/adapters").json()
    assert listed["object"] == "list"
    assert [(c["name"], c["version"]) for c in listed["data"]] == [("pirate", 1), ("pirate", 2)]
    shown = server.call("GET", "/admin/adapters/pirate@1").json()
    versions = shown.pop("versions")
    assert shown == {
        **card, "stable": False, "route": {"stable": 2, "previous": 1, "canary": None},
    }  # fmt: skip
    assert versions[0] == {
        "version": 1, "state": "checked", "digest": card["digest"], "created": 1234,
        "base_digest": "", "tenant": "default", "family": "lora", "max_rank": 2,
        "nbytes": card["nbytes"],
        "by": "default/admin", "source": path, "revision": "", "metadata": {},
    }  # fmt: skip
    assert [v["version"] for v in versions] == [1, 2]
    assert server.call("GET", "/admin/adapters/pirate").json()["version"] == 2

    refused = server.call("DELETE", "/admin/adapters/pirate")
    assert (refused.status_code, error(refused)["code"]) == (409, "conflict")
    assert "requests for 'pirate' are routed to stable 2" in error(refused)["message"]
    deleted = server.call("DELETE", "/admin/adapters/pirate?force=true")
    assert deleted.json() == {"name": "pirate", "deleted": True, "versions": [1, 2]}
    for method in ("GET", "DELETE"):
        again = server.call(method, "/admin/adapters/pirate")
        assert (again.status_code, error(again)["code"]) == (404, "model_not_found")
    server.assert_untouched()


def test_what_is_on_the_device_is_shown(server):
    server.upload("a", weights=weights_bytes(1))
    server.upload("b", weights=weights_bytes(2))
    ref = server.adapters.service.resolve("a", DEFAULT_TENANT)
    server.resident = (ResidentAdapter(ref, slot=3, leases=2, pinned=False),)
    server.waiting = ("b@1",)
    a, b = server.call("GET", "/admin/adapters").json()["data"]
    assert (a["resident"], a["waiting"]) == ({"slot": 3, "leases": 2, "pinned": False}, False)
    assert (b["resident"], b["waiting"]) == (None, True)
    assert server.call("GET", "/admin/cache").json() == {
        "device": {
            "slots_total": 4, "slots_used": 1, "rows_total": 64, "rows_used": 2,
            "resident": [{"adapter": "a@1", "slot": 3, "leases": 2, "pinned": False}],
            "waiting": ["b@1"],
        },
        "host": {"bytes_total": 1000, "bytes_used": 160},
    }  # fmt: skip


def test_an_upload_is_the_same_version_as_the_folder(server):
    registered = server.post("/admin/adapters", {"name": "a", "path": folder(server)}).json()
    uploaded = server.upload("a")
    assert uploaded.status_code == 201
    assert uploaded.json() == registered
    shown = server.upload("b").json()
    assert (shown["digest"], shown["version"]) == (registered["digest"], 1)
    [version] = server.call("GET", "/admin/adapters/b").json()["versions"]
    assert version["source"] == "upload"
    assert server.adapters.leftovers() == []


def multipart(*parts: tuple[str, bytes], end=b"--B--\r\n") -> bytes:
    body = b""
    for disposition, content in parts:
        body += (
            b"--B\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"
        )
    return body + end


def form(field: str) -> str:
    return f'form-data; name="{field}"'


NAME, CONFIG, WEIGHTS = (form("name"), b"a"), (form("config"), b"{}"), (form("weights"), b"w")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (multipart(NAME, CONFIG), "field 'weights' is missing"),
        (multipart(NAME, WEIGHTS), "field 'config' is missing"),
        (multipart(CONFIG, WEIGHTS), "field 'name' is missing"),
        (multipart(NAME, NAME, CONFIG, WEIGHTS), "field 'name' comes twice"),
        (multipart(NAME, CONFIG, WEIGHTS, WEIGHTS), "field 'weights' comes twice"),
        (multipart(NAME, CONFIG, WEIGHTS, (form("tenant"), b"x")), "unknown field 'tenant'"),
        (multipart(NAME, ("form-data", b"x")), "unknown field ''"),
        (multipart((form("name"), b"x" * 2000), CONFIG, WEIGHTS), "name is over the bound of 1024"),
        (multipart((form("name"), b"\xff"), CONFIG, WEIGHTS), "name is not valid UTF-8"),
        (multipart((form("name"), "é".encode()), CONFIG, WEIGHTS), "is not allowed"),
        (multipart((form("name"), b"../a"), CONFIG, WEIGHTS), "is not allowed"),
        (multipart((form("name"), BASE_ID.encode()), CONFIG, WEIGHTS), "is the base model's id"),
        (multipart((form("name") + "; x=" + "y" * 100_000, b"a")), "header"),
        (multipart((form("config"), b" " * (1 << 20) + b"{}")), "_config.json is over the bound"),
        (multipart(NAME, (form("config"), b""), WEIGHTS), "_config.json is missing or empty"),
        (multipart(NAME, CONFIG, WEIGHTS), "bad_header"),
        (multipart(NAME, CONFIG, WEIGHTS, end=b""), "ends before its closing boundary"),
        (multipart(NAME, CONFIG, WEIGHTS)[:-40], "ends before its closing boundary"),
        (b"", "ends before its closing boundary"),
        (b"no multipart at all", "not valid multipart"),
    ],
)
def test_a_bad_upload_is_refused_and_leaves_nothing(server, body, says):
    headers = {"content-type": "multipart/form-data; boundary=B"}
    answer = server.call("POST", "/admin/adapters", content=body, headers=headers)
    assert answer.status_code in (400, 409)
    assert says in error(answer)["message"]
    server.assert_untouched()


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "x" * 71])
def test_an_upload_needs_a_boundary(server, boundary):
    headers = {"content-type": f"multipart/form-data{boundary}"}
    answer = server.call("POST", "/admin/adapters", content=b"x", headers=headers)
    assert answer.status_code == 400
    assert "boundary" in error(answer)["message"]
    server.assert_untouched()


@pytest.mark.parametrize(
    "weights",
    [
        weights_bytes()[:-1],
        b"\x80\x04" + weights_bytes(),
        weights_bytes(scale=float("nan")),
        b"\xff" * 100,
        b"x",
    ],
    ids=["truncated", "pickle", "nan", "header", "tiny"],
)
def test_a_corrupt_upload_leaves_nothing(server, weights):
    answer = server.upload(weights=weights)
    assert (answer.status_code, error(answer)["code"]) == (400, "adapter_rejected")
    server.assert_untouched()
    assert server.upload().status_code == 201, "the server is unharmed"


class Body:
    """A request body that comes in pieces, and knows how many were taken."""

    def __init__(self, pieces: int, size: int, start: bytes, then: str = "more") -> None:
        self.pieces, self.size, self.start, self.then = pieces, size, start, then
        self.taken = 0

    async def receive(self):
        self.taken += 1
        if self.taken > self.pieces:
            return {"type": "http.disconnect"}
        chunk = self.start if self.taken == 1 else b"\0" * self.size
        return {"type": "http.request", "body": chunk, "more_body": True}


def raw_call(app, headers, body) -> list[dict]:
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/admin/adapters", "raw_path": b"", "root_path": "",
        "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "server": ("s", 80),
        "app": app, "state": {},
    }  # fmt: skip
    asyncio.run(app(scope, body.receive, send))
    return sent


UPLOAD_TYPE = (b"content-type", b"multipart/form-data; boundary=B")
WEIGHTS_START = b'--B\r\nContent-Disposition: form-data; name="weights"\r\n\r\n'


def test_an_upload_over_the_bound_is_refused_before_it_is_read_whole(server):
    """Chunked, so that nothing says its length: refused a piece after the bound was passed."""
    body = Body(pieces=100_000, size=16 << 10, start=WEIGHTS_START)
    sent = raw_call(server.app, [UPLOAD_TYPE, (b"transfer-encoding", b"chunked")], body)
    assert sent[0]["status"] == 400
    assert b"too_large" in sent[1]["body"]
    assert f"{MAX_BYTES} bytes (max_adapter_mb)".encode() in sent[1]["body"]
    assert body.taken <= MAX_BYTES // body.size + 3
    server.assert_untouched()


def test_an_upload_that_says_it_is_over_the_bound_is_not_staged(server):
    length = str(MAX_BYTES + UPLOAD_SLACK + 1).encode()
    body = Body(pieces=1, size=0, start=WEIGHTS_START)
    sent = raw_call(server.app, [UPLOAD_TYPE, (b"content-length", length)], body)
    assert sent[0]["status"] == 413
    server.assert_untouched()


def test_a_client_that_goes_away_leaves_nothing(server):
    body = Body(pieces=3, size=1000, start=WEIGHTS_START)
    with contextlib.suppress(ClientDisconnect):  # whoever is above may be told
        raw_call(server.app, [UPLOAD_TYPE, (b"transfer-encoding", b"chunked")], body)
    server.assert_untouched()


def test_a_cancelled_upload_leaves_nothing(server):
    async def run():
        reached = asyncio.Event()
        pieces = iter([WEIGHTS_START, b"x" * 1000])

        async def receive():
            chunk = next(pieces, None)
            if chunk is None:
                reached.set()
                await asyncio.Event().wait()
            return {"type": "http.request", "body": chunk, "more_body": True}

        async def send(message):
            raise AssertionError(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/admin/adapters", "raw_path": b"", "root_path": "",
            "query_string": b"", "headers": [UPLOAD_TYPE, (b"transfer-encoding", b"chunked")],
            "client": None, "server": ("s", 80),
        }  # fmt: skip
        # A scope's cancellation, unlike a task's, reaches every later wait as well.
        async with anyio.create_task_group() as group:
            group.start_soon(server.app, scope, receive, send)
            await reached.wait()
            assert len(server.adapters.leftovers()) == 1, "it was being written"
            group.cancel_scope.cancel()

    asyncio.run(run())
    server.assert_untouched()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "a"}, "path"),
        ({"name": "a", "path": 3}, "path"),
        ({"name": "a", "path": "x", "tenant": "y"}, "tenant"),
        ({"name": "a/b", "path": "x"}, "name"),
        ({"name": "a" * 200, "path": "x"}, "name"),
        ({"name": "..", "path": "x"}, "name"),
        ({"name": "a@1", "path": "x"}, "name"),
        ({"name": "\u00e9", "path": "x"}, "name"),
    ],
)
def test_a_bad_body_names_the_field(server, body, param):
    answer = server.post("/admin/adapters", body)
    assert (answer.status_code, error(answer)["param"]) == (400, param)
    server.assert_untouched()


@pytest.mark.parametrize(
    "path", ["/etc", "../..", "{root}/../elsewhere", "{root}/link", "a\u0000b"]
)
def test_a_folder_outside_of_the_roots_is_refused(server, path):
    elsewhere = write_adapter(server.adapters.home / "elsewhere")
    (server.adapters.root / "link").symlink_to(elsewhere)
    body = {"name": "a", "path": path.format(root=server.adapters.root)}
    answer = server.post("/admin/adapters", body)
    assert answer.status_code == 400
    assert error(answer)["message"].startswith("path_not_allowed: ")
    server.assert_untouched()


def test_other_content_types_are_refused(server):
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = server.call("POST", "/admin/adapters", content=b"name=a", headers=headers)
    assert answer.status_code == 415


def test_a_name_in_the_path_is_only_a_name(server):
    for name in ("..%2f..%2fetc", "%2e%2e", "a%00b", "x" * 5000, "%F0%9F%A6%9C"):
        for method in ("GET", "DELETE"):
            answer = server.call(method, f"/admin/adapters/{name}")
            assert answer.status_code in (404, 405), (method, name)


def test_vllms_calls(server):
    load = {"lora_name": "sql", "lora_path": folder(server, "sql")}
    for extra in (
        {},
        {"base_model_name": "any"},
        {"load_inplace": True},
        {"base_model_name": None},
    ):
        answer = server.post("/v1/load_lora_adapter", load | extra)
        assert answer.status_code == 200
        assert answer.text == "Success: LoRA adapter 'sql' added successfully."
        assert answer.headers["content-type"].startswith("text/plain")
    ref = server.adapters.service.resolve("sql", DEFAULT_TENANT)
    assert str(ref) == "sql@1", "the same content four times over"
    assert server.adapters.residency.prefetched == [ref] * 4

    server.post("/v1/load_lora_adapter", load | {"lora_path": folder(server, "sql", 1)})
    assert str(server.adapters.service.resolve("sql", DEFAULT_TENANT)) == "sql@2"

    answer = server.post("/v1/unload_lora_adapter", {"lora_name": "sql", "lora_int_id": 7})
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'sql' removed successfully.",
    )
    server.assert_untouched()
    again = server.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
    assert (again.status_code, again.text) == (
        200,
        "Success: no LoRA adapter of that name was loaded.",
    )


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/load_lora_adapter", {"lora_name": "a"}, "lora_path"),
        (
            "/v1/load_lora_adapter",
            {"lora_name": "a", "lora_path": "x", "lora_int_id": 1},
            "lora_int_id",
        ),
        (
            "/v1/load_lora_adapter",
            {"lora_name": "a", "lora_path": "x", "load_inplace": "yes"},
            "load_inplace",
        ),
        ("/v1/unload_lora_adapter", {"lora_name": "a", "lora_int_id": "1"}, "lora_int_id"),
        ("/v1/unload_lora_adapter", {"lora_name": "a", "force": True}, "force"),
        ("/v1/unload_lora_adapter", {}, "lora_name"),
    ],
)
def test_vllms_calls_with_a_bad_body(server, path, body, param):
    answer = server.post(path, body)
    assert (answer.status_code, error(answer)["param"]) == (400, param)
    server.assert_untouched()


def test_a_load_that_fails_is_no_success(server):
    path = folder(server)
    (server.adapters.root / "pirate-0" / "adapter_model.safetensors").write_bytes(b"x")
    answer = server.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": path})
    assert (answer.status_code, error(answer)["code"]) == (400, "adapter_rejected")
    assert server.adapters.residency.prefetched == []


def test_every_route_needs_the_admin_role(adapters):
    server = Server(adapters, Settings(api_keys=("user",), admin_api_keys=("admin",)))
    routes = [
        (method, route.path.format(name="a", version=1))
        for router in (admin.router, rollouts.router, vllm.router)
        for route in router.routes
        for method in route.methods
    ]
    assert len(routes) == 17
    for method, path in routes:
        for key, status in ((None, 401), ("wrong", 401), ("user", 403)):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            # The body is bad as well: who may not ask is told nothing of it.
            answer = server.call(method, path, headers=headers, json={"x": 1})
            assert answer.status_code == status, (method, path, key)
    admitted = server.call("GET", "/admin/adapters", headers={"authorization": "Bearer admin"})
    assert admitted.status_code == 200
