"""The settings of an image as calls that draw it again: curl for the HTTP API (docs/serving.md), or Python."""

from __future__ import annotations

import json
from typing import Any

from clipgen.outputs.metadata import Receipt
from clipgen.request import SAMPLING
from clipgen.webui.form import seed_of, settings_of

START, KEPT = "start.png", "kept.png"
"""Image files that the user has to put beside the call: to start from, and whose top rows are kept."""


def as_curl(record: Receipt) -> str:
    """A shell command that sends the request to a server on this machine and prints its JSON answer.

    Prompts come from links and files of strangers: the JSON stays in single quotes and contains none, so that a shell
    expands nothing in it.
    """
    settings: dict[str, Any] = {name: value for name, value in settings_of(record).items() if value != ""}
    image = next((part for part in record.prompt if part.image), None)
    if image and record.keep:
        return "# The HTTP API takes one image and this request has two: use the Python call."
    file = ""
    if image:
        file, settings["image_weight"] = START, image.weight
    elif record.keep:
        file, settings["keep_rows"] = KEPT, record.keep_rows
    body = json.dumps({"input": settings}).replace("'", r"\u0027")
    post = "curl -s http://localhost:5000/predictions -H 'Content-Type: application/json'"
    if not file:
        return f"{post} \\\n  -d '{body}'"
    # Through a pipe: an image is longer than an argument may be. curl drops base64's line breaks.
    start = body.removesuffix("}}") + ', "image": "data:image/png;base64,'
    return f"(printf '%s' '{start}'; base64 < {file}; printf '\"}}}}') |\n  {post} -d @-"


def as_python(record: Receipt, weights: str) -> str:
    """A script that writes the image to `image.png`; `weights` is the name of their folder."""
    parts = [(f"Image.open({START!r})" if part.image else repr(part.text), part.weight) for part in record.prompt]
    [(only, weight), *more] = parts
    single = not more and weight == 1
    prompt = only if single else "[" + ", ".join(f"({part}, {weight!r})" for part, weight in parts) + "]"
    arguments = [prompt]
    if record.negative:
        arguments.append("negative_prompt=" + repr(" ".join(part.text for part in record.negative)))
    arguments += [f"{name}={getattr(record, name)!r}" for name in SAMPLING]
    seed, candidates, num_outputs = seed_of(record)
    if candidates > 1:
        arguments.append(f"num_outputs={num_outputs}, candidates={candidates}")
    arguments.append(f"seed={seed}")
    if record.keep:
        arguments.append(f"keep=Image.open({KEPT!r}), keep_rows={record.keep_rows}")
    lines = ["from PIL import Image", ""] if "Image.open(" in "".join(arguments) else []
    lines += ["from clipgen import ClipGen", "", f"pipe = ClipGen.from_pretrained({'weights/' + weights!r})"]
    lines += ["output = pipe(", *(f"    {argument}," for argument in arguments), ")"]
    index = record.index if candidates > 1 else 0
    return "\n".join([*lines, f"output.images[{index}].save('image.png')"])
