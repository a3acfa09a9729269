"""The pages for users, typed as they stand against the whole application over a tiny model, and the
fine-tuning example that they lead through.
"""

from __future__ import annotations

import json
import random
import re

import httpx
import pytest
from pydantic import SecretStr
from support.api import serving
from support.application import tiny_application, tiny_base
from support.models import VOCAB
from support.pages import ROOT, Reader, commands
from support.random_lora import write_random_lora

DOCS = ROOT / "docs"
TEMPLATE = (
    "{% for m in messages %}{{ 'w3 ' if m.role == 'assistant' else 'w4 ' }}{{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
)
KEY = "one-secret"
LOCAL = "http://127.0.0.1:8000"


def write_data(path, seed, answer):
    """Thirty pairs that all have the same answer, so that there is something to learn."""
    draw = random.Random(seed)
    pairs = [
        {
            "prompt": " ".join(f"w{draw.randrange(5, VOCAB)}" for _ in range(4 + i % 5)),
            "completion": answer,
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of the default model's name, tiny, with a chat template."""
    folder = tmp_path_factory.mktemp("pages") / "SmolLM2-135M-Instruct"
    return tiny_base(folder, TEMPLATE)


@pytest.fixture
def reader(request, base, tmp_path, monkeypatch):
    """A reader of pages, at the keyboard of a server with the adapters pirate and legal; it has the
    admin key that the page on tenants names, for that page's test alone.
    """
    keyed = request.node.name == "test_keys_and_tenants"
    root = tmp_path / "adapters"
    for seed, name in enumerate(("pirate", "legal", "robot", "pirate-2", "pirate-3"), 1):
        write_random_lora(root / name, base, rank=2, targets=["q_proj"], seed=seed, scale=0.3)
    instead = {LOCAL: "", "~/adapters": str(root), "examples/adapters": str(root)}
    for seed, name in enumerate(("pirate", "robot", "legal")):
        write_data(tmp_path / f"{name}.jsonl", seed, f"w{7 + seed} w{9 + seed} w11")
        instead[f"examples/data/{name}.jsonl"] = str(tmp_path / f"{name}.jsonl")
    keys = (SecretStr(KEY),) if keyed else ()
    application = tiny_application(
        base, tmp_path / "home", adapter_root=(root,), admin_api_keys=keys
    )
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("manyhats.commands.evaluate._POLL_S", 0.02)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr("registering.POLL_S", 0.02)
    with application as made, serving(made.api) as (host, port):
        url = instead[LOCAL] = f"http://{host}:{port}"
        monkeypatch.setenv("MANYHATS_URL", url)
        for name in ("pirate", "legal"):
            register(url, name, root / name, KEY if keyed else None)
        more = {
            "finetune.py": [
                *("--model", str(base), "--threads", "1", "--ranks", "2", "--epochs", "1")
            ],
            "ask_everyone.py": ["--url", url, "--max-tokens", "4"],
        }
        yield Reader(url, instead, more, monkeypatch)


def register(url, name, folder, key=None, **more):
    body = {"name": name, "path": str(folder), **more}
    keys = {"authorization": f"Bearer {key}"} if key else {}
    answer = httpx.post(f"{url}/admin/adapters", json=body, headers=keys, timeout=60)
    assert answer.status_code == 201, answer.text


def test_keys_and_tenants(reader):
    ran = reader.read(DOCS / "tenants.md")
    assert ran.count("manyhats") == 4 and ran.count("curl") == 2
    assert "acme" in reader.output[0]
    keys = {"authorization": f"Bearer {KEY}"}
    issued = httpx.get(f"{reader.url}/admin/tenants/acme/keys", headers=keys).json()
    assert [key["role"] for key in issued["data"]] == ["tenant", "tenant"]
    assert httpx.get(f"{reader.url}/admin/tenants").status_code == 401


def test_quickstart(reader):
    ran = reader.read(DOCS / "quickstart.md")
    assert ran == ["make", *["curl"] * 3, "python", "curl", *["manyhats"] * 3]
    *alone, together = reader.served_by
    assert alone == ["baseline", "pirate@1"]
    assert set(re.split("[(),]", together)) >= {"weighted", "pirate@1:0.5", "legal@1:0.5"}


def test_serving_your_own(reader):
    ran = reader.read(DOCS / "serving.md")
    assert ran.count("python") == 3 and ran.count("curl") == 4
    assert reader.served_by == ["parrot@1", "parrot@2", "parrot@2", "parrot@1"]
    shown = httpx.get(f"{reader.url}/admin/adapters/parrot").json()
    assert shown["route"]["stable"] == 1
    assert shown["route"]["canary"]["version"] == 3
    assert [v["state"] for v in shown["versions"]] == ["checked", "retired", "ready"]


def test_an_adapter_went_bad(reader):
    root = reader.instead["~/adapters"]
    register(reader.url, "pirate", f"{root}/pirate-2")
    register(reader.url, "pirate", f"{root}/pirate-3", promote=False)
    begun = {"version": 3, "schedule": {"steps": [5, 50], "step_s": 3600}}
    httpx.post(f"{reader.url}/admin/adapters/pirate/canary", json=begun).raise_for_status()
    assert set(reader.read(DOCS / "incident.md")) == {"manyhats"}
    stood = [line for line in "".join(reader.output).splitlines() if line.startswith("pirate: ")]
    routes = [line for line in stood if "stable" in line]
    assert "canary 3 (5 %), held" in routes[1]
    assert [r.removeprefix("pirate: ") for r in routes[2:]] == [
        "stable 2", "stable 1", "stable baseline", "stable 1",
    ]  # fmt: skip


def test_every_page_for_users_has_commands():
    assert all(
        len(commands(DOCS / f"{p}.md")) > 5
        for p in ("quickstart", "serving", "incident", "tenants")
    )


def test_the_incident_page_names_what_is_there():
    deploy, text = ROOT / "deploy", (DOCS / "incident.md").read_text("utf-8")
    panels = {}
    for path in (deploy / "grafana" / "dashboards").glob("*.json"):
        board = json.loads(path.read_text("utf-8"))
        panels[board["title"]] = {panel["title"] for panel in board["panels"]}
    rows = re.findall(r"^\| Grafana, `(.+?)` \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for title, words in rows:
        named = set(re.findall(r"\*(.+?)\*", words))
        assert named and named <= panels[title], title
    rules = (deploy / "prometheus" / "rules" / "alerts.yml").read_text("utf-8")
    alerts = set(re.findall(r"`(Manyhats\w+)`", text))
    assert len(alerts) > 5
    assert alerts <= set(re.findall(r"alert: (\w+)", rules))
