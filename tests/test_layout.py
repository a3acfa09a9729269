"""The shape of the source: sizes, the direction of imports, and what may appear where."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "server" / "manyhats", ROOT / "kernels" / "manyhats_kernels")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "loadtests").rglob("*.py")])
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def trees():
    return {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def found(trees, wanted):
    """`file:line` of every node for which `wanted(path, node)` holds."""
    return [
        f"{relative(path)}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if wanted(path, node)
    ]


def nothing(places):
    """Fails with one place a line."""
    assert not places, "\n" + "\n".join(places)


def dotted(node):
    """`os.environ` of an attribute, `print` of a name; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_check_sees_the_source():
    assert len(SOURCES) > 20
    assert {relative(p).split("/")[0] for p in SOURCES} == {"server", "kernels"}


def test_no_file_is_too_long():
    sizes = {relative(p): len(p.read_text("utf-8").splitlines()) for p in SOURCES + SCRIPTS}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}


def test_no_function_is_too_long(trees):
    """Of a GPU kernel the body counts: its arguments, one a line, are what it is launched with."""

    def long(path, node):
        if not isinstance(node, FUNCTIONS):
            return False
        kernel = any(dotted(getattr(d, "func", d)) == "triton.jit" for d in node.decorator_list)
        first = node.body[0].lineno if kernel else node.lineno
        return node.end_lineno - first >= MAX_FUNCTION_LINES

    nothing(found(trees, long))


def test_only_the_two_packages_are_packages():
    for folder in ("server", "kernels", "tests"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
    assert [relative(p) for p in TESTS if p.name == "__init__.py"] == []


def test_every_folder_of_a_package_is_one():
    folders = {path.parent for path in SOURCES}
    assert [relative(f) for f in folders if not (f / "__init__.py").exists()] == []


def test_the_environment_is_read_in_config_alone(trees):
    def reads(path, node):
        outside = path != PACKAGES[0] / "config.py"
        imported = (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {"environ", "environb", "getenv"} & {alias.name for alias in node.names}
        )
        named = isinstance(node, ast.Attribute) and dotted(node) in {
            "os.environ",
            "os.environb",
            "os.getenv",
        }
        return outside and bool(imported or named)

    nothing(found(trees, reads))


def test_adapters_are_resolved_only_where_the_tenant_is_asked_for(trees):
    """A reference to an adapter is made in lifecycle alone, by look-ups that take the tenant."""
    lifecycle = PACKAGES[0] / "lifecycle"
    roots = {PACKAGES[0] / f"{name}.py" for name in ("app", "services", "merge")}

    def made(path, node):
        named = isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "AdapterRef"
        return named and lifecycle not in path.parents

    def beside(path, node):
        module = getattr(node, "module", None) or ""
        registry = isinstance(node, ast.ImportFrom) and module == "manyhats.lifecycle.registry"
        return registry and lifecycle not in path.parents and path not in roots

    nothing(found(trees, made))
    nothing(found(trees, beside))
    (directory,) = [t for p, t in trees.items() if p == lifecycle / "directory.py"]
    methods = [n for n in ast.walk(directory) if isinstance(n, FUNCTIONS)]
    takes = {m.name: [a.arg for a in m.args.args] for m in methods}
    assert takes == {"resolve": ["self", "model", "tenant", "hint"], "list": ["self", "tenant"]}


def test_nothing_is_asserted_or_printed(trees):
    def loud(path, node):
        return isinstance(node, ast.Assert) or (
            isinstance(node, ast.Call) and dotted(node.func) == "print"
        )

    nothing(found(trees, loud))


def test_nothing_is_unpickled_or_evaluated(trees):
    names = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "marshal.loads"}
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}

    def unsafe(path, node):
        if isinstance(node, ast.Import):
            return bool(modules & {alias.name.split(".")[0] for alias in node.names})
        if isinstance(node, ast.ImportFrom):
            return (node.module or "").split(".")[0] in modules
        return isinstance(node, ast.Call) and dotted(node.func) in names

    nothing(found(trees, unsafe))


def test_no_exception_is_swallowed(trees):
    def swallows(path, node):
        if not isinstance(node, ast.ExceptHandler):
            return False
        bare = node.type is None or dotted(node.type) in {"Exception", "BaseException"}
        silent = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
        return bare and silent

    nothing(found(trees, swallows))


def test_what_is_public_is_documented(trees):
    missing = []
    for path, tree in trees.items():
        if not ast.get_docstring(tree):
            missing.append(relative(path))
        # Public names of the module and of its public classes; what a function defines is its own.
        scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
        missing += [
            f"{relative(path)}:{node.lineno} {node.name}"
            for scope in scopes
            for node in scope.body
            if isinstance(node, (*FUNCTIONS, ast.ClassDef))
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
            and not any(dotted(d).endswith(("setter", "overload")) for d in node.decorator_list)
        ]
    nothing(missing)


def test_nothing_is_left_to_do():
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK", "NotImplemented" + "Error")
    lines = [
        f"{relative(path)}:{number}"
        for path in SOURCES + TESTS + SCRIPTS
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    nothing(lines)


def test_imports_run_one_way(scripts):
    done = subprocess.run(
        [scripts / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: " in done.stdout
    assert " 0 broken" in done.stdout


def test_every_module_is_held_to_a_direction(project):
    """A new folder or module beside the others must be named in the layers of pyproject.toml."""
    (layers,) = [
        contract["layers"]
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    ]
    named = {name.strip() for layer in layers for name in layer.split("|")}
    there = {
        f"manyhats.{path.stem}"
        for path in PACKAGES[0].iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }
    assert there == named


EXTRAS = {"opentelemetry": ("otel", "telemetry/"), "ray": ("ray", "fleet/ray_serve.py")}
"""Libraries that only an extra brings, and the only place that may import them."""


def test_every_library_that_is_imported_is_declared(trees, project):
    """Not left to come along with another one, which may drop it."""
    extras = project["project"]["optional-dependencies"]
    named = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in project["project"]["dependencies"]]
    declared = {name.lower().replace("_", "-") for name in named}
    distributions = packages_distributions()

    def undeclared(path, module):
        top = module.split(".")[0]
        if top in EXTRAS:
            extra, place = EXTRAS[top]
            declared_there = any(re.match(rf"{top}\b", line) for line in extras[extra])
            return not declared_there or not relative(path).startswith(f"server/manyhats/{place}")
        # torch's own build names the triton that it needs, pydantic the exact version of its core
        ours = {"manyhats", "manyhats_kernels", "triton", "pydantic_core"}
        if top in sys.stdlib_module_names or top in ours:
            return False
        return not declared & {n.lower().replace("_", "-") for n in distributions.get(top, [])}

    def stray(path, node):
        if isinstance(node, ast.Import):
            return any(undeclared(path, alias.name) for alias in node.names)
        return isinstance(node, ast.ImportFrom) and undeclared(path, node.module or "")

    nothing(found(trees, stray))
