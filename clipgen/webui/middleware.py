"""Requests that the page's server refuses. Gradio on its own fetches any public address that a request names."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOADS = ("/upload", "/gradio_api/upload")
"""Paths that take files: exactly these, as the last part of a path may also be the name of a function to call."""
MAX_BODY = 1 << 20
"""Bytes of a request that is not an upload; the page's own have some thousands."""


class LocalFilesOnly:
    """ASGI middleware: answers 403 to requests that name an address on a network, 413 to long ones."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        refusal = None
        if scope["type"] == "http":
            if re.search(r"/(file|proxy)=\s*\w+:", scope["path"]):
                refusal = PlainTextResponse("Only files of this page are served.", 403)
            elif scope["method"] == "POST" and scope["path"].rstrip("/") not in UPLOADS:
                body = await _read(receive)
                if body is None:
                    refusal = PlainTextResponse(f"The request has more than {MAX_BODY:,} bytes.", 413)
                elif names_address(body):
                    refusal = PlainTextResponse("Upload the file: addresses are not fetched.", 403)
                else:
                    receive = _replay(body, receive)
        await (refusal or self.app)(scope, receive, send)


def names_address(body: bytes) -> bool:
    """Whether a JSON body has, at any depth, a file whose path is an address. Other bodies have no files."""
    try:
        pending: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(path := value.get("path"), str) and re.match(r"\s*[a-z][a-z0-9+.-]*://", path, re.I):
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None when it is too long."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that delivers a body which was read already, then what follows it."""
    delivered = False

    async def replay() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
