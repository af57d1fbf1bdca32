"""Cog's real server over HTTP, with and without the input schema: images, refusals, streams, webhooks, cancelling."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from cog_server import Answer, CogServer, running
from hostile import Attack, Target, attack, traps, url
from image_files import encoded, png
from local_server import serving
from PIL import Image
from tracebacks import has_traceback

from clipgen.config import ModelConfig
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.outputs.metadata import KEY, Receipt
from clipgen.serving import DEFAULT_PROMPT
from clipgen.weights.model_dir import load_model_dir, save_model_dir
from serve import openapi


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
def bare(slow_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """A server without the input schema."""
    folder = tmp_path_factory.mktemp("bare")
    with running(folder, schema=False, CLIPGEN_WEIGHTS=str(slow_weights), TMPDIR=str(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def image_like(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """A server with the input schema, as in an image that `cog build` has made."""
    folder = tmp_path_factory.mktemp("image")
    with running(folder, CLIPGEN_WEIGHTS=str(tiny_weights), TMPDIR=str(folder)) as server:
        yield server


@pytest.fixture(params=["bare", "image_like"])
def server(request: pytest.FixtureRequest) -> CogServer:
    """Each of the two in turn."""
    return request.getfixturevalue(request.param)


def images(answer: Answer) -> list[Image.Image]:
    assert answer["status"] == "succeeded", answer
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in answer["output"]]


def receipt(answer: Answer) -> Receipt:
    """The receipt in the first image of an answer."""
    return Receipt.from_metadata({KEY: images(answer)[0].info[KEY]})


GRADIENT = encoded(Image.linear_gradient("L"), "PNG")


def test_request_without_inputs_uses_the_default_prompt(server: CogServer) -> None:
    answer = server.http.post("/predictions", json={"input": {}}).json()
    assert receipt(answer).text == DEFAULT_PROMPT


def test_outputs_are_data_urls_best_first_with_metrics(server: CogServer) -> None:
    answer = server.predict(prompt="a lemon", num_outputs=2, candidates=3, seed=0)
    assert len({image.tobytes() for image in images(answer)}) == 2
    assert [url.partition(",")[0] for url in answer["output"]] == ["data:image/png;base64"] * 2
    metrics = answer["metrics"]
    assert metrics["seed"] == 0 and metrics["seconds"]["total"] > 0
    assert len(metrics["scores"]) == 2 and metrics["scores"] == sorted(metrics["scores"], reverse=True)


def test_image_alone_is_varied_in_the_requested_format(server: CogServer) -> None:
    answer = server.predict(image=url(GRADIENT), candidates=1, output_format="webp", output_quality=50)
    assert images(answer)[0].format == "WEBP"
    alone = server.predict(image=url(GRADIENT), candidates=1, seed=0)
    empty = server.predict(image=url(GRADIENT), candidates=1, seed=0, prompt="")
    assert receipt(alone).text == "an image" and images(alone)[0].tobytes() == images(empty)[0].tobytes()


@pytest.mark.parametrize("wrap", ["\n", "\r\n"])
def test_wrapped_base64_is_the_same_image(server: CogServer, wrap: str) -> None:
    lines = base64.encodebytes(GRADIENT).decode().replace("\n", wrap)
    assert lines.count(wrap) > 3
    wrapped = server.predict(image=f"data:image/png;base64,{lines}", candidates=1, seed=0)
    plain = server.predict(image=url(GRADIENT), candidates=1, seed=0)
    assert images(wrapped)[0].tobytes() == images(plain)[0].tobytes()


def test_long_prompt_is_truncated_and_the_metrics_hold_the_rest(server: CogServer) -> None:
    answer = server.predict(prompt=" ".join(f"word{i}" for i in range(500)), candidates=1)
    assert images(answer) and 0 < len(answer["metrics"]["dropped"]) <= 2000
    assert "too long" in answer["logs"] and "word" not in answer["logs"]


def test_whole_number_with_a_decimal_point_is_accepted(server: CogServer) -> None:
    answer = server.predict(prompt="a", candidates=2.0, num_outputs=1.0, seed=7.0, top_k=5.0)
    found = receipt(answer)
    assert (found.candidates, found.num_outputs, found.seed, found.top_k) == (2, 1, 7, 5)
    assert answer["metrics"]["seed"] == 7 and isinstance(answer["metrics"]["seed"], int)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a", "num_outputs": 4, "candidates": 2}, "candidates is 2; it must be at least num_outputs, 4"),
        ({"prompt": "a", "top_p": 0}, "top_p is 0; it must be above 0"),
        ({"prompt": "a", "keep_rows": 2}, "keep_rows is 2; it needs an image"),
        ({"prompt": "a", "top_k": 2**31}, "top_k is 2147483648; it must be a whole number from 0"),
        ({"prompt": "a", "negative_prompt": "b", "guidance": 1}, "guidance is 1; a negative prompt"),
        ({"image": "/etc/hostname"}, "image cannot be used: '/etc/hostname' is not a data: or http(s): URL"),
        ({"image": url(b"")}, "image cannot be used: the given image is empty (0 bytes)"),
        ({"image": url(GRADIENT[:200])}, "truncated"),
        ({"image": url(png(30_000, 30_000, 8, 2, b""))}, "megapixels"),
        ({"image": url(b"not an image", "text/plain")}, "is not an image that can be read"),
    ],
)
def test_refusals_by_the_predictor_are_the_same_with_and_without_schema(
    server: CogServer, inputs: dict[str, Any], words: str
) -> None:
    answer = server.predict(**inputs)
    assert answer["status"] == "failed" and not answer.get("output")
    assert words in answer["error"] and not has_traceback(answer["error"])


OUT_OF_BOUNDS = [
    ("num_outputs", 30, "num_outputs is 30; it must be a whole number from 1 to 8"),
    ("candidates", 65, "candidates is 65; it must be a whole number from 1 to 64"),
    ("guidance", "strong", "guidance is 'strong'; it must be a number from 0 to 30"),
    ("temperature", "NaN", "temperature is 'NaN'; it must be a number from 0 to 10"),
    ("top_k", -1, "top_k is -1; it must be a whole number from 0"),
    ("top_p", 1.5, "top_p is 1.5; it must be a number above 0 and at most 1"),
    ("seed", -1, "seed is -1; it must be a whole number from 0 to 2147483647"),
    ("seed", 0.5, "seed is 0.5; it must be a whole number"),
    ("output_format", "bmp", "output_format is 'bmp'; it must be one of png, webp, jpg"),
    ("output_quality", 0, "output_quality is 0; it must be a whole number from 1 to 100"),
    ("prompt", 5, "prompt is 5; it must be text"),
    ("image_weight", None, "image_weight is None; it must be a number from -100 to 100"),
]


@pytest.mark.parametrize(("name", "value", "words"), OUT_OF_BOUNDS)
def test_value_out_of_bounds_without_schema_fails_with_its_name(
    bare: CogServer, name: str, value: Any, words: str
) -> None:
    answer = bare.predict(**{"prompt": "a", name: value})
    assert answer["status"] == "failed" and words in answer["error"]


@pytest.mark.parametrize(("name", "value", "words"), OUT_OF_BOUNDS)
def test_value_out_of_bounds_with_schema_is_a_422_with_its_name(
    image_like: CogServer, name: str, value: Any, words: str
) -> None:
    answer = image_like.http.post("/predictions", json={"input": {"prompt": "a", name: value}})
    assert answer.status_code == 422
    assert [found["loc"] for found in answer.json()["detail"]] == [["body", "input", name]]


def test_null_is_refused_with_schema_and_the_default_without(bare: CogServer, image_like: CogServer) -> None:
    inputs = {"prompt": "a", "candidates": 1, "seed": 1, "guidance": None, "image": None}
    assert images(bare.predict(**inputs))
    answer = image_like.http.post("/predictions", json={"input": inputs})
    assert answer.status_code == 422 and "guidance" in answer.text and "image" in answer.text


def test_unknown_input_is_dropped_with_schema_and_refused_by_name_without(
    bare: CogServer, image_like: CogServer
) -> None:
    inputs = {"prompt": "a", "candidates": 1, "seed": 1, "steps": 50}
    assert images(image_like.predict(**inputs))
    answer = bare.predict(**inputs)
    assert answer["status"] == "failed" and "steps" in answer["error"]


def test_openapi_is_the_schema_of_the_predictor(bare: CogServer, image_like: CogServer, root: Path) -> None:
    assert image_like.http.get("/openapi.json").json() == openapi((root / "predict.py").read_text())
    assert bare.http.get("/openapi.json").status_code == 503


def test_nan_is_refused_as_invalid_json(server: CogServer) -> None:
    body = '{"input": {"prompt": "a", "temperature": NaN}}'
    answer = server.http.post("/predictions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "temperature" in answer.text


def test_two_requests_at_once_get_their_own_images(server: CogServer) -> None:
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(server.predict, prompt=prompt, candidates=2, seed=5) for prompt in ("a", "b")]
        a, b = (images(future.result()) for future in futures)
    assert a[0].tobytes() == images(server.predict(prompt="a", candidates=2, seed=5))[0].tobytes()
    assert a[0].tobytes() != b[0].tobytes()


def test_cancelled_prediction_frees_the_model_at_once(bare: CogServer) -> None:
    slow = {"prompt": "a", "candidates": 64, "num_outputs": 1}
    started = time.monotonic()
    assert bare.predict(**slow)["status"] == "succeeded"
    whole = time.monotonic() - started
    with ThreadPoolExecutor() as pool:
        running = pool.submit(bare.http.put, "/predictions/running", json={"input": slow})
        time.sleep(whole / 10)
        waiting = pool.submit(bare.http.put, "/predictions/waiting", json={"input": slow})
        time.sleep(whole / 10)
        for name in ("waiting", "running"):
            while bare.http.post(f"/predictions/{name}/cancel").status_code == 404:  # it has not arrived yet
                assert time.monotonic() - started < 10 * whole + 60
                time.sleep(whole / 20)
        started = time.monotonic()
        for answer in (running.result().json(), waiting.result().json()):
            # Cog calls one that is canceled while it starts "failed".
            assert answer["status"] == "canceled" or "CancelationException" in str(answer["error"]), answer
    assert time.monotonic() - started < whole / 2
    assert bare.predict(prompt="b", candidates=1)["metrics"]["seconds"]["queue"] < whole / 2
    assert not has_traceback(bare.log.read_text())


def test_previews_are_streamed_separately_from_the_outputs(image_like: CogServer) -> None:
    inputs = {"prompt": "a lemon", "candidates": 2, "num_outputs": 2, "seed": 0}
    found = image_like.stream(**inputs, previews=3)
    plain = image_like.predict(**inputs)
    previews = [data["value"] for name, data in found if name == "metric" and data["name"] == "preview"]
    shown = [value for value in previews if value is not None]
    assert 1 <= len(shown) <= 3, [(name, str(data)[:200]) for name, data in found]
    assert previews[-1] is None and all(value.startswith("data:image/webp") for value in shown)
    name, answer = found[-1]
    assert name == "completed" and len(images(answer)) == 2 and "preview" not in answer["metrics"]
    assert [a.tobytes() for a in images(answer)] == [b.tobytes() for b in images(plain)]


def test_eight_concurrent_requests_get_their_own_images(server: CogServer) -> None:
    seeds = range(8)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: server.predict(prompt="a", candidates=1, seed=seed), seeds))
    assert [answer["metrics"]["seed"] for answer in answers] == list(seeds)
    assert len({images(answer)[0].tobytes() for answer in answers}) == 8
    assert all(answer["metrics"]["seconds"]["queue"] < 1 for answer in answers)


def test_cancelling_an_unknown_prediction_is_404(server: CogServer) -> None:
    assert server.http.post("/predictions/nobody/cancel").status_code == 404


@pytest.mark.slow
def test_missing_weights_fail_setup(tmp_path: Path) -> None:
    server = CogServer(tmp_path, CLIPGEN_WEIGHTS=str(tmp_path / "nowhere"))
    try:
        assert server.wait()["status"] == "SETUP_FAILED"
        assert "no such folder" in server.log.read_text()
    finally:
        server.stop()


def test_hostile_requests_are_refused_by_name(bare: CogServer) -> None:
    with serving() as canary:
        target = Target(bare, bare.log.parent, canary)
        before, files, processes = target.draw(), target.files(), bare.processes()
        for data in traps():
            target.send(Attack(json.dumps({"input": {"image": url(data)}}).encode(), frozenset({"image"})))
        attack(target, 25)  # test_hostile.py sends hundreds
        assert not canary.requests, "the server fetched from its own machine"
    assert target.answers["failed"] > 10 and target.answers["400"] > 0, target.answers
    assert target.files() == files and bare.processes() == processes
    assert target.draw() == before


class WebhookReceiver(threading.Thread):
    """Receives webhooks."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        received = self.received = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/done"

    def run(self) -> None:
        self.server.serve_forever(poll_interval=0.05)


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    receiver = WebhookReceiver()
    receiver.start()
    yield receiver
    receiver.server.shutdown()


def test_webhooks_tell_how_predictions_ended(image_like: CogServer, receiver: WebhookReceiver) -> None:
    for name, inputs in (("good", {"prompt": "a", "seed": 3}), ("bad", {"prompt": " "})):
        body = {"input": inputs, "webhook": receiver.url, "webhook_events_filter": ["completed"]}
        answer = image_like.http.put(f"/predictions/{name}", json=body, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202 and answer.json()["status"] in ("starting", "processing")
    deadline = time.monotonic() + 600
    while len(receiver.received) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    ends = {event["id"]: event for event in receiver.received}
    assert len(receiver.received) == 2 and ends["good"]["status"] == "succeeded" and ends["bad"]["status"] == "failed"
    assert base64.b64decode(ends["good"]["output"][0].partition(",")[2]).startswith(b"\x89PNG")
    metrics = ends["good"]["metrics"]
    stages = {"embed", "decode_tokens", "queue", "decode_pixels", "rank", "total"}
    assert metrics["seed"] == 3 and set(metrics["seconds"]) == stages
    assert "prompt is empty" in ends["bad"]["error"]
