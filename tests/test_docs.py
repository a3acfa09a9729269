"""The documentation names only what exists: targets, flags, variables, files, models."""

import importlib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated

import pytest
import typer
from pydantic import TypeAdapter
from support.api import Api

from manyhats import __version__, cli
from manyhats.api.factory import ALWAYS
from manyhats.app import ROUTES
from manyhats.commands import adapters, drift, tenants
from manyhats.config import CLIENT_VARIABLES, Settings

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "[a-z]*/**/README.md")
    for path in ROOT.glob(pattern)
)
README = ROOT / "README.md"
FOLDERS = "server|kernels|tests|docs|examples|loadtests|deploy"
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")


def code(path):
    """Every piece of code in a document: blocks line by line (joined at a backslash), and spans."""
    text = path.read_text("utf-8")
    blocks = FENCE.findall(text) + INDENTED.findall(FENCE.sub("", text))
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [*lines, *INLINE.findall(FENCE.sub("", text))]


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request):
    return request.param


@pytest.fixture(scope="module")
def targets():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    return set(phony.split())


def test_the_documents_are_seen():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert names >= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/architecture.md"}
    assert any(piece.startswith("make serve") for piece in code(README))


def test_make_targets_exist(document, targets):
    named = [
        m for piece in code(document) for m in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)\b", piece)
    ]
    assert set(named) <= targets


def test_every_make_target_has_a_help_text(targets):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert set(re.findall(r"^([a-z-]+):.* ## .+$", makefile, re.MULTILINE)) == targets


def test_flags_of_the_server_exist(document):
    """On a line that runs `manyhats`, and in a span that is a flag alone."""
    served = {name.replace("_", "-") for name in Settings.model_fields} | {"help"}
    served |= {
        f"no-{n.replace('_', '-')}"
        for n, f in Settings.model_fields.items()
        if f.annotation is bool
    }
    scripts = "\n".join(
        path.read_text("utf-8")
        for folder in ("examples", "loadtests")
        for path in (ROOT / folder).rglob("*.py")
    )
    remote = {
        name: {opt.removeprefix("--") for p in c.params for opt in (*p.opts, *p.secondary_opts)}
        for name, c in typer.main.get_command(adapters.app).commands.items()
    }
    own = {
        name: {opt.removeprefix("--") for p in c.params for opt in p.opts}
        for name, c in typer.main.get_command(cli.app).commands.items()
        if name in ("backup", "restore", "gc", "merge")
    }
    watched, given = (
        {
            name: {opt.removeprefix("--") for p in c.params for opt in (*p.opts, *p.secondary_opts)}
            for name, c in typer.main.get_command(group.app).commands.items()
        }
        for group in (drift, tenants)
    )
    for piece in code(document):
        if named := re.search(r"\bmanyhats (backup|restore|gc|merge)\b", piece):
            assert set(FLAG.findall(piece)) <= own[named[1]], piece
        elif re.search(r"\bmanyhats (serve|fetch-default|build-kernels)\b", piece):
            assert set(FLAG.findall(piece)) <= served, piece
        elif named := re.search(r"\bmanyhats adapters ([a-z]+)\b", piece):
            assert set(FLAG.findall(piece)) <= remote[named[1]], piece
        elif named := re.search(r"\bmanyhats drift ([a-z]+)\b", piece):
            assert set(FLAG.findall(piece)) <= watched[named[1]], piece
        elif named := re.search(r"\bmanyhats tenants ([a-z]+)\b", piece):
            assert set(FLAG.findall(piece)) <= given[named[1]], piece
        elif piece.startswith("--"):
            (flag, *_) = FLAG.findall(piece)
            known = served.union(*remote.values(), *own.values(), *watched.values())
            assert flag in known or f'"--{flag}"' in scripts, piece


def test_variables_exist(document):
    known = {f"MANYHATS_{name.upper()}" for name in Settings.model_fields} | CLIENT_VARIABLES
    assert set(re.findall(r"MANYHATS_[A-Z_]+[A-Z]", document.read_text("utf-8"))) <= known


def test_make_variables_exist(document):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    known = set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))
    for piece in code(document):
        if piece.startswith("make "):
            assert set(re.findall(r"\b([A-Z_]{3,})=", piece)) <= known, piece


def test_files_exist(document):
    text = document.read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (document.parent / link).exists(), link
    for piece in code(document):
        for path in re.findall(rf"(?<![\w./@-])(?:{FOLDERS})/[\w./*-]+", piece):
            assert any(ROOT.glob(path.rstrip("./"))), path


def test_modules_of_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = {p for p in INLINE.findall(text) if re.fullmatch(r"[a-z_]+/[a-z_]+\.py|[a-z_]+\.py", p)}
    assert len(named) > 10
    roots = (ROOT, ROOT / "server" / "manyhats")
    assert sorted(p for p in named if not any((r / p).exists() for r in roots)) == []


def test_the_architecture_has_a_sentence_for_every_folder():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    packages = [ROOT / "server" / "manyhats", ROOT / "kernels" / "manyhats_kernels"]
    folders = {p.parent for package in packages for p in package.rglob("__init__.py")} - {
        packages[0]
    }
    folders |= {ROOT / name for name in ("tests", "examples", "loadtests")}
    missing = [f for f in folders if f"`{f.relative_to(ROOT)}/`" not in text]
    assert missing == []


def test_the_api_reference_is_what_the_routes_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    made = importlib.import_module("generate_api")
    document = made.document()
    served = Api(routers=[module.router for module in ROUTES]).get("/openapi.json").json()
    assert document["paths"] == served["paths"]
    page = made.PAGE.read_text("utf-8")
    assert page == made.page(document), "it is not current: make api-docs"
    named = re.findall(r"^### ([A-Z]+) (/.*)$", page, re.MULTILINE)
    assert set(named) == {(m.upper(), p) for p, methods in served["paths"].items() for m in methods}
    assert len(named) > 45


def test_the_bounds_of_the_api_reference_are_the_models(monkeypatch):
    """The document goes through floats, in which a bound like 2**63 - 1 is another number."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    made = importlib.import_module("generate_api")
    document, page = made.document(), made.PAGE.read_text("utf-8")
    _, *parts = re.split("^### ", page, flags=re.MULTILINE)
    sections = dict(part.split("\n", 1) for part in parts)
    routers = [*ALWAYS, *(module.router for module in ROUTES)]
    checked, bounded = set(), 0
    for route in (route for router in routers for route in router.routes):
        [method] = route.methods
        called = f"{method} {route.path_format}"
        checked.add(called)
        content = (route.openapi_extra or {}).get("requestBody", {}).get("content", {})
        for kind, body in content.items():
            for part in made._body(kind, body["schema"], document):
                assert part in sections[called], f"{called}: {part}"
                bounded += 1
        for field in route.dependant.query_params:
            schema = TypeAdapter(Annotated[field.field_info.annotation, field.field_info])
            words = made._typed(schema.json_schema(), document)
            row = rf"\| (\*\*)?`{field.alias}`(\*\*)? \| query \| {re.escape(words)} \|"
            assert re.search(row, sections[called]), f"{called}: {field.alias}, {words}"
            bounded += 1
    assert checked == set(sections)
    assert bounded > 40


def test_json_in_the_readme_is_json():
    bodies = re.findall(r"-d '(\{.*?\})'", README.read_text("utf-8"), re.DOTALL)
    assert len(bodies) >= 3
    assert all(isinstance(json.loads(body), dict) for body in bodies)


def test_adapters_that_the_readme_asks_are_there():
    asked = set(re.findall(r"""["']?model["']?\s*[:=]\s*"([^"]+)\"""", README.read_text("utf-8")))
    there = {path.name for path in (ROOT / "examples" / "adapters").iterdir()}
    assert "pirate" in asked
    assert asked - {"SmolLM2-135M-Instruct"} <= there


def test_the_changelog_knows_this_version():
    lines = (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings[0] == "[Unreleased]"
    assert re.match(rf"\[{re.escape(__version__)}\] - (Unreleased|\d{{4}}-\d\d-\d\d)$", headings[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["version"] == __version__
