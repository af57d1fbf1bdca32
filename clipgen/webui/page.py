"""The web page: what stands on it and what its buttons call. What they do is `clipgen.webui.session`.

Nothing on the page comes from the internet: system fonts, Gradio's own scripts from this machine, no analytics.
"""

from __future__ import annotations

import html
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from clipgen.errors import UnavailableError
from clipgen.images.pixels import load_image
from clipgen.webui.middleware import LocalOnly
from clipgen.webui.session import HISTORY, WORKERS, Drawing, Form, Studio, View, plain, read_receipt

KEPT_SECONDS = 3600
"""Files that visitors uploaded or were shown are deleted after this time, and all of them at the end."""
MAX_UPLOAD = "32mb"
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#title h1 { margin: 0; font-size: 1.5rem; } #title p { margin: .15rem 0 0; opacity: .75; }
#go, #stop { min-height: 3rem; font-size: 1.05rem; }
#status { min-height: 1.6rem; overflow-wrap: anywhere; } #status .bad { color: #b3261e; font-weight: 600; }
.dark #status .bad { color: #ffb4ab; }
#pictures, #pictures .grid-wrap { min-height: 6rem !important; }
#pictures .caption-label { max-width: 100%; white-space: normal; overflow: visible; }
@media (max-width: 640px) {
  .gradio-container { padding: .5rem !important; }
  button.lg { min-height: 3rem; }
  input, textarea { font-size: 16px !important; } /* smaller, and iPhones zoom into what is typed in */
}
"""


class Page:
    """The components, by name, and what happens when they are used. `blocks` is the whole."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        default = studio.form()
        with gr.Blocks(title="clipgen", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as self.blocks:
            self.history = gr.State([], time_to_live=KEPT_SECONDS)
            self.shown = gr.State(None, time_to_live=KEPT_SECONDS)
            self.chosen = gr.State(0)
            gr.Markdown(f"# clipgen\n{studio.pipe.config.name} model on {studio.pipe.device}", elem_id="title")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self._ask(default)
                with gr.Column(scale=6, min_width=320):
                    self._show()
            self._wire()

    def _ask(self, default: Form) -> None:
        self.prompt = gr.Textbox(
            label="Prompt", placeholder="a lemon", lines=2, max_length=2000, elem_id="prompt", autofocus=True
        )
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="go", scale=2, min_width=140)
            self.stop = gr.Button("Cancel", interactive=False, elem_id="stop", scale=1, min_width=90)
        with gr.Row():
            self.num_outputs = gr.Slider(
                1, 8, default.num_outputs, step=1, precision=0, label="Pictures", elem_id="num-outputs"
            )
            self.candidates = gr.Slider(
                1, 64, default.candidates, step=1, precision=0, label="Best of", elem_id="candidates"
            )
        with gr.Row(equal_height=True):
            self.random = gr.Checkbox(True, label="Random seed", elem_id="random", min_width=120)
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120)
        with gr.Accordion("Start from a picture", open=False):
            self.image = gr.File(label="Picture to mix in", file_types=["image"], elem_id="image", height=120)
            self.thumbnail = gr.Image(visible=False, interactive=False, show_label=False, height=160, buttons=[])
            self.image_weight = gr.Slider(-2, 4, 1.0, step=0.1, label="Its weight", info="the prompt counts 1")
        with gr.Accordion("More settings", open=False):
            self.negative = gr.Textbox(label="Negative prompt", placeholder="what to keep away from", max_length=2000)
            self.guidance = gr.Slider(
                0, 30, default.guidance, step=0.1, label="Guidance", info="how closely to follow the prompt; 1 is off"
            )
            self.temperature = gr.Slider(
                0, 10, default.temperature, step=0.05, label="Temperature", info="how daring to be; 0 is greedy"
            )
            self.top_k = gr.Number(
                default.top_k, label="Top k", info="of the likeliest tokens; 0 is off", precision=0, minimum=0
            )
            self.top_p = gr.Slider(0, 1, default.top_p, step=0.01, label="Top p", info="share of probability; 1 is off")
        with gr.Accordion("Settings of an earlier picture", open=False):
            self.receipt = gr.File(
                label="Drop a picture made here: its settings are filled in",
                file_types=["image"],
                elem_id="receipt",
                height=120,
            )

    def _show(self) -> None:
        self.status = gr.HTML(_status("Write what to draw."), elem_id="status")
        self.pictures = gr.Gallery(
            label="Pictures",
            show_label=False,
            columns=2,
            object_fit="contain",
            height="auto",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="pictures",
        )
        with gr.Row(equal_height=True):
            self.use_seed = gr.Button("Use this seed", interactive=False, elem_id="use-seed", min_width=140)
            self.download = gr.DownloadButton("Download", interactive=False, elem_id="download", min_width=140)
        with gr.Row():
            self.keep_rows = gr.Slider(
                *(1, self.studio.rows - 1, self.studio.rows // 2),
                step=1,
                precision=0,
                label=f"Rows to keep of {self.studio.rows}",
                min_width=200,
            )
            self.redraw = gr.Button("Keep the top and redraw", interactive=False, elem_id="redraw", min_width=140)
        with gr.Accordion("History", open=False):
            self.past = gr.Gallery(
                show_label=False,
                columns=4,
                height="auto",
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="past",
            )

    def _wire(self) -> None:
        named = {field.name: getattr(self, field.name) for field in fields(Form)}
        self.form: dict[str, Any] = named
        asked = {*named.values(), self.history, self.shown, self.chosen, self.keep_rows}
        told = [self.status, self.pictures, self.past, self.history, self.shown, self.chosen, self.seed]
        told += [self.go, self.stop, self.use_seed, self.download, self.redraw]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        drawing: dict[str, Any] = {"concurrency_limit": WORKERS, "trigger_mode": "once", **private}
        gr.on([self.go.click, self.prompt.submit], self.on_draw, asked, told, **drawing)
        self.redraw.click(self.on_redraw, asked, told, **drawing)
        self.stop.click(self.on_stop, None, None, queue=False, **private)
        self.blocks.unload(self.on_leave)
        self.pictures.select(
            self.on_choose, self.shown, [self.chosen, self.use_seed, self.download], concurrency_limit=None, **private
        )
        self.past.select(self.on_recall, self.history, [*told, *named.values()], concurrency_limit=None, **private)
        self.use_seed.click(
            self.on_use_seed,
            {self.shown, self.chosen},
            [*named.values(), self.status],
            concurrency_limit=None,
            **private,
        )
        self.receipt.upload(
            self.on_receipt, {self.receipt, *named.values()}, [*named.values(), self.receipt, self.status], **private
        )
        self.image.upload(self.on_image, self.image, [self.image, self.thumbnail, self.status], **private)
        self.image.clear(lambda: gr.update(visible=False), None, self.thumbnail, **private)

    def on_draw(self, data: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Generate."""
        yield from self._draw(data, request)

    def on_redraw(self, data: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Keep the top of the chosen picture and draw the rest anew."""
        shown: Drawing = data[self.shown]
        yield from self._draw(data, request, shown.images[data[self.chosen]], data[self.keep_rows])

    def _draw(
        self, data: dict[Any, Any], request: gr.Request, keep: Image.Image | None = None, keep_rows: int = 0
    ) -> Iterator[dict[Any, Any]]:
        form = self._form(data)
        for view in self.studio.draw(form, request.session_hash or "", keep, keep_rows):
            if view.drawing is not None:
                history = [view.drawing, *data[self.history]][:HISTORY]
                yield self._finished(view.drawing, view.files, view.note) | {
                    self.history: history,
                    self.past: [(drawing.images[0], drawing.form.prompt[:40]) for drawing in history],
                    self.seed: view.drawing.form.seed,
                }
            elif view.failed:
                yield self._failed(view, data[self.shown])
            else:
                busy = gr.update(interactive=False)
                buttons = {self.go: busy, self.use_seed: busy, self.download: busy, self.redraw: busy}
                pictures = {} if view.pictures is None else {self.pictures: gr.update(value=view.pictures)}
                yield {self.status: _status(view.note), self.stop: gr.update(interactive=True), **buttons, **pictures}

    def _finished(self, drawing: Drawing, files: tuple[Path, ...], note: str) -> dict[Any, Any]:
        """A drawing with its first picture chosen."""
        shown = [(str(file), caption) for file, caption in zip(files, drawing.captions, strict=True)]
        columns = 1 if len(shown) == 1 else 2
        return {
            self.status: _status(note),
            self.pictures: gr.update(value=shown, columns=columns, selected_index=None),
            self.shown: drawing,
            self.chosen: 0,
            self.go: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
            self.redraw: gr.update(interactive=True),
            **self._choice(drawing, 0, str(files[0])),
        }

    def _choice(self, drawing: Drawing, index: int, file: str) -> dict[Any, Any]:
        label = f"Use this seed ({drawing.records[index].image_seed})"
        return {
            self.use_seed: gr.update(value=label, interactive=True),
            self.download: gr.update(value=file, interactive=True),
        }

    def _failed(self, view: View, shown: Drawing | None) -> dict[Any, Any]:
        """What was there before, and what went wrong."""
        free, note = gr.update(interactive=True), _status(view.note, bad=view.note != "Cancelled.")
        if shown is not None:
            return self._finished(shown, tuple(self.studio.files(shown)), "") | {self.status: note}
        return {self.status: note, self.go: free, self.stop: gr.update(interactive=False), self.pictures: []}

    def on_stop(self, request: gr.Request) -> None:
        """Cancel; the drawing itself then says so."""
        self.studio.cancel(request.session_hash or "")

    def on_leave(self, request: gr.Request) -> None:
        """The page was closed or loaded again."""
        self.studio.leave(request.session_hash or "")

    def on_choose(self, shown: Drawing | None, event: gr.SelectData) -> dict[Any, Any]:
        """A picture was clicked."""
        if shown is None or event.index >= len(shown.images):
            return {self.chosen: 0}
        files = self.studio.files(shown)
        return {self.chosen: event.index, **self._choice(shown, event.index, str(files[event.index]))}

    def on_recall(self, history: list[Drawing], event: gr.SelectData) -> dict[Any, Any]:
        """A drawing of the history was clicked: it and its form come back."""
        drawing = history[event.index]
        note = f"Drawn before, with seed {drawing.records[0].seed}."
        form = self._filled(drawing.form)
        form.pop(self.image)  # an upload may be gone by now
        return form | self._finished(drawing, tuple(self.studio.files(drawing)), note)

    def on_use_seed(self, data: dict[Any, Any]) -> dict[Any, Any]:
        """Fill in what draws the chosen picture again."""
        seed = data[self.shown].records[data[self.chosen]].image_seed
        again = asdict(Form().again(seed))
        filled = {self.form[name]: again[name] for name in ("random", "seed", "num_outputs", "candidates")}
        return filled | {self.status: _status(f"Seed {seed} is set: one picture, no other candidates.")}

    def on_receipt(self, data: dict[Any, Any]) -> dict[Any, Any]:
        """A picture was dropped for its settings."""
        try:
            form, note = read_receipt(data[self.receipt], self._form(data))
        except Exception as error:
            return {self.receipt: None, self.status: _status(plain(error), bad=True)}
        return self._filled(form) | {self.receipt: None, self.status: _status(note)}

    def on_image(self, path: str) -> dict[Any, Any]:
        """A picture to draw from was uploaded: look at it now, not when the drawing begins."""
        try:
            picture = load_image(path)
        except Exception as error:
            hidden = gr.update(value=None, visible=False)
            return {self.image: None, self.thumbnail: hidden, self.status: _status(plain(error), bad=True)}
        picture.thumbnail((512, 512))
        return {self.thumbnail: gr.update(value=picture, visible=True)}

    def _form(self, data: dict[Any, Any]) -> Form:
        """What the page holds; Gradio gives None for a text that was never touched."""
        form = {name: data[component] for name, component in self.form.items()}
        return Form(**form | {name: form[name] or "" for name in ("prompt", "negative")})

    def _filled(self, form: Form) -> dict[Any, Any]:
        return {component: getattr(form, name) for name, component in self.form.items()}


def _status(note: str, bad: bool = False) -> str:
    return f'<div role="status" aria-live="polite"{" class=bad" if bad else ""}>{html.escape(note)}</div>'


def launch(page: Page, host: str, port: int, block: bool) -> str:
    """Serve a page; its address. With `block` until Ctrl-C."""
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)  # it would serve more folders than the page's own
    theme = gr.themes.Default(
        primary_hue="amber",
        neutral_hue="stone",
        font=[gr.themes.Font(name) for name in ("system-ui", "sans-serif")],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "monospace")],
    )
    try:
        page.blocks.launch(
            server_name=host,
            server_port=port,
            theme=theme,
            css=CSS,
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
            app_kwargs={"middleware": [Middleware(LocalOnly)]},
        )
    except OSError as error:
        raise UnavailableError(f"port {port} cannot be used ({error}); give another with --port") from None
    if block:
        print(f"open {page.blocks.local_url} in a browser; Ctrl-C stops it", file=sys.stderr, flush=True)
        page.blocks.block_thread()
    return page.blocks.local_url


def serve(weights: Path, host: str, port: int, device: str | None, dtype: str | None) -> None:
    """Load a model and serve the page until Ctrl-C or SIGTERM; then nothing of it is left on the disk."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="clipgen-app-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        with closing(Studio(weights, Path(folder), device, dtype)) as studio:
            launch(Page(studio), host, port, block=True)
