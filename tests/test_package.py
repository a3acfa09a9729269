"""What is built from the tree: one wheel with both packages, typed, with the kernels' C sources."""

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "manyhats": ROOT / "server" / "manyhats",
    "manyhats_kernels": ROOT / "kernels" / "manyhats_kernels",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("dist")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_both_packages_whole(wheel):
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in {".py", ".c", ".h", ".typed"}
    }
    assert expected <= wheel
    assert any(
        name.startswith("manyhats_kernels/native/") and name.endswith(".c") for name in wheel
    )
    assert {"manyhats/py.typed", "manyhats_kernels/py.typed"} <= wheel


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"manyhats", "manyhats_kernels", "manyhats-0.1.0.dist-info"}
    assert not [name for name in wheel if name.endswith((".so", ".pyc", ".o"))]
    assert "manyhats-0.1.0.dist-info/licenses/LICENSE" in wheel
