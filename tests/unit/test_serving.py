"""Inputs of a served prediction: allowed, or refused by name, as the schema says."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from cog_server import input_schema
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipgen.errors import RequestError
from clipgen.serving import DEFAULT_PROMPT, PredictionInputs

SCHEMA = input_schema()
DEFAULTS = {name: field["default"] for name, field in SCHEMA.items()}
URL = "data:image/png;base64,AA=="


def test_request_without_inputs_has_the_default_prompt() -> None:
    request = PredictionInputs(**DEFAULTS).to_request(None)
    assert request.prompt == [(DEFAULT_PROMPT, 1.0)] and request.negative_prompt is None
    assert (request.num_outputs, request.candidates, request.seed) == (1, 16, None)


@pytest.mark.parametrize("prompt", ["", " ", DEFAULT_PROMPT])
def test_image_with_the_default_prompt_is_varied_alone(prompt: str) -> None:
    image = Image.new("RGB", (4, 4))
    inputs = PredictionInputs(**DEFAULTS | {"prompt": prompt, "image": URL, "image_weight": 0.5})
    assert inputs.to_request(image).prompt == [(image, 0.5)]


def test_image_is_mixed_with_a_prompt_unless_its_rows_are_kept() -> None:
    image = Image.new("RGB", (4, 4))
    mixed = PredictionInputs(**DEFAULTS | {"prompt": "a cat", "image": URL}).to_request(image)
    assert mixed.prompt == [("a cat", 1.0), (image, 1.0)] and mixed.keep is None
    kept = PredictionInputs(**DEFAULTS | {"prompt": "a cat", "image": URL, "keep_rows": 3}).to_request(image)
    assert kept.prompt == [("a cat", 1.0)] and kept.keep is image and kept.keep_rows == 3


@pytest.mark.parametrize("name", [name for name, field in SCHEMA.items() if field["type"] == "integer"])
def test_whole_number_with_a_decimal_point_is_accepted(name: str) -> None:
    given = {"image": URL, "candidates": 8} | {name: 7.0}
    value = getattr(PredictionInputs(**DEFAULTS | given), name)
    assert value == 7 and isinstance(value, int)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2),
)
NEAR = st.sampled_from([0, 1, 8, 9, 30, 31, 63, 64, 65, 100, 101, -100, -101, 2**31 - 1, 2**31, 0.5, "png", "bmp"])


@given(st.sampled_from(sorted(SCHEMA)), JSON | NEAR)
def test_inputs_within_the_schema_are_accepted_and_others_refused_by_name(name: str, value: Any) -> None:
    field = SCHEMA[name]
    nothing = value is None and field.get("nullable", False)
    allowed = nothing or jsonschema.Draft202012Validator(field).is_valid(value)
    others = {"image": URL, "num_outputs": 1, "candidates": 64}
    try:
        PredictionInputs(**DEFAULTS | others | {name: value})
    except RequestError as error:
        assert error.field == name and str(error).startswith(f"{name} is ") and len(str(error)) < 250
        stricter = {"top_p": lambda p: p == 0, "top_k": lambda k: k >= 2**31}.get(name, lambda _: False)
        assert not allowed or stricter(value)
    else:
        assert allowed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["image_weight", "guidance", "temperature", "top_p", "candidates", "seed"])
def test_numbers_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"^{name} is "):
        PredictionInputs(**DEFAULTS | {name: value})


def test_refusal_of_a_large_value_is_short() -> None:
    with pytest.raises(RequestError) as caught:
        PredictionInputs(**DEFAULTS | {"output_format": "x" * 10_000_000})
    assert len(str(caught.value)) < 200


def test_schema_is_json() -> None:
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
