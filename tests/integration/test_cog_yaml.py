"""cog.yaml: the files it names exist, its pins are exact, and Cog's own schema accepts it (COG_SCHEMA: another)."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml


@pytest.fixture(scope="module")
def config(root: Path) -> dict:
    return yaml.safe_load((root / "cog.yaml").read_text())


def test_predictor_named_in_cog_yaml_exists(root: Path, config: dict) -> None:
    file, name = config["predict"].split(":")
    classes = {node.name: node for node in ast.parse((root / file).read_text()).body if isinstance(node, ast.ClassDef)}
    assert name in classes
    methods = {node.name for node in classes[name].body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert {"setup", "predict"} <= methods


def test_requirements_of_the_container_are_exact_pins(root: Path, config: dict) -> None:
    lines = (root / config["build"]["python_requirements"]).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert [pin for pin in pins if not re.match(r"[A-Za-z0-9._-]+==[0-9][\w.]*(\s+#.*)?$", pin)] == []


def test_container_and_local_server_use_the_same_cog(root: Path, config: dict) -> None:
    requirements = (root / config["build"]["python_requirements"]).read_text()
    assert f"\ncog=={config['build']['sdk_version']}\n" in requirements


def test_schema_of_cog_accepts_cog_yaml(config: dict, golden: Path) -> None:
    path = os.environ.get("COG_SCHEMA") or golden / "cog_config_schema_v1.0.json"
    schema = json.loads(Path(path).read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):  # the schema does judge
        jsonschema.validate(config | {"concurrency": {"max": "eight"}}, schema)


def test_cuda_version_has_kernels_for_the_t4_and_starts_with_older_drivers(config: dict) -> None:
    """PyTorch's wheels for CUDA 12.6 have sm_75; its base image accepts the drivers 470, 535, 550 and from 560 on."""
    assert config["build"]["gpu"] is True
    assert config["build"]["cuda"] == "12.6"  # a string: YAML would read 12.10 as 12.1


def test_commented_settings_for_weights_are_valid(root: Path) -> None:
    """The settings in the comments are valid, and weights/ is not excluded from the image."""
    commented = [line[2:] for line in (root / "cog.yaml").read_text().splitlines() if line.startswith("# environment")]
    lines = [line[2:] for line in (root / "cog.yaml").read_text().splitlines() if line.startswith("#   - ")]
    values = yaml.safe_load("\n".join([*commented, *lines]))["environment"]
    assert values == ["CLIPGEN_WEIGHTS=/weights", "CLIPGEN_WEIGHTS=coco", "CLIPGEN_WEIGHTS=hf://user/model"]
    ignored = (root / ".dockerignore").read_text().split()
    assert not {"weights", "weights/", "clipgen", "predict.py", "requirements.txt"} & set(ignored)
