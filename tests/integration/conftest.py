"""The command line with the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_kit import Run
from PIL import Image
from typer.testing import CliRunner

from clipgen.cli.main import app


@pytest.fixture
def run(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("generate", ...)` in an empty folder, with the tiny model; images are written to "outputs"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPGEN_WEIGHTS", str(tiny_weights))
    return lambda *args, **kwargs: CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)


@pytest.fixture
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file "My Photo.png"."""
    path = tmp_path_factory.mktemp("photo") / "My Photo.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path
