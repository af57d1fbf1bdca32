"""The soak notices images of another request, predictions that end twice or never, and memory that grows."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
from soak import account
from soak_client import Client, Soak, backoff
from soak_server import CRASH, Supervised, slope

from clipgen.images.pixels import save_image
from clipgen.outputs.metadata import receipts
from clipgen.pipeline import ClipGen


@pytest.fixture(scope="module")
def answer(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The server's answer to the first request of client 1."""
    pipe = ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32")
    result = pipe("a lemon 1-1", num_outputs=1, candidates=2, seed=1_000_100)
    (receipt,) = receipts(pipe, result, "0" * 64)
    path = save_image(result.images[0], tmp_path_factory.mktemp("a") / "1.png", metadata=receipt.to_metadata())
    return {"status": "succeeded", "output": ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()]}


@pytest.mark.parametrize("change", [{}, {"prompt": "a lemon 2-1"}, {"seed": 7}, {"candidates": 1}, {"num_outputs": 2}])
def test_image_of_another_request_is_a_problem(answer: dict[str, Any], change: dict[str, Any]) -> None:
    soak = Soak("http://127.0.0.1:9")
    inputs = {"prompt": "a lemon 1-1", "seed": 1_000_100, "num_outputs": 1, "candidates": 2} | change
    Client(soak, 1).check(inputs, answer)
    assert bool(soak.problems) == bool(change)


def server(folder: Path, *lines: tuple[str, str]) -> Supervised:
    """A server that has left this log: pairs of prediction id and message."""
    logged = [
        json.dumps({"fields": {"message": said} | ({"prediction_id": name} if name else {})}) for name, said in lines
    ]
    (folder / "log").write_text("\n".join(["no JSON", *logged]))
    found = object.__new__(Supervised)
    found.folder = folder
    return found


BEGUN, DONE = "Starting prediction", "Prediction worker completed"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([("a", BEGUN), ("a", DONE), ("b", BEGUN), ("b", "Prediction failed")], ""),
        ([("a", BEGUN), ("", CRASH)], ""),
        ([("a", BEGUN), ("b", BEGUN), ("", CRASH)], "2 predictions have no end"),
        ([("a", BEGUN), ("a", DONE), ("a", "Prediction cancelled")], "more than once"),
    ],
)
def test_prediction_without_exactly_one_end_is_a_problem(
    tmp_path: Path, lines: list[tuple[str, str]], words: str
) -> None:
    soak = Soak("")
    account(soak, server(tmp_path, *lines))
    assert bool(soak.problems) == bool(words) and words in "".join(soak.problems)


def test_webhook_called_twice_is_a_problem(tmp_path: Path) -> None:
    soak = Soak("")
    soak.hooks["a"] = [{}, {}]
    account(soak, server(tmp_path))
    assert "webhooks" in soak.problems[0]


def test_memory_slope_excludes_the_warm_up_of_each_start() -> None:
    first = [(1, float(second), 500.0 + (300 if second < 10 else second)) for second in range(100)]
    second = [(2, 200.0 + second, 700.0) for second in range(50)]
    a, b = slope(first + second, warm=10)
    assert a["per_minute"] == pytest.approx(60) and a["most"] == 599 and a["seconds"] == 89
    assert b["per_minute"] == pytest.approx(0) and b["by_minute"] == [700]


def test_backoff_doubles_up_to_a_second() -> None:
    waits = [backoff(attempt, random.Random(0)) for attempt in range(40)]
    assert 0.1 <= waits[0] <= 0.15 and all(1 <= wait <= 1.5 for wait in waits[6:])
