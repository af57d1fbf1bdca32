"""`python -m clipgen app`: the web page."""

from __future__ import annotations

from typing import Annotated

import typer

from clipgen.cli import common as t

EXAMPLE = "Example: python -m clipgen app --port 7860, then open http://127.0.0.1:7860"

_PORT = typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
_HOST = typer.Option(help="Interface to listen on. Whoever reaches it can draw: there is no password.")


def app(
    host: Annotated[str, _HOST] = "127.0.0.1",
    port: Annotated[int, _PORT] = 7860,
    weights: t.Weights = None,
    device: t.Device = None,
    dtype: t.Dtype = None,
) -> None:
    """A web page to draw on, for several visitors at once. Nothing on it comes from the internet."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise typer.BadParameter("the page needs Gradio: run `make app`, which installs it") from None
    from clipgen.webui.page import serve

    # Before the page forbids downloads for the rest of its process.
    serve(t.find_weights(weights), host, port, device, dtype)
