"""Cog's HTTP server without a container: python serve.py [--host 127.0.0.1] [--port 5000]

`cog build` bakes two things into an image that Cog's server reads: the input schema, without which it enforces no
bounds and streams nothing, and the number of predictions that may run at once. This script makes both from
predict.py, as Cog's own static parser does, and then becomes the server. It imports neither Cog nor PyTorch.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipgen.errors import UnavailableError
from clipgen.utils.files import write_text
from clipgen.utils.listening import usable_address

HERE = Path(__file__).parent
SCHEMA = Path(".cog") / "openapi_schema.json"  # where Cog's server looks for it, relative to its working folder

JSON = dict[str, Any]
TYPES: dict[str, JSON] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "Path": {"type": "string", "format": "uri"},
}
KEYWORDS = {"ge": "minimum", "le": "maximum", "accept": "x-cog-accept"}


def predict_function(source: str) -> ast.AsyncFunctionDef:
    """`Predictor.predict` in the source of predict.py."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "predict":
            return node
    raise ValueError("predict.py has no `async def predict`")


def max_concurrency(source: str) -> int:
    """N of `@concurrent(max=N)`, which must be a literal."""
    for decorator in predict_function(source).decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "concurrent":
            return ast.literal_eval(decorator.keywords[0].value)
    return 1


def openapi(source: str) -> JSON:
    """The document that `cog build` makes of predict.py and serves at /openapi.json."""
    predict = predict_function(source)
    properties: JSON = {}
    enums: JSON = {}
    defaults = zip(predict.args.args[1:], predict.args.defaults, strict=True)
    for order, (argument, default) in enumerate(defaults):
        name = argument.arg
        properties[name] = {"x-order": order, **_input(source, argument, default)}
        if choices := properties[name].pop("choices", None):
            enums[name] = _object(name, enum=choices, type="string", description="An enumeration.")
            properties[name] |= {"allOf": [_ref(name)]}
            del properties[name]["title"], properties[name]["type"]
    streams = any(ast.unparse(decorator) == "streaming" for decorator in predict.decorator_list)
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "dev"},
        "paths": _paths({"x-cog-streaming": True} if streams else {}),
        "components": {"schemas": {"Input": _object("Input", properties=properties), **_schemas(), **enums}},
    }


def _input(source: str, argument: ast.arg, declared: ast.expr) -> JSON:
    """One input's JSON schema, from its annotation and its `Input(...)`."""
    kind, *optional = ast.unparse(argument.annotation or ast.Constant(None)).split(" | ")
    if kind not in TYPES or not isinstance(declared, ast.Call):
        raise ValueError(f"{argument.arg}: {kind} is not a type of input, or it is not declared by Input()")
    found: JSON = {"title": argument.arg.replace("_", " ").title(), **TYPES[kind]}
    if optional:
        found["nullable"] = True
    for keyword in declared.keywords:
        name, value = keyword.arg or "", ast.literal_eval(keyword.value)
        # Cog cuts the quotes off the source text, so what follows holds for one literal without escapes only.
        text = (ast.get_source_segment(source, keyword.value) or "")[1:-1]
        found[KEYWORDS.get(name, name)] = text if isinstance(value, str) else value
    return found


def _object(title: str, **fields: Any) -> JSON:
    return {"title": title, "type": "object"} | fields


def _ref(name: str) -> JSON:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> JSON:
    """The parts of the document that are the same for every predictor: requests, responses and errors."""
    text: JSON = {"type": "string"}
    time = text | {"format": "date-time"}
    response: JSON = dict.fromkeys(("id", "version", "status", "error", "logs"), text)
    response |= dict.fromkeys(("created_at", "started_at", "completed_at"), time) | {"metrics": {"type": "object"}}
    titled = {name: field | {"title": name.replace("_", " ").title()} for name, field in response.items()}
    ends = {"input": _ref("Input"), "output": _ref("Output")}
    request = {"id": titled["id"], "input": ends["input"]}
    place = {"title": "Location", "type": "array", "items": {"anyOf": [text, {"type": "integer"}]}}
    error = {"loc": place, "msg": text | {"title": "Message"}, "type": text | {"title": "Error Type"}}
    errors = {"title": "Detail", "type": "array", "items": _ref("ValidationError")}
    states = ["starting", "processing", "succeeded", "canceled", "failed"]
    return {
        "Output": {"title": "Output", "type": "array", "items": TYPES["Path"], "x-cog-array-type": "iterator"},
        "PredictionRequest": _object("PredictionRequest", properties=request),
        "PredictionResponse": _object("PredictionResponse", properties=titled | ends),
        "Status": {"title": "Status", "type": "string", "enum": states, "description": "An enumeration."},
        "HTTPValidationError": _object("HTTPValidationError", properties={"detail": errors}),
        "ValidationError": _object("ValidationError", properties=error, required=["loc", "msg", "type"]),
    }


def _paths(predict: JSON) -> JSON:
    """Cog's HTTP routes; `predict` is added to the one that predicts."""

    def answers(**schemas: JSON) -> JSON:
        words = {"ok": ("200", "Successful Response"), "invalid": ("422", "Validation Error")}
        contents = {name: {"application/json": {"schema": schema}} for name, schema in schemas.items()}
        return {words[name][0]: {"description": words[name][1], "content": contents[name]} for name in schemas}

    def operation(summary: str, id: str, responses: JSON, **more: Any) -> JSON:
        return {"summary": summary, "operationId": id, "responses": responses} | more

    invalid = _ref("HTTPValidationError")
    body = {"content": {"application/json": {"schema": _ref("PredictionRequest")}}}
    name = {"title": "Prediction Id", "type": "string"}
    cancel = operation(
        *("Cancel", "cancel_predictions__prediction_id__cancel_post", answers(ok={}, invalid=invalid)),
        parameters=[{"required": True, "schema": name, "name": "prediction_id", "in": "path"}],
    )
    predict = predict | operation(
        *("Predict", "predict_predictions_post", answers(ok=_ref("PredictionResponse"), invalid=invalid)),
        requestBody=body,
        description="Run a single prediction on the model",
    )
    return {
        "/": {"get": operation("Root", "root__get", answers(ok={}))},
        "/health-check": {"get": operation("Healthcheck", "healthcheck_health_check_get", answers(ok={}))},
        "/predictions": {"post": predict},
        "/predictions/{prediction_id}/cancel": {"post": cancel},
    }


def make_paths_absolute() -> None:
    """Keep the folders that CLIPGEN_WEIGHTS and CLIPGEN_CACHE name when the working folder changes."""
    for name in ("CLIPGEN_WEIGHTS", "CLIPGEN_CACHE"):
        value = os.environ.get(name, "")
        if value and (name == "CLIPGEN_CACHE" or Path(value).is_dir()):  # weights may also be a name or an address
            os.environ[name] = os.path.abspath(os.path.expanduser(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="name or address to listen on; there is no password")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on, 1 to 65535")
    args = parser.parse_args()
    if not 1 <= args.port <= 65535:
        parser.error(f"--port is {args.port}; it must be from 1 to 65535")
    if find_spec("cog") is None:
        parser.error("Cog is not installed; run: pip install -r requirements.txt")
    try:
        address, _ = usable_address(args.host, args.port)
    except UnavailableError as error:
        parser.error(str(error))
    host = f"[{address}]" if ":" in address else address  # Cog's server takes no names
    make_paths_absolute()
    os.chdir(HERE)
    source = Path("predict.py").read_text(encoding="utf-8")
    try:
        SCHEMA.parent.mkdir(exist_ok=True)
        write_text(SCHEMA, json.dumps(openapi(source)))
    except OSError as error:  # a read-only folder
        print(f"note: no {SCHEMA} ({error.strerror}): bounds are checked by predict.py alone, nothing is streamed")
    print(f"http://{host}:{args.port}/predictions; Ctrl-C stops it", flush=True)
    # Ctrl-C reaches the server and, as they share the terminal, its worker. The server listens for it. Python, which
    # would end in a traceback and hold the server up for ten seconds, is told not to. The worker inherits that or not,
    # as the server starts to listen before or after it starts the worker; predict.py sets it right.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    environment = {
        "COG_MAX_CONCURRENCY": str(max_concurrency(source)),
        **os.environ,
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "PORT": str(args.port),
        # The server starts its worker as `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    os.execve(sys.executable, [sys.executable, "-m", "cog.server.http", "--host", host], environment)


if __name__ == "__main__":
    main()
