"""The predictor without a server: what it declares is what it enforces, and set-up needs no network."""

import asyncio
import inspect
import socket
from pathlib import Path
from typing import Any

import cog
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from predict import Predictor, check

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
    return [Path(path) for path in asyncio.run(predictor.predict(**inputs(**given)))]


def test_the_interface() -> None:
    assert list(PARAMETERS) == [
        *("prompt", "image", "num_outputs", "candidates", "guidance", "temperature", "top_k", "top_p", "seed"),
        *("output_format", "output_quality"),
    ]
    assert all(parameter.default.description for parameter in PARAMETERS.values())
    bounds = {name: (p.default.default, p.default.ge, p.default.le) for name, p in PARAMETERS.items()}
    assert bounds["num_outputs"] == (1, 1, 8)
    assert bounds["candidates"] == (16, 1, 64)
    assert bounds["seed"][:2] == (None, 0)
    assert PARAMETERS["output_format"].default.choices == ["png", "webp", "jpg"]


def test_defaults_are_allowed() -> None:
    check(**inputs())


def test_separate_files_in_a_fresh_folder(predictor: Predictor) -> None:
    first = draw(predictor, prompt="a lemon", num_outputs=3, seed=0)
    second = draw(predictor, prompt="a lemon", num_outputs=3, seed=0)
    assert [path.name for path in first] == ["1.png", "2.png", "3.png"]
    assert first[0].parent != second[0].parent
    for a, b in zip(first, second, strict=True):
        assert Image.open(a).tobytes() == Image.open(b).tobytes()
    assert Image.open(first[0]).info["seed"] == "0"


@pytest.mark.parametrize(("suffix", "format"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_formats(predictor: Predictor, suffix: str, format: str) -> None:
    (file,) = draw(predictor, prompt="a", candidates=1, output_format=suffix)
    assert file.suffix == f".{suffix}" and Image.open(file).format == format


def test_an_image_and_an_image_with_a_prompt(predictor: Predictor, tmp_path: Path) -> None:
    path = cog.Path(tmp_path / "photo.jpg")
    Image.linear_gradient("L").save(path)
    few = {"candidates": 2, "seed": 1}
    alone, mixed = draw(predictor, image=path, **few), draw(predictor, image=path, prompt="a lemon", **few)
    assert Image.open(alone[0]).tobytes() != Image.open(mixed[0]).tobytes()


def test_old_folders_are_removed(predictor: Predictor) -> None:
    first = draw(predictor, prompt="a", candidates=1)[0]
    for _ in range(predictor.folders.maxlen or 0):
        assert first.exists()
        draw(predictor, prompt="a", candidates=1)
    assert not first.parent.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("prompt", value) for value in (None, 5, ["a"])],
        *[("image", value) for value in ("/etc/hostname", 5)],
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
def test_bad_inputs_are_named(predictor: Predictor, name: str, value: Any) -> None:
    folders = len(predictor.folders)
    with pytest.raises(ValueError, match=name) as caught:
        draw(predictor, **{"prompt": "a", name: value})
    assert str(value) in str(caught.value)
    assert len(predictor.folders) == folders


def test_neither_prompt_nor_image(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="prompt"):
        draw(predictor, prompt="  ")


def test_fewer_candidates_than_outputs(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="candidates"):
        draw(predictor, prompt="a", num_outputs=4, candidates=3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)


@given(st.sampled_from(sorted(PARAMETERS)), JSON)
def test_whatever_json_holds_is_allowed_or_named(name: str, value: Any) -> None:
    try:
        check(**inputs(**{name: value}))
    except ValueError as error:
        assert str(error).startswith(f"{name} is ") and len(str(error)) < 250
    else:
        field = PARAMETERS[name].default
        assert value is None or ((field.ge is None or value >= field.ge) and (field.le is None or value <= field.le))
