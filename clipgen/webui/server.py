"""Serves the page on a port, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from clipgen.errors import UnavailableError
from clipgen.utils.listening import usable_address
from clipgen.webui.middleware import LocalFilesOnly
from clipgen.webui.page import Page
from clipgen.webui.session import Session

MAX_UPLOAD = "32mb"


def serve(weights: Path, host: str, port: int, device: str | None, dtype: str | None) -> None:
    """Load a model and serve the page until Ctrl-C or SIGTERM; its files are deleted then. Port 0 is a free one.

    Raises:
        UnavailableError: nothing can listen on this host and port.
        WeightsError, ConfigError, RequestError: see `ClipGen.from_pretrained`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host, port = usable_address(host, port)  # before the model is loaded, which takes a while
    with tempfile.TemporaryDirectory(prefix="clipgen-app-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        with closing(Session(weights, Path(folder), device, dtype)) as session:
            page = Page(session)
            print(f"open {launch(page, host, port)} in a browser; Ctrl-C stops it", file=sys.stderr, flush=True)
            page.blocks.block_thread()


def launch(page: Page, host: str, port: int) -> str:
    """Serve a page in the background. Returns its address.

    Raises:
        UnavailableError: nothing can listen on this host and port.
    """
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)  # it would serve more folders than the page's own
    theme = gr.themes.Default(
        primary_hue="amber",
        neutral_hue="stone",
        font=[gr.themes.Font(name) for name in ("system-ui", "sans-serif")],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "monospace")],
    )
    try:
        page.blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            theme=theme,
            css_paths=Path(__file__).with_name("page.css"),
            share=False,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(LocalFilesOnly)]},
        )
    except OSError as error:
        raise UnavailableError(f"cannot listen on {host}, port {port} ({error}); give another with --port") from None
    return page.blocks.local_url
