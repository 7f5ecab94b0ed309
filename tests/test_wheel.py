"""What is installed: the wheel holds the package, the kernels' sources and the recipes, and finds them."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def tracked(directory: str) -> set[str]:
    """The files of a top-level directory, as they must lie in the wheel."""
    return {f"atomcli/_data/{path.relative_to(ROOT)}" for path in (ROOT / directory).rglob("*.*") if path.is_file()}


def test_wheel_holds_package_kernels_and_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"atomcli/cli/app.py", "atomcli/__main__.py"} <= names
    assert any(name.endswith(".yaml") for name in tracked("recipes"))
    assert tracked("recipes") - {"atomcli/_data/recipes/.gitkeep"} <= names
    assert {name for name in tracked("cuda") if name.endswith((".cu", ".cuh"))} <= names
    assert not [name for name in names if name.startswith(("tests/", ".scratch"))]


def test_installed_package_finds_its_files(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = "from atomcli.resources import resource_directory as d; print(d('recipes'), d('cuda'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "atomcli" / "_data" / name) for name in ("recipes", "cuda")]


def test_wheel_has_the_console_script_and_the_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "atom = atomcli.cli.app:main" in archive.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
