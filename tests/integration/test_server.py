"""Cog's real server over HTTP: success, bad input, cancel, several requests at once."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cog_server import Answer, CogServer, write_schema
from hostile import Attack, Target, attack, encoded, png, traps, url
from local_server import serving
from PIL import Image

from clipgen.config import ModelConfig
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.weights.model_dir import load_model_dir, save_model_dir


@pytest.fixture(scope="module")
def slow_weights(tiny_config: ModelConfig, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 256 tokens and a wider GPT: one image is quick, 64 take long enough to be cancelled."""
    vqgan = dataclasses.replace(tiny_config.vqgan, image_size=16 * tiny_config.vqgan.downsampling)
    gpt = dataclasses.replace(tiny_config.gpt, n_layer=4, n_embd=128, block_size=vqgan.num_tokens)
    config = dataclasses.replace(tiny_config, vqgan=vqgan, gpt=gpt)
    torch.manual_seed(0)
    networks = {"vqgan": VQGAN(config.vqgan).state_dict(), "gpt": GPT(config.gpt).state_dict()}
    clip = {name: tensor.clone() for name, tensor in load_model_dir(tiny_weights)[1]["clip"].items()}
    return save_model_dir(tmp_path_factory.mktemp("slow") / "slow", config, {"clip": clip, **networks})


@pytest.fixture(scope="module")
def server(root: Path, slow_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    folder = tmp_path_factory.mktemp("server")
    server = CogServer(root, folder / "log", CLIPGEN_WEIGHTS=str(slow_weights), TMPDIR=str(folder))
    try:
        assert server.wait()["status"] == "READY", server.log.read_text()
        yield server
    finally:
        server.stop()


def pictures(answer: Answer) -> list[Image.Image]:
    assert answer["status"] == "succeeded", answer
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in answer["output"]]


GRADIENT = encoded(Image.linear_gradient("L"), "PNG")


def test_success(server: CogServer) -> None:
    answer = server.predict(prompt="a lemon", num_outputs=2, candidates=3, seed=0)
    assert len({image.tobytes() for image in pictures(answer)}) == 2
    assert [url.partition(",")[0] for url in answer["output"]] == ["data:image/png;base64"] * 2
    metrics = answer["metrics"]
    assert metrics["seed"] == 0 and metrics["seconds"]["total"] > 0
    assert len(metrics["scores"]) == 2 and metrics["scores"] == sorted(metrics["scores"], reverse=True)


def test_an_image_and_another_format(server: CogServer) -> None:
    answer = server.predict(image=url(GRADIENT), candidates=1, output_format="webp", output_quality=50)
    assert pictures(answer)[0].format == "WEBP"


def test_a_long_prompt_works_and_the_answer_tells_what_was_dropped(server: CogServer) -> None:
    answer = server.predict(prompt=" ".join(f"word{i}" for i in range(500)), candidates=1)
    assert pictures(answer) and 0 < len(answer["metrics"]["dropped"]) <= 2000
    assert "too long" in answer["logs"] and "word" not in answer["logs"]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, ["prompt"]),
        ({"prompt": " "}, ["prompt"]),
        ({"prompt": "a", "num_outputs": 30}, ["num_outputs", "30", "8"]),
        ({"prompt": "a", "candidates": 65}, ["candidates", "65", "64"]),
        ({"prompt": "a", "num_outputs": 4, "candidates": 2}, ["candidates", "2", "4"]),
        ({"prompt": "a", "guidance": "strong"}, ["guidance", "strong"]),
        ({"prompt": "a", "temperature": "NaN"}, ["temperature", "NaN"]),
        ({"prompt": "a", "top_k": -1}, ["top_k", "-1"]),
        ({"prompt": "a", "top_p": 0}, ["top_p", "0"]),
        ({"prompt": "a", "top_p": 1.5}, ["top_p", "1.5"]),
        ({"prompt": "a", "seed": -1}, ["seed", "-1"]),
        ({"prompt": "a", "output_format": "bmp"}, ["output_format", "bmp", "webp"]),
        ({"prompt": "a", "output_quality": 0}, ["output_quality", "0", "100"]),
        ({"image": "/etc/hostname"}, ["image", "/etc/hostname", "data:"]),
        ({"image": url(b"")}, ["0 bytes"]),
        ({"image": url(GRADIENT[:200])}, ["truncated"]),
        ({"image": url(png(30_000, 30_000))}, ["megapixels"]),
        ({"image": url(b"not an image", "text/plain")}, ["not an image"]),
    ],
)
def test_bad_input_fails_with_a_message(server: CogServer, inputs: Answer, words: list[str]) -> None:
    answer = server.predict(**inputs)
    assert answer["status"] == "failed" and not answer.get("output")
    for word in words:
        assert word in answer["error"]
    assert "Traceback" not in answer["error"]


def test_nan_which_is_no_json_is_refused(server: CogServer) -> None:
    body = '{"input": {"prompt": "a", "temperature": NaN}}'
    answer = server.http.post("/predictions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "temperature" in answer.text


def test_two_at_once_both_succeed(server: CogServer) -> None:
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(server.predict, prompt=prompt, candidates=2, seed=5) for prompt in ("a", "b")]
        a, b = (pictures(future.result()) for future in futures)
    assert a[0].tobytes() == pictures(server.predict(prompt="a", candidates=2, seed=5))[0].tobytes()
    assert a[0].tobytes() != b[0].tobytes()


def test_cancel_frees_the_model_at_once(server: CogServer) -> None:
    slow = {"prompt": "a", "candidates": 64, "num_outputs": 1}
    started = time.monotonic()
    assert server.predict(**slow)["status"] == "succeeded"
    whole = time.monotonic() - started
    with ThreadPoolExecutor() as pool:
        running = pool.submit(server.http.put, "/predictions/running", json={"input": slow})
        time.sleep(whole / 10)
        waiting = pool.submit(server.http.put, "/predictions/waiting", json={"input": slow})
        time.sleep(whole / 10)
        started = time.monotonic()
        for name in ("waiting", "running"):
            assert server.http.post(f"/predictions/{name}/cancel").status_code == 200
        assert running.result().json()["status"] == waiting.result().json()["status"] == "canceled"
    assert server.predict(prompt="b", candidates=1)["status"] == "succeeded"
    assert time.monotonic() - started < whole / 2
    assert "Traceback" not in server.log.read_text()


def events(server: CogServer, **inputs: Any) -> list[tuple[str, Answer]]:
    """A prediction as it is streamed."""
    headers = {"Accept": "text/event-stream"}
    with server.http.stream("POST", "/predictions", json={"input": inputs}, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        blocks = "".join(answer.iter_text()).strip().split("\n\n")
    pairs = [dict(line.split(": ", 1) for line in block.splitlines() if ": " in line) for block in blocks]
    return [(pair["event"], json.loads(pair["data"])) for pair in pairs if "event" in pair]


@pytest.mark.slow
def test_previews_are_streamed_apart_from_the_outputs(root: Path, slow_weights: Path, tmp_path: Path) -> None:
    # Cog streams only where `cog build` has written down that `predict` is marked with @streaming.
    write_schema(tmp_path)
    (tmp_path / "predict.py").symlink_to(root / "predict.py")
    server = CogServer(tmp_path, tmp_path / "log", CLIPGEN_WEIGHTS=str(slow_weights), PYTHONPATH=str(root))
    try:
        assert server.wait()["status"] == "READY", server.log.read_text()
        found = events(server, prompt="a lemon", candidates=2, num_outputs=2, seed=0, previews=3)
        plain = server.predict(prompt="a lemon", candidates=2, num_outputs=2, seed=0)
    finally:
        server.stop()
    shown = [data["value"] for name, data in found if name == "metric" and data["name"] == "preview"]
    shown = [value for value in shown if value is not None]
    assert 1 <= len(shown) <= 3, [(name, str(data)[:200]) for name, data in found]
    assert all(value.startswith("data:image/webp") for value in shown)
    name, answer = found[-1]
    assert name == "completed" and len(pictures(answer)) == 2 and "preview" not in answer["metrics"]
    assert [a.tobytes() for a in pictures(answer)] == [b.tobytes() for b in pictures(plain)]


def test_eight_at_once_share_the_engine_and_get_their_own(server: CogServer) -> None:
    seeds = range(8)

    def ask(seed: int) -> Answer:
        answer = server.predict(prompt="a", candidates=1, seed=seed)
        while "At capacity" in (answer.get("error") or ""):  # Cog frees a slot a moment after its answer
            time.sleep(0.02)
            answer = server.predict(prompt="a", candidates=1, seed=seed)
        return answer

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, seeds))
    assert [answer["metrics"]["seed"] for answer in answers] == list(seeds)
    assert len({pictures(answer)[0].tobytes() for answer in answers}) == 8
    assert all(answer["metrics"]["seconds"]["queue"] < 1 for answer in answers)


def test_cancel_of_the_unknown(server: CogServer) -> None:
    assert server.http.post("/predictions/nobody/cancel").status_code == 404


@pytest.mark.slow
def test_broken_weights_fail_the_set_up(root: Path, tmp_path: Path) -> None:
    server = CogServer(root, tmp_path / "log", CLIPGEN_WEIGHTS=str(tmp_path / "nowhere"))
    try:
        health = server.wait()
        assert health["status"] == "SETUP_FAILED"
        assert "no such folder" in server.log.read_text()
    finally:
        server.stop()


def test_hostile_requests_are_refused_by_name(server: CogServer) -> None:
    with serving() as canary:
        target = Target(server, server.log.parent, canary)
        before, files, processes = target.picture(), target.files(), server.processes()
        for data in traps():
            target.send(Attack(json.dumps({"input": {"image": url(data)}}).encode(), frozenset({"image"})))
        attack(target, 150)
        assert not canary.requests, "the server fetched from its own machine"
    assert target.answers["failed"] > 50 and target.answers["400"] > 0, target.answers
    assert target.files() == files and server.processes() == processes
    assert target.picture() == before
