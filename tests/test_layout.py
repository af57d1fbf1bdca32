"""The import order: lower layers only, never sideways or up; `cog` only in predict.py; clipgen never imports train."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# A new module gets a line here. `clipgen` is the package's face: it sits right above the pipeline it exports.
LAYERS = {
    "clipgen.catalog": 0,
    "clipgen.checks": -1,
    "clipgen.training": -0.5,
    "clipgen.config": 0,
    "clipgen.download": 0,
    "clipgen.images": 0,
    "clipgen.urls": 0,
    "clipgen.skeleton": 0,
    "clipgen.figures": 1,
    "clipgen.vqgan": 1,
    "clipgen.gpt": 1,
    "clipgen.clip": 1,
    "clipgen.fetch": 1,
    "clipgen.weights": 1,
    "clipgen.request": 1,
    "clipgen.sources": 1,
    "clipgen.processes": 0,
    "clipgen.metrics": 0,
    "clipgen.captioner": 1,
    "clipgen.features": 2,
    "clipgen.memory": 1,
    "clipgen.convert": 2,
    "clipgen.coverage": 2,
    "clipgen.foreign": 2,
    "clipgen.quantise": 2,
    "clipgen.precision": 2.5,
    "clipgen.worker": 0,
    "clipgen.files": 0,
    "clipgen.receipt_rules": 2,
    "clipgen.sampling": 2,
    "clipgen.graphs": 2.2,
    "clipgen.batch": 2.25,  # pictures in one cache, which know nothing of who asked for them
    "clipgen.engine": 2.5,
    "clipgen.painter": 2.5,
    "clipgen.pipeline": 3,
    "clipgen.checkpoints": 3,
    "clipgen": 3.5,
    "clipgen.receipt": 3.6,
    "clipgen.evaluate": 3.6,
    "clipgen.bulk": 3.7,
    "clipgen.bulk_cli": 3.74,
    "clipgen.doctor": 3.7,
    "clipgen.terminal": 3.7,
    "clipgen.weights_cli": 3.75,  # parts of the command line, which they do not know
    "clipgen.doctor_cli": 3.75,
    "clipgen.evaluate_cli": 3.75,
    "clipgen.generate_cli": 3.75,
    "clipgen.morph_cli": 3.75,
    "clipgen.replay_cli": 3.75,
    "clipgen.sheet_cli": 3.75,
    "clipgen.app_actions": 3.8,
    "clipgen.app_guard": 3.8,
    "clipgen.app": 3.85,
    "clipgen.app_cli": 3.9,
    "clipgen.cli": 4,
    "predict": 4,
    "clipgen.__main__": 5,
    "train": 2,
    "train.checkpoint": 1,
    "train.health": 1,
    "train.sharding": 0.5,
    "train.logger": 1.5,
    "train.codes": 2,
    "train.gan": 3,
    "train.clip_loss": 2,
    "train.stopping": 1,
    "train.captions": 2,
    "train.data": 2,
    "train.losses": 2.5,
    "train.common": 2,
    "train.words": 3,
    "train.encode": 3,
    "train.emoji": 4,
    "train.things": 4,
    "train.clip_data": 4,
    "train.clip_image": 5,
    "train.clip_text": 5,
    "train.check": 4,
    "train.stage1": 4,
    "train.stage2": 4,
    "train.export": 6,
    "train.roundtrip": 5,
    "train.card": 5,
    "train.all": 7,
    "train.index": 5,
}


def module_name(path: Path, root: Path) -> str:
    """`clipgen/gpt.py` -> `clipgen.gpt`; a package's `__init__.py` has the package's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, known: set[str], is_package: bool = False) -> Iterator[str]:
    """Every module that `source` imports, at any depth of the file, with relative names resolved."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from clipgen import gpt` imports clipgen.gpt, `from clipgen import X` clipgen
                name = f"{base}.{alias.name}"
                yield name if name in known else base


def violations(source: str, module: str, layers: dict[str, float] = LAYERS, is_package: bool = False) -> list[str]:
    """What `source`, as the text of `module`, imports against the rules; [] when it keeps them."""
    if module not in layers:
        return [f"{module} has no layer: give it one in tests/test_layout.py"]
    found = []
    for name in imported(source, module, set(layers), is_package):
        top = name.split(".")[0]
        if top == "cog" and module != "predict":
            found.append(f"{module} imports cog; only predict.py may")
        elif top == "train" and not module.startswith("train"):
            found.append(f"{module} imports {name}; only train may")
        elif top in {"clipgen", "train", "predict"} and name not in layers:
            found.append(f"{module} imports {name}, which has no layer: give it one in tests/test_layout.py")
        elif name in layers and layers[name] >= layers[module]:
            found.append(f"{module} [{layers[module]}] imports {name} [{layers[name]}]: not a lower layer")
    return found


def sources(root: Path) -> list[Path]:
    return [root / "predict.py", *sorted(root.glob("clipgen/**/*.py")), *sorted(root.glob("train/**/*.py"))]


def test_every_module_imports_lower_layers_only(root: Path) -> None:
    paths = [path for path in sources(root) if path.exists()]
    assert len(paths) > 2
    found = [
        line
        for path in paths
        for line in violations(path.read_text(), module_name(path, root), is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_cog_stays_out_of_the_benchmarks(root: Path) -> None:
    for path in root.glob("benchmarks/**/*.py"):
        assert not {name.split(".")[0] for name in imported(path.read_text(), "benchmark", set())} & {"cog"}, path


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("clipgen.gpt", "import clipgen.sampling"),
        ("clipgen.gpt", "from clipgen.sampling import sample"),
        ("clipgen.gpt", "from clipgen import sampling"),
        ("clipgen.gpt", "from . import pipeline"),
        ("clipgen.gpt", "from .vqgan import VQGAN"),
        ("clipgen.gpt", "def late():\n    from clipgen import pipeline"),
        ("clipgen.sampling", "from clipgen import ClipGen"),
        ("clipgen.cli", "import cog"),
        ("clipgen.cli", "from cog.server import http"),
        ("train.stage1", "import cog"),
        ("clipgen.pipeline", "from train.data import Images"),
        ("predict", "import train.data"),
        ("train.losses", "from train import gan"),
        ("train.common", "from clipgen.sampling import sample"),
        ("clipgen.novelty", "import json"),
        ("clipgen.cli", "import clipgen.novelty"),
    ],
)
def test_the_checker_catches(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("clipgen.pipeline", "import clip\nfrom clipgen import gpt, images\nfrom .sampling import sample"),
        ("clipgen.cli", "from clipgen import ClipGen"),
        ("predict", "import cog\nfrom cog import BasePredictor\nfrom clipgen import ClipGen"),
        ("train.stage2", "from clipgen.pipeline import ClipGen\nfrom train.common import save"),
        ("clipgen.config", "import cogent\nimport trainer"),
    ],
)
def test_the_checker_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_package_face_resolves_relative_imports() -> None:
    assert violations("from .pipeline import ClipGen", "clipgen", is_package=True) == []
    assert violations("from .cli import app", "clipgen", is_package=True)
