"""What the web page's server refuses: Gradio would fetch any public address that a request names."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 1 << 20
"""Bytes of a request that uploads nothing: the page's own have some thousands."""


class LocalOnly:
    """Passes on what is about this page's own files, and answers 403 to what names an address on a network."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        refused, again = None, receive
        if scope["type"] == "http":
            if re.search(r"/(file|proxy)=\s*\w+:", scope["path"]):
                refused = PlainTextResponse("Only files of this page are served.", 403)
            elif scope["method"] == "POST" and not scope["path"].rstrip("/").endswith("/upload"):
                body = await _read(receive)
                if body is None:
                    refused = PlainTextResponse(f"The request has more than {MAX_BODY:,} bytes.", 413)
                elif names_address(body):
                    refused = PlainTextResponse("Upload the file: addresses are not fetched.", 403)
                else:
                    again = _replay(body, receive)
        await (refused or self.app)(scope, again, send)


def names_address(body: bytes) -> bool:
    """Whether JSON has a file whose path is an address, at any depth. What is no JSON has no files."""
    try:
        left: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if isinstance(path := value.get("path"), str) and re.match(r"\s*[a-z][a-z0-9+.-]*://", path, re.I):
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False


async def _read(receive: Receive) -> bytes | None:
    """A request's body; None when it is too long."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives out a body that was read already, then what comes after it."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
