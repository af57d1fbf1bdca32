"""`clipgen app`: the web page."""

from __future__ import annotations

from typing import Annotated

import typer

from clipgen.cli.common import Device, Dtype, Weights, find_weights

EXAMPLE = "Example: clipgen app --port 7860, then open http://127.0.0.1:7860"

_PORT = typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
_HOST = typer.Option(help="Interface to listen on. There is no password: everybody who can reach it can draw.")


def app(
    host: Annotated[str, _HOST] = "127.0.0.1",
    port: Annotated[int, _PORT] = 7860,
    weights: Weights = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a web page to draw on, for several visitors at once. It loads nothing from the internet."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise typer.BadParameter("the page needs Gradio: run `make app`, which installs it") from None
    from clipgen.webui.server import serve

    # Before the page forbids downloads for the rest of its process.
    serve(find_weights(weights), host, port, device, dtype)
