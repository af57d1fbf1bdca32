"""What may stand in a receipt: files come from anywhere, so each of its fields is checked before it is used.

A receipt can ask for nothing that a user could not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from clipgen.errors import DataError
from clipgen.request import MAX_CANDIDATES, MAX_PARTS, MAX_SEED

VERSION = 2
"""Receipts of version 1 knew no negative prompt."""
MAX_TEXT = 5_000
"""Characters of a text that are kept: more than the 64 * 77 that CLIP looks at (`clip.tokenize`)."""
MAX_NAME = 255
MAX_READ = 200_000
"""Characters of a receipt that are looked at."""


def parse(text: str) -> Any:
    """JSON in which no name stands twice; that NaN is no number is for the rules to see.

    Raises:
        DataError: it is too long, or no JSON.
    """
    if len(text) > MAX_READ:
        raise DataError(f"its receipt has {len(text):,} characters; {MAX_READ:,} are allowed")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its receipt is damaged: no JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _whole(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Rule:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _text(limit: int, pattern: str = "") -> Rule:
    return lambda value: (
        isinstance(value, str) and len(value) <= limit and bool(re.fullmatch(pattern or r"(?s).*", value))
    )


def _objects(least: int) -> Rule:
    return lambda value: (
        type(value) is list and least <= len(value) <= MAX_PARTS and all(type(part) is dict for part in value)
    )


Rule = Callable[[Any], bool]
_SHA256 = "[0-9a-f]{64}"
_PART_RULES: dict[str, Rule] = {
    "weight": _number(-100, 100),
    "text": _text(MAX_TEXT),
    "image": _text(64, f"({_SHA256})?"),
    "name": _text(MAX_NAME),
}
_RULES: dict[str, Rule] = {
    "version": _whole(1, VERSION),
    "prompt": _objects(1),
    "seed": _whole(0, MAX_SEED),
    "image_seed": _whole(0, MAX_SEED + MAX_CANDIDATES),
    "index": _whole(0, MAX_CANDIDATES - 1),
    "num_outputs": _whole(1, MAX_CANDIDATES),
    "candidates": _whole(1, MAX_CANDIDATES),
    "guidance": _number(0, 30),
    "temperature": _number(0, 10),
    "top_k": _whole(0, MAX_SEED),
    "top_p": lambda value: _number(0, 1)(value) and value > 0,
    "keep": _text(64, f"({_SHA256})?"),
    "keep_rows": _whole(0, 1024),
    "score": _number(-2, 2),
    "model": _text(100),
    "weights": _text(64, _SHA256),
    "dtype": _text(20),
    "device": _text(100),
    "torch": _text(50),
    "software": _text(50),
    "negative": _objects(0),
    "shortened": lambda value: isinstance(value, bool),
}


def checked(record: Any) -> dict[str, Any]:
    """The fields of a receipt, of any version, out of any JSON value.

    Raises:
        DataError: it is damaged, of a later version, or asks for what cannot be.
    """
    if not isinstance(record, dict):
        raise _damaged("no JSON object")
    version = record.get("version")
    if type(version) is int and version > VERSION:
        raise DataError(f"its receipt has the version {version}; this clipgen reads {VERSION}: upgrade it")
    if version == 1:
        record = {"negative": []} | record
    _check(record, _RULES, "")
    for field in ("prompt", "negative"):
        for part in record[field]:
            _check(part, _PART_RULES, f"{field}'s ")
            if bool(part["text"].strip()) == bool(part["image"]):
                raise _damaged(f"a part of the {field} must be a text or an image, and one of them")
    if bool(record["keep"]) != bool(record["keep_rows"]):
        raise _damaged("keep and keep_rows do not fit together")
    if record["negative"] and record["guidance"] <= 1:
        raise _damaged("negative and guidance do not fit together")
    place = record["image_seed"] - record["seed"]
    if not 0 <= place < record["candidates"] or record["index"] >= record["num_outputs"]:
        raise _damaged("seed, candidates and index do not fit together")
    return {name: value for name, value in record.items() if name != "version"}


def _damaged(what: str) -> DataError:
    return DataError(f"its receipt is damaged: {what}")


def _check(record: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    if record.keys() != rules.keys():
        odd = sorted(record.keys() ^ rules.keys(), key=str)[0]
        state = "is missing" if odd in rules else "is not known here"
        raise _damaged(f"the field {where}{odd[:50]!r} {state}")
    for name, rule in rules.items():
        if not rule(record[name]):
            raise _damaged(f"{where}{name} is {_shown(record[name])}, which cannot be")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool)) or value is None else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
