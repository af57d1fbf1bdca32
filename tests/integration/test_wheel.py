"""The wheel: its requirements, and generating with nothing else of the project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from PIL import Image

from clipgen.weights.model_dir import FILES, MANIFEST


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(root: Path, *names: str) -> dict[str, str]:
    """Versions by package, of some requirements files."""
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in names)
    return {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def test_every_range_of_the_wheel_admits_the_tested_pin(root: Path, project: dict) -> None:
    tested = pins(root, "requirements.txt", "requirements-train.txt", "requirements-app.txt", "requirements-dev.txt")
    ranges = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    for requirement in map(Requirement, ranges):
        assert requirement.specifier.contains(tested[requirement.name]), requirement
        assert "==" not in str(requirement.specifier), "a pin would keep clipgen from fitting beside other packages"


def test_base_requirements_are_those_of_the_image_without_the_server(root: Path, project: dict) -> None:
    base = {Requirement(text).name for text in project["dependencies"]}
    assert base == set(pins(root, "requirements.txt")) - {"cog", "coglet"}
    assert set(project["optional-dependencies"]) == {"app", "eval", "hub", "serve", "train"}


def test_packages_that_affect_images_are_pinned(root: Path) -> None:
    lines = [line.split("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if line)
    assert {"torch", "torchvision", "numpy", "pillow", "ftfy", "regex", "coglet"} <= set(pins(root, "requirements.txt"))


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], cwd=root, check=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.slow
def test_wheel_holds_the_package_and_the_mini_model_only(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        required = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    assert {name.split("/")[0] for name in names} == {"clipgen", metadata.split("/")[0]}
    assert {f"clipgen/_weights/mini/{file}" for file in (*FILES, MANIFEST)} <= set(names)
    assert not any(Requirement(text).name == "cog" for text in required if "extra ==" not in text)
    assert wheel.stat().st_size < 80e6


@pytest.mark.slow
def test_installed_wheel_generates_offline_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment, in which only the requirements come from the environment of the tests."""
    environment, home, work = tmp_path / "env", tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))  # a path added so reads no .pth files itself

    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CLIPGEN_", "PYTHON"))}
    environ |= {"HOME": str(home), "CLIPGEN_OFFLINE": "1"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import clipgen, importlib.util as u; print(clipgen.__file__, u.find_spec('train'))")
    assert where.startswith(str(packages)) and where.rstrip().endswith("None")

    run(
        environment / "bin" / "clipgen",
        "generate",
        "a lemon",
        "--seed",
        "7",
        "-n",
        "1",
        "--candidates",
        "1",
        "--out",
        "cli",
    )
    (drawn,) = (work / "cli").glob("*.png")
    code = (
        "from clipgen import ClipGen; ClipGen.from_pretrained('mini')('a lemon', seed=7).images[0].save('python.png')"
    )
    run(python, "-c", code)
    assert Image.open(drawn).tobytes() == Image.open(work / "python.png").tobytes()
    assert not list(home.iterdir()), "nothing was downloaded or cached"
