"""serve.py: the schema that `cog build` would write, and one line for a port or host that cannot be used."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tracebacks import has_traceback

from clipgen.serving import DEFAULT_PROMPT, OUTPUT_FORMATS
from predict import Predictor
from serve import make_paths_absolute, max_concurrency, openapi, predict_function

FIELDS = {name: p.default for name, p in inspect.signature(Predictor.predict).parameters.items() if name != "self"}


@pytest.fixture(scope="module")
def source(root: Path) -> str:
    return (root / "predict.py").read_text(encoding="utf-8")


def test_schema_of_an_older_predictor_equals_that_of_cog(golden: Path) -> None:
    older = (golden / "predict_43da29e.py.txt").read_text(encoding="utf-8")
    assert openapi(older) == json.loads((golden / "openapi_43da29e.json").read_text())
    assert max_concurrency(older) == 8


def test_descriptions_that_cog_would_garble_are_detected(golden: Path) -> None:
    older = (golden / "predict_43da29e.py.txt").read_text(encoding="utf-8")
    assert garbled(older) == ["keep_rows", "top_p", "previews"]


def test_descriptions_reach_clients_as_they_are_written(source: str) -> None:
    assert garbled(source) == []


def garbled(source: str) -> list[str]:
    """Names of the inputs whose description in the schema is not the one that Python reads."""
    properties = openapi(source)["components"]["schemas"]["Input"]["properties"]
    predict = predict_function(source)
    found = []
    for argument, call in zip(predict.args.args[1:], predict.args.defaults, strict=True):
        assert isinstance(call, ast.Call)
        [said] = [ast.literal_eval(word.value) for word in call.keywords if word.arg == "description"]
        if properties[argument.arg]["description"] != said:
            found.append(argument.arg)
    return found


def test_schema_equals_the_declaration_of_the_predictor(source: str) -> None:
    document = openapi(source)
    schemas = document["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    assert list(properties) == list(FIELDS)
    for name, field in FIELDS.items():
        found = properties[name]
        assert found["default"] == field.default and found["description"] == field.description
        assert (found.get("minimum"), found.get("maximum")) == (field.ge, field.le)
    assert schemas["output_format"]["enum"] == FIELDS["output_format"].choices == list(OUTPUT_FORMATS)
    assert properties["image"]["format"] == "uri" and properties["image"]["x-cog-accept"] == "image/*"
    assert document["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    assert max_concurrency(source) == 8


def test_default_prompt_of_the_schema_is_that_of_the_service() -> None:
    assert FIELDS["prompt"].default == DEFAULT_PROMPT


@contextmanager
def listening(host: str) -> Iterator[int]:
    """A port that is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        taken.listen()
        yield taken.getsockname()[1]


def make_serve(root: Path, host: str, port: object) -> subprocess.CompletedProcess[str]:
    """`make serve`, in the environment of the tests."""
    command = ["make", "--no-print-directory", "-o", f"{sys.prefix}/.run", f"VENV={sys.prefix}"]
    return subprocess.run(
        [*command, f"HOST={host}", f"PORT={port}", "serve"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_port_in_use_is_one_line(root: Path) -> None:
    with listening("127.0.0.1") as port:
        done = make_serve(root, "127.0.0.1", port)
    assert done.returncode and not has_traceback(done.stderr)
    assert f"error: cannot listen on 127.0.0.1, port {port}: Address already in use" in re.sub(r"\s+", " ", done.stderr)


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("no-such-host.invalid", 5000, "cannot listen on no-such-host.invalid"),
        ("203.0.113.9", 5000, "cannot listen on 203.0.113.9"),
        ("x..y", 5000, "this is no host name"),
        ("127.0.0.1", "http", "--port"),
        ("127.0.0.1", 70000, "--port is 70000; it must be from 1 to 65535"),
    ],
)
def test_wrong_host_or_port_is_one_line(root: Path, host: str, port: object, words: str) -> None:
    done = make_serve(root, host, port)
    assert done.returncode and not has_traceback(done.stderr)
    assert words in re.sub(r"\s+", " ", done.stderr)


def test_folders_of_the_environment_stay_those_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("CLIPGEN_CACHE", "cache")
    for given, kept in (("./mine", str(tmp_path / "mine")), ("coco", "coco"), ("hf://a/b", "hf://a/b")):
        monkeypatch.setenv("CLIPGEN_WEIGHTS", given)
        make_paths_absolute()
        assert os.environ["CLIPGEN_WEIGHTS"] == kept and os.environ["CLIPGEN_CACHE"] == str(tmp_path / "cache")
