"""Hostile requests: malicious files, strategies for hypothesis, and checks of the answers."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cog_server import CogServer, input_schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import encoded, png
from local_server import Server
from PIL import Image
from tracebacks import has_traceback

JSON_TYPE = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Attack:
    """One HTTP request, and the inputs of which a refusal must name one; none when the body is not JSON for Cog."""

    body: bytes
    names: frozenset[str] = frozenset()
    headers: dict[str, str] = field(default_factory=lambda: JSON_TYPE)


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_files() -> list[bytes]:
    """Small images of every format that is read, and of most modes."""
    gradient = Image.linear_gradient("L").resize((24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    modes = [gradient.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    found = [encoded(image, "PNG") for image in modes]
    found += [encoded(gradient.convert(mode), "TIFF") for mode in ("CMYK", "F", "I", "LAB") if mode != "LAB"]
    found += [encoded(gradient.convert("RGB"), kind) for kind in ("JPEG", "WEBP", "BMP", "GIF", "TIFF")]
    found += [encoded(gradient.convert("CMYK"), "JPEG", exif=exif), encoded(gradient, "JPEG", progressive=True)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        found.append(encoded(gradient, kind, save_all=True, append_images=[gradient.rotate(90)] * 3))
    return [*found, encoded(Image.new("RGB", (1, 1)), "PNG"), encoded(Image.new("L", (3000, 1)), "PNG")]


def traps() -> list[bytes]:
    """Files that are not images, or whose headers claim too much."""
    bomb = b"zTXtk\0\0" + zlib.compress(bytes(100_000_000), 9)
    gif = encoded(Image.new("P", (4, 4)), "GIF")
    bmp = encoded(Image.new("RGB", (4, 4)), "BMP")
    return [
        b"",
        b"\0" * 1000,
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><svg>&b;</svg>",
        b"<!doctype html><script>alert(1)</script>",
        b"%PDF-1.7\n%%EOF",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file",
        b"P6 99999 99999 255\n",
        b"PK\x03\x04" + bytes(60),
        b"GIF89a/*" + gif[8:] + b"*/=1;alert(1)",
        b"push graphic-context\nfill 'url(https://127.0.0.1/x.jpg\"|id\")'",
        png(30_000, 30_000, 8, 2, bytes(100)),
        png(2**31 - 1, 2**31 - 1, 8, 2, bytes(100)),
        png(0, 0, 8, 2, bytes(100)),
        png(8, 8, 8, 2, bytes(100), bomb),
        png(8, 8, 8, 2, bytes(100), b"iCCPk\0\0" + zlib.compress(bytes(100_000_000), 9)),
        gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
        bmp[:18] + struct.pack("<ii", 2**31 - 1, -(2**31)) + bmp[26:],
    ]


WORDS = [
    "",
    " \t\n\u3000",
    "\0",
    "a\0b",
    "\u202ea lemon\u202c",
    "\u200d" * 50,
    "👩\u200d👩\u200d👧\u200d👦" * 30,
    "Z͑ͫ̓" + "\u0301" * 500,
    "\ufeff\ufffe\uffff",
    "שלום עולם مرحبا",
    "<|endoftext|><|startoftext|>",
    "'; DROP TABLE prompts; --",
    "${jndi:ldap://127.0.0.1/a} {{7*7}} %s%n `id`",
    "../../../../etc/passwd",
    "x" * 20_000,
    "é " * 5_000,
]
PATHS = [
    *(
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE://localhost/etc/passwd",
        "../../weights/mini/config.yaml",
        "/proc/self/mem",
    ),
    *(
        "/dev/zero",
        "predict.py",
        "~",
        "//127.0.0.1/share",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1:25/x",
        "jar:file:///x",
    ),
    *(
        "data:",
        "data:,",
        "data:image/png;base64",
        "data:image/png;base64,QQ",
        "data:image/png;base64,%%%",
        "data:;base64,é",
    ),
    *("http:///x", "http://[::1", "http://a\0b/", "https://127.0.0.1:999999/", "http://user:word@[::1]:1/"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def images(canary: str) -> st.SearchStrategy[Any]:
    """Values of `image`; `canary` is the address of a server on the loopback interface that must not be contacted."""
    files = st.sampled_from(image_files())
    place = st.integers(0, 2**16)

    def damaged(data: bytes, where: int, what: bytes) -> bytes:
        where %= len(data)
        return data[:where] + what + data[where + len(what) :]

    hosts = [
        f"{canary}/x.png",
        f"{canary.replace('127.0.0.1', 'localhost')}/x",
        f"{canary.replace('127.0.0.1', '127.1')}/",
    ]
    return st.one_of(
        st.builds(url, files, st.sampled_from(["image/png", "text/html", "image/svg+xml", "", "a/b;c=d", "../x"])),
        st.builds(lambda data, cut: url(data[: cut % len(data)]), files, place),
        st.builds(lambda *parts: url(damaged(*parts)), files, place, st.binary(min_size=1, max_size=8)),
        st.builds(
            lambda data, more: url(data + more), files, st.sampled_from([b"<script>", b"PK\x05\x06" + bytes(18)])
        ),
        st.sampled_from(traps()).map(url),
        st.sampled_from(PATHS + hosts),
        st.builds(lambda data, more: url(data)[:-20] + more, files, st.text(max_size=20)),
        st.text(max_size=50),
        JSON,
    )


def values(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of one input, by its schema: allowed ones, the bounds, values beyond them, and anything else."""
    near = [field[end] + step for end in ("minimum", "maximum") if end in field for step in (-1, -0.5, 0, 0.5, 1)]
    huge = [
        2**31,
        2**53 + 1,
        2**63,
        2**64,
        -(2**63),
        10**300,
        1e308,
        5e-324,
        -0.0,
        1.0,
        True,
        "1",
        "NaN",
        "Infinity",
        None,
    ]
    return st.one_of(
        st.sampled_from([*field.get("enum", []), *near, *huge]),
        st.sampled_from(WORDS) | st.text(max_size=200)
        if field["type"] == "string"
        else st.integers() | st.floats(width=64),
        JSON,
    )


def attacks(schema: dict[str, dict[str, Any]], canary: str) -> st.SearchStrategy[Attack]:
    """Requests with one to four wild inputs, or with a body that Cog does not expect."""
    wild = {name: images(canary) if name == "image" else values(field) for name, field in schema.items()}
    known = st.sampled_from(sorted(wild)).flatmap(lambda name: st.tuples(st.just(name), wild[name]))
    strange = st.tuples(
        st.text(max_size=20) | st.sampled_from(["self", "__class__", "kwargs", "Prompt", "prompt "]), JSON
    )

    def with_inputs(pairs: list[tuple[str, Any]]) -> Attack:
        changed = dict(pairs)
        if type(changed.get("candidates")) is int and 2 < changed["candidates"] <= 64:
            changed["candidates"] = 2  # larger values are allowed and slow
        body = json.dumps({"input": {"prompt": "a lemon", "candidates": 1, "seed": 0} | changed})
        return Attack(body.encode(), frozenset(changed))

    sound = json.dumps({"input": {"prompt": "a lemon", "candidates": 1}}).encode()
    place = st.integers(0, len(sound) - 1)
    bodies = st.one_of(
        st.binary(max_size=200),
        JSON.map(lambda value: json.dumps(value).encode()),
        JSON.map(lambda value: json.dumps({"input": value}).encode()),
        st.builds(
            lambda cut, more: sound[:cut] + more + sound[cut + len(more) :], place, st.binary(min_size=1, max_size=3)
        ),
        st.integers(1, 200).map(lambda deep: b'{"input":{"prompt":' + b"[" * deep + b"]" * deep + b"}}"),
        st.sampled_from(
            [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, rb'"\ud800"', rb'"\udc00\ud800"', b"0x1"]
        ).map(lambda value: b'{"input":{"prompt":"a","candidates":1,"temperature":' + value + b"}}"),
    )
    headers = st.sampled_from(
        [JSON_TYPE] * 4 + [{}, {"Content-Type": "text/html"}, JSON_TYPE | {"Content-Encoding": "gzip"}]
    )
    whole = st.lists(known, min_size=1, max_size=3).map(with_inputs)
    extra = st.tuples(st.lists(known, max_size=1), strange).map(lambda found: with_inputs([*found[0], found[1]]))
    return st.one_of(
        whole, whole, whole, extra, st.builds(lambda body, head: Attack(body, headers=head), bodies, headers)
    )


@dataclass
class Target:
    """A server under attack, its folders, and a count of its answers."""

    cog: CogServer
    temporary: Path
    canary: Server
    answers: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)

    def send(self, attack: Attack) -> None:
        """Send one request and check the answer."""
        answer = self.cog.http.post("/predictions", content=attack.body, headers=attack.headers)
        assert answer.status_code < 500, (answer.status_code, answer.text, attack)
        assert not has_traceback(answer.text)
        if answer.status_code == 200:
            found = answer.json()
            self.ids.add(found["id"])
            self.answers[found["status"]] += 1
            assert found["status"] == "succeeded" or named(found["error"], attack), (found["error"], attack)
        else:
            self.answers[str(answer.status_code)] += 1
            assert answer.status_code in (400, 415, 422) and named(answer.text, attack), (answer.text, attack)

    def draw(self) -> str:
        """An image that must be the same before and after an attack, as a data: URL."""
        return self.cog.predict(prompt="a lemon", candidates=1, seed=0)["output"][0]

    def files(self) -> set[str]:
        """All files in its folders but the log and the outputs of the last predictions."""
        found = [path for path in self.temporary.rglob("*") if "clipgen-" not in str(path)]
        return {str(path) for path in found if path.name != "log"}


def named(error: str, attack: Attack) -> bool:
    """Whether a refusal names one of the wrong inputs, if there are any."""
    return bool(error) and (not attack.names or any(name in error for name in attack.names))


def attack(target: Target, count: int) -> None:
    """Send `count` requests one after the other."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(max_examples=count, derandomize=True, suppress_health_check=health)
    @given(attacks(input_schema(), target.canary.address))
    def run(attack: Attack) -> None:
        target.send(attack)

    run()
