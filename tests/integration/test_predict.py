"""The predictor without a server: inputs, files, metrics and log; set-up needs no network."""

import asyncio
import base64
import inspect
import io
import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipgen.engine.image_decoder import ImageDecoder
from clipgen.outputs.metadata import Receipt
from clipgen.serving import KEPT_FOLDERS
from clipgen.weights.training_index import TrainingIndex
from predict import Predictor
from train.index import build_index

PARAMETERS = {n: p for n, p in inspect.signature(Predictor.predict).parameters.items() if n != "self"}


def inputs(**given: Any) -> dict[str, Any]:
    """A request as Cog completes it."""
    return {name: parameter.default.default for name, parameter in PARAMETERS.items()} | given


@pytest.fixture(scope="module")
def predictor(tiny_weights: Path) -> Predictor:
    """Set up with the tiny model, and any attempt to connect to anything fails."""

    def refuse(*args: object) -> None:
        raise AssertionError("set-up used the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setenv("CLIPGEN_WEIGHTS", str(tiny_weights))
        patch.setenv("CLIPGEN_DEVICE", "cpu")
        patch.setenv("CLIPGEN_DTYPE", "float32")
        predictor = Predictor()
        predictor.setup()
    return predictor


def draw(predictor: Predictor, **given: Any) -> list[Path]:
    async def collect() -> list[Path]:
        return [Path(path) async for path in predictor.predict(**inputs(**given))]

    return asyncio.run(collect())


def test_inputs_have_descriptions_defaults_and_bounds() -> None:
    assert list(PARAMETERS) == [
        *("prompt", "negative_prompt", "image", "image_weight", "keep_rows", "num_outputs", "candidates"),
        *("guidance", "temperature", "top_k", "top_p", "seed", "previews", "output_format", "output_quality"),
    ]
    assert all(parameter.default.description for parameter in PARAMETERS.values())
    bounds = {name: (p.default.default, p.default.ge, p.default.le) for name, p in PARAMETERS.items()}
    assert bounds["num_outputs"] == (1, 1, 8)
    assert bounds["candidates"] == (16, 1, 64)
    assert bounds["seed"][:2] == (None, 0)
    assert PARAMETERS["output_format"].default.choices == ["png", "webp", "jpg"]


def test_prediction_without_inputs_uses_the_default_prompt(predictor: Predictor) -> None:
    (file,) = draw(predictor)
    assert Receipt.from_file(file).text == PARAMETERS["prompt"].default.default


def test_each_prediction_writes_separate_files_into_a_new_folder(predictor: Predictor) -> None:
    first = draw(predictor, prompt="a lemon", num_outputs=3, seed=0)
    second = draw(predictor, prompt="a lemon", num_outputs=3, seed=0)
    assert [path.name for path in first] == ["1.png", "2.png", "3.png"]
    assert first[0].parent != second[0].parent
    for a, b in zip(first, second, strict=True):
        assert Image.open(a).tobytes() == Image.open(b).tobytes()
    assert Receipt.from_file(first[0]).seed == 0


@pytest.mark.parametrize(("suffix", "format"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_output_format_is_the_file_format(predictor: Predictor, suffix: str, format: str) -> None:
    (file,) = draw(predictor, prompt="a", candidates=1, output_format=suffix)
    assert file.suffix == f".{suffix}" and Image.open(file).format == format


def gradient() -> str:
    """An image as clients send it."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_image_alone_and_image_mixed_with_a_prompt(predictor: Predictor) -> None:
    url, few = gradient(), {"candidates": 2, "seed": 1}
    alone, mixed = draw(predictor, image=url, **few), draw(predictor, image=url, prompt="a lemon", **few)
    assert Image.open(alone[0]).tobytes() != Image.open(mixed[0]).tobytes()
    (away,) = draw(predictor, image=url, prompt="a lemon", image_weight=-0.5, **few)
    assert Receipt.from_file(away).text == "a lemon + an image (-0.5)"
    assert Receipt.from_file(mixed[0]).text == "a lemon + an image"


def test_fetched_file_gives_the_same_image_as_its_url(predictor: Predictor, tmp_path: Path) -> None:
    file = tmp_path / "fetched"
    file.write_bytes(base64.b64decode(gradient().split(",")[1]))
    few = {"candidates": 1, "seed": 1}
    (by_url,), (by_file,) = draw(predictor, image=gradient(), **few), draw(predictor, image=file, **few)
    assert Image.open(by_url).tobytes() == Image.open(by_file).tobytes()
    with pytest.raises(ValueError, match="image cannot be used"):
        draw(predictor, image=tmp_path / "gone", **few)


def test_oldest_output_folder_is_removed_when_enough_newer_ones_exist(predictor: Predictor) -> None:
    first = draw(predictor, prompt="a", candidates=1)[0]
    for _ in range(KEPT_FOLDERS):
        assert first.exists()
        draw(predictor, prompt="a", candidates=1)
    assert not first.parent.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("prompt", value) for value in (None, 5, ["a"])],
        *[("negative_prompt", value) for value in (None, 5, ["a"])],
        *[("image", value) for value in ("/etc/hostname", 5)],
        *[("image_weight", value) for value in (-101, 101, None, "1", float("nan"))],
        *[("keep_rows", value) for value in (-1, 64, 0.5, None)],
        *[("previews", value) for value in (-1, 9, "1")],
        *[("num_outputs", value) for value in (0, 9, 1.5, "2", True, None)],
        *[("candidates", value) for value in (0, 65, "many")],
        *[("guidance", value) for value in (-1, 31, float("inf"), "1")],
        *[("temperature", value) for value in (-0.1, 10.1, float("nan"))],
        *[("top_k", value) for value in (-1, 0.5)],
        *[("top_p", value) for value in (-1, 0, 1.5, float("nan"))],
        *[("seed", value) for value in (-1, 2**31, 0.5)],
        *[("output_format", value) for value in ("bmp", None, "PNG")],
        *[("output_quality", value) for value in (0, 101)],
    ],
)
def test_bad_input_is_refused_by_name_and_leaves_no_folder(
    predictor: Predictor, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=name) as caught:
        draw(predictor, **{"prompt": "a", name: value})
    assert str(value) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_empty_prompt_without_an_image_is_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="prompt"):
        draw(predictor, prompt="  ")


def test_rows_to_keep_need_an_image_and_must_fit_the_model(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="keep_rows is 2; it needs an image"):
        draw(predictor, prompt="a", keep_rows=2)
    with pytest.raises(ValueError, match="keep_rows is 4; this model generates 4 rows"):
        draw(predictor, image=gradient(), keep_rows=4)
    (kept,) = draw(predictor, prompt="a", image=gradient(), keep_rows=3, candidates=1, seed=0)
    (free,) = draw(predictor, prompt="a", candidates=1, seed=0)
    assert Image.open(kept).tobytes() != Image.open(free).tobytes()


def test_log_holds_events_and_times_but_no_prompt(
    predictor: Predictor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {"prompt": "my secret", "negative_prompt": "a secret too"}
    draw(predictor, **prompts, candidates=2, seed=5)
    for wrong in ({"keep_rows": 2}, {"candidates": 999}):
        with pytest.raises(ValueError):
            draw(predictor, **prompts, **wrong)
    lines = capsys.readouterr().out.splitlines()
    done, *failed = (json.loads(line) for line in lines)
    assert done["event"] == "succeeded" and done["seed"] == 5 and done["drawn"] == 2
    assert all(done[stage] >= 0 for stage in ("queue", "embed", "decode_tokens", "decode_pixels", "rank", "total"))
    assert [line["event"] for line in failed] == ["failed"] * 2 and failed[0]["error"] == "RequestError"
    assert "secret" not in "".join(lines)
    monkeypatch.setenv("CLIPGEN_LOG_PROMPTS", "1")
    draw(predictor, **prompts, candidates=1)
    assert json.loads(capsys.readouterr().out).items() >= prompts.items()


def test_negative_prompt_changes_the_image_and_is_in_the_receipt(predictor: Predictor) -> None:
    few = {"prompt": "a lemon", "candidates": 1, "seed": 3}
    (plain,) = draw(predictor, **few)
    (moved,) = draw(predictor, **few, negative_prompt="a dog")
    (blank,) = draw(predictor, **few, negative_prompt=" ")
    assert Image.open(plain).tobytes() == Image.open(blank).tobytes() != Image.open(moved).tobytes()
    assert Receipt.from_file(moved).text == "a lemon, not a dog" and not Receipt.from_file(blank).negative
    with pytest.raises(ValueError, match=r"guidance is 1; .* raise it"):
        draw(predictor, **few, negative_prompt="a dog", guidance=1)


@pytest.mark.parametrize("low", [True, False])
def test_coverage_is_a_metric_and_low_coverage_logs_a_warning_without_names(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], low: bool
) -> None:
    metrics: dict[str, Any] = {}
    monkeypatch.setattr(Predictor, "record_metric", lambda self, name, value: metrics.update({name: value}))
    draw(predictor, prompt="a", candidates=1)
    assert "coverage" not in metrics, "these weights have no index"
    images = F.normalize(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    index = TrainingIndex(build_index(images, [f"secret {i}" for i in range(9)], images[:4]))
    monkeypatch.setattr(predictor.service.pipe, "index", index)
    monkeypatch.setattr("clipgen.weights.training_index.OUT_OF_DISTRIBUTION", 1.01 if low else 0)
    capsys.readouterr()
    draw(predictor, prompt="a", candidates=1)
    found = metrics["coverage"]
    assert json.loads(json.dumps(found)) == found and 0 <= found["percentile"] <= 100 and found["similarity"] <= 1
    assert len(found["nearest"]) == 5 and found["nearest"][0][0].startswith("secret")
    logged = capsys.readouterr().out
    assert ("This model has seen little like it" in logged) == low and "secret" not in logged


def test_setup_generates_one_image_and_logs_its_time(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[int] = []
    decode = ImageDecoder.decode
    monkeypatch.setattr(
        ImageDecoder, "decode", lambda self, tokens, *rest: drawn.append(len(tokens)) or decode(self, tokens, *rest)
    )
    monkeypatch.setenv("CLIPGEN_WEIGHTS", str(tiny_weights))
    monkeypatch.setenv("CLIPGEN_DEVICE", "cpu")
    predictor = Predictor()
    predictor.setup()
    assert drawn == [1], "from the prompt to the pixels and their score"
    said = json.loads(capsys.readouterr().out)
    assert said["event"] == "ready" and said["model"] == "tiny" and len(said["weights"]) == 64
    assert said["device"].startswith("cpu") and 0 < said["load"] < said["wall"]


def test_previews_are_metrics_and_not_outputs(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics: list[tuple[str, Any]] = []
    monkeypatch.setattr(Predictor, "record_metric", lambda self, *pair: metrics.append(pair))
    files = draw(predictor, prompt="a", candidates=4, num_outputs=2, previews=3, seed=0)
    shown = [value for name, value in metrics if name == "preview"]
    assert len(files) == 2 and len(shown) == 3
    for url in shown:
        shown_image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        assert shown_image.format == "WEBP" and shown_image.width > 2 * 32


def test_fewer_candidates_than_outputs_are_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="candidates"):
        draw(predictor, prompt="a", num_outputs=4, candidates=3)
