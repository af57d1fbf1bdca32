"""The calls that the page offers for copying, run as printed."""

from __future__ import annotations

import base64
import inspect
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from receipt_kit import RECEIPT

from clipgen.outputs.metadata import PromptPart
from clipgen.webui.snippets import as_curl, as_python

HOSTILE = 'it\'s a "lemon" \\ $(touch pwned) `touch pwned` %s {0} \u202e \U0001f34b\nnext line'


def sent_by(command: str, folder: Path) -> dict[str, Any]:
    """Inputs in the body that a command sends, recorded by a stand-in for curl."""
    curl = folder / "bin" / "curl"
    curl.parent.mkdir(exist_ok=True)
    # The last argument is the body, or @- for the standard input, of which curl drops the line breaks.
    curl.write_text(
        '#!/bin/sh\nfor last; do :; done\nif [ "$last" = @- ]; then tr -d "\\n"; else printf %s "$last"; fi\n'
    )
    curl.chmod(0o755)
    path = f"{curl.parent}:{Path(shutil.which('base64') or '').parent}:/usr/bin:/bin"
    done = subprocess.run(["sh", "-c", command], cwd=folder, env={"PATH": path}, capture_output=True, check=True)
    assert {file.name for file in folder.iterdir()} <= {"bin", "start.png", "kept.png"}
    return json.loads(done.stdout)["input"]


def called_by(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Any], dict[str, Any]]:
    """Weights and arguments that a script passes to the pipeline."""
    seen: list[Any] = []

    class Pipe:
        images = (Image.new("RGB", (1, 1)),)

        def __call__(self, *parts: Any, **settings: Any) -> Pipe:
            seen.extend([list(parts), settings])
            return self

    monkeypatch.setattr("clipgen.ClipGen.from_pretrained", lambda weights: seen.append(weights) or Pipe())
    monkeypatch.chdir(folder)
    exec(script, {})
    assert (folder / "image.png").exists()
    return seen[0], seen[1], seen[2]


SETTINGS = {"guidance": 1.5, "temperature": 0.8, "top_k": 9, "top_p": 0.5, "seed": 9}


@pytest.mark.parametrize("prompt", ["a lemon", HOSTILE])
def test_curl_sends_the_settings_and_expands_nothing(tmp_path: Path, prompt: str) -> None:
    record = replace(RECEIPT, prompt=(PromptPart(1.0, prompt),), negative=(PromptPart(1.0, prompt),))
    inputs = sent_by(as_curl(record), tmp_path)
    assert inputs == {**SETTINGS, "prompt": prompt, "negative_prompt": prompt, "num_outputs": 1, "candidates": 1}


def test_curl_sends_the_image_to_start_from(tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000  # longer than an argument may be
    (tmp_path / "start.png").write_bytes(data)
    image = PromptPart(0.5, image="0" * 64, name="photo.png")
    inputs = sent_by(as_curl(replace(RECEIPT, prompt=(image, PromptPart(1.0, HOSTILE)))), tmp_path)
    assert base64.b64decode(inputs.pop("image").removeprefix("data:image/png;base64,")) == data
    assert inputs == {**SETTINGS, "prompt": HOSTILE, "num_outputs": 1, "candidates": 1, "image_weight": 0.5}


def test_curl_sends_the_image_whose_rows_are_kept(tmp_path: Path) -> None:
    (tmp_path / "kept.png").write_bytes(b"data")
    inputs = sent_by(as_curl(replace(RECEIPT, keep="0" * 64, keep_rows=2)), tmp_path)
    assert inputs["keep_rows"] == 2 and inputs["image"].startswith("data:image/png;base64,ZGF0YQ")


def test_curl_snippet_names_settings_that_the_http_api_lacks() -> None:
    image = PromptPart(0.5, image="0" * 64)
    text = as_curl(replace(RECEIPT, prompt=(image, PromptPart(1.0, "a lemon")), keep="0" * 64, keep_rows=2))
    assert text.startswith("#") and "\n" not in text


def test_http_api_has_every_input_that_curl_sends() -> None:
    pytest.importorskip("cog")
    from predict import Predictor

    image = PromptPart(0.5, image="0" * 64)
    for record in (replace(RECEIPT, prompt=(image,)), replace(RECEIPT, keep="0" * 64, keep_rows=2)):
        text = as_curl(replace(record, negative=(PromptPart(1.0, "a dog"),)))
        names = json.loads(text[text.index("{") : text.index(', "image": ')] + "}}")["input"].keys()
        assert {*names, "image"} <= set(inspect.signature(Predictor.predict).parameters)


@pytest.mark.parametrize("prompt", ["a lemon", HOSTILE])
def test_python_calls_the_pipeline_with_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    record = replace(RECEIPT, prompt=(PromptPart(1.0, prompt),), negative=(PromptPart(1.0, prompt),))
    weights, parts, settings = called_by(as_python(record, "mini"), tmp_path, monkeypatch)
    assert (weights, parts) == ("weights/mini", [prompt])
    assert settings == {**SETTINGS, "negative_prompt": prompt}


def test_python_opens_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("start.png", "kept.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    image = PromptPart(0.5, image="0" * 64)
    record = replace(RECEIPT, prompt=(image, PromptPart(1.0, "a lemon")), keep="0" * 64, keep_rows=2)
    _, [[(start, weight), text]], settings = called_by(as_python(record, "mini"), tmp_path, monkeypatch)
    assert start.size == settings["keep"].size == (8, 8)
    assert (weight, text, settings["keep_rows"]) == (0.5, ("a lemon", 1.0), 2)
