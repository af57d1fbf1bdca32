"""The page's layout, and what its buttons call. The work is done by `clipgen.webui.session`.

Nothing on the page comes from the internet: system fonts, Gradio's own scripts from this machine, no analytics.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import gradio as gr
from PIL import Image

from clipgen.images.pixels import load_image
from clipgen.request import MAX_SEED
from clipgen.webui.form import MAX_CANDIDATES, MAX_OUTPUTS, MAX_PROMPT, Form, from_link, read_receipt
from clipgen.webui.gallery import history_strip, history_value, image_gallery, preview_value, result_value
from clipgen.webui.session import MAX_RUNNING, Files, Result, Session, Update, describe_error

HISTORY = 20
"""Results of a visitor that are kept, in memory."""
KEPT_SECONDS = 3600
"""Files that visitors uploaded or were shown are deleted after this time, and all of them at the end."""

# On a phone the results lie below the form: bring them into view, and put the keyboard away.
SHOW_RESULTS = """() => {
  const narrow = matchMedia('(max-width: 760px)').matches;
  if (narrow) document.activeElement?.blur();
  document.getElementById(narrow ? 'results' : 'images').scrollIntoView(
    {behavior: 'smooth', block: narrow ? 'start' : 'nearest'});
}"""
READ_LINK = """() => {
  addEventListener('hashchange', () => location.reload());
  return [location.hash];
}"""


class Page:
    """The components, by name, and their event handlers. `blocks` is the Gradio app."""

    def __init__(self, session: Session) -> None:
        self.session = session
        default = session.default_form()
        with gr.Blocks(title="clipgen", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as self.blocks:
            self.history = gr.State([], time_to_live=KEPT_SECONDS)
            self.link = gr.Textbox(visible=False)
            gr.HTML(
                f"<h1>clipgen</h1><p>{html.escape(session.pipe.config.name)} model on {session.pipe.device}</p>",
                elem_id="title-block",
                html_template='<div id="title">${value}</div>',
                apply_default_css=False,
            )
            with gr.Row(elem_id="layout"):
                with gr.Column(elem_id="ask"):
                    self._add_prompt()
                with gr.Column(elem_id="results"):
                    self._add_results()
                with gr.Column(elem_id="settings"):
                    self._add_settings(default)
            self._connect()

    def _add_prompt(self) -> None:
        examples = self.session.examples()
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder=examples[0] if examples else "what to draw",
            lines=1,  # with one line Enter submits and Shift+Enter breaks the line
            max_lines=6,
            max_length=MAX_PROMPT,
            elem_id="prompt",
            autofocus=True,
        )
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id="go", scale=2, min_width=140)
            self.stop = gr.Button("Cancel", interactive=False, elem_id="stop", scale=1, min_width=90)
        with gr.Row(elem_id="examples", visible=bool(examples)):
            self.examples = [gr.Button(prompt, size="sm", min_width=0) for prompt in examples]

    def _add_results(self) -> None:
        self.status = gr.HTML(_status("Write a prompt, or choose one of the examples."), elem_id="status")
        self.images = image_gallery()
        with gr.Row(equal_height=True):
            self.use_seed = gr.Button("Use this seed", interactive=False, elem_id="use-seed", size="md", min_width=140)
            self.use_image = gr.Button(
                "Start from this image", interactive=False, elem_id="use-image", size="md", min_width=140
            )
        with gr.Row(equal_height=True):
            rows = self.session.pipe.config.vqgan.grid
            self.keep_rows = gr.Slider(
                *(1, rows - 1, rows // 2), step=1, precision=0, label=f"Rows to keep of {rows}", min_width=200
            )
            self.redraw = gr.Button(
                "Keep the top and redraw", interactive=False, elem_id="redraw", size="md", min_width=140
            )
        self.strip = history_strip()

    def _add_settings(self, default: Form) -> None:
        with gr.Row():
            self.num_outputs = gr.Slider(
                *(1, MAX_OUTPUTS, default.num_outputs), step=1, precision=0, label="Images", elem_id="num-outputs"
            )
            self.candidates = gr.Slider(
                *(1, MAX_CANDIDATES, default.candidates), step=1, precision=0, label="Best of", elem_id="candidates"
            )
        with gr.Row(equal_height=True):
            self.random_seed = gr.Checkbox(True, label="Random seed", elem_id="random", min_width=120)
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120)
        with gr.Accordion("Start from an image", open=False, elem_id="start") as self.start:
            self.image = gr.File(label="Image to mix in", file_types=["image"], elem_id="image", height=120)
            self.thumbnail = gr.Image(
                visible=False, interactive=False, show_label=False, height=160, buttons=[], format="png"
            )
            self.image_weight = gr.Slider(-2, 4, 1.0, step=0.1, label="Its weight", info="the prompt counts 1")
        with gr.Accordion("More settings", open=False):
            self.negative_prompt = gr.Textbox(
                label="Negative prompt", placeholder="what to avoid", max_length=MAX_PROMPT, elem_id="negative"
            )
            self.guidance = gr.Slider(
                *(0, 30, default.guidance), step=0.1, label="Guidance", info="how closely to follow the prompt; 1: off"
            )
            self.temperature = gr.Slider(
                *(0, 10, default.temperature), step=0.05, label="Temperature", info="more is more varied; 0 is greedy"
            )
            self.top_k = gr.Number(
                default.top_k, label="Top k", info="sample among the likeliest tokens; 0 is off", precision=0, minimum=0
            )
            self.top_p = gr.Slider(
                *(0, 1, default.top_p), step=0.01, label="Top p", info="sample from this share of probability; 1 is off"
            )
            self.previews = gr.Checkbox(default.previews, label="Show unfinished images", elem_id="previews")
        with gr.Accordion("Settings of an earlier image", open=False):
            self.receipt = gr.File(
                label="Drop an image that was made here: its settings are filled in",
                file_types=["image"],
                elem_id="receipt",
                height=120,
            )

    def _connect(self) -> None:
        self.fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(Form)}
        self.on_result = [self.use_seed, self.use_image, self.redraw]
        form: list[Any] = [*self.fields.values()]
        shown: set[Any] = {self.images, self.history}
        results: list[Any] = [self.status, self.images, self.strip, self.history, self.seed]
        results += [self.go, self.stop, *self.examples, *self.on_result]
        silent: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = {"concurrency_limit": None, **silent}
        limit = {"concurrency_id": "drawing", "concurrency_limit": MAX_RUNNING}  # of all these buttons together
        drawing: dict[str, Any] = {**limit, "trigger_mode": "once", **silent}
        gr.on([self.go.click, self.prompt.submit], self.on_generate, {*form, *shown}, results, **drawing)
        self.redraw.click(self.on_redraw, {*form, *shown, self.keep_rows}, results, **drawing)
        for button in self.examples:
            button.click(self.on_example(button.value), {*form, *shown}, [self.prompt, *results], **drawing)
        starts = [button.click for button in (self.go, self.redraw, *self.examples)]
        gr.on([*starts, self.prompt.submit], None, js=SHOW_RESULTS, **silent)
        self.stop.click(self.on_cancel, None, None, queue=False, **silent)
        self.blocks.unload(self.on_cancel)
        self.strip.select(self.on_recall, shown, [*results, *form], **quick)
        self.use_seed.click(self.on_use_seed, shown, [*form, self.status], **quick)
        picked = [self.image, self.thumbnail, self.start, self.status]
        self.use_image.click(self.on_use_image, shown, picked, **quick)
        self.image.upload(self.on_image, self.image, picked, **quick)
        self.image.clear(lambda: gr.update(visible=False), None, self.thumbnail, **quick)
        self.receipt.upload(self.on_receipt, {self.receipt, *form}, [*form, self.receipt, self.status], **quick)
        self.blocks.load(self.on_load, self.link, [*form, self.status], js=READ_LINK, **quick)

    # --- drawing

    def on_generate(self, data: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Generate images from the form."""
        yield from self._generate(self._form(data), data, request)

    def on_example(self, prompt: str) -> Callable[[dict[Any, Any], gr.Request], Iterator[dict[Any, Any]]]:
        """A handler that fills in a prompt and draws it."""

        def draw(data: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
            yield {self.prompt: prompt}  # once: what the visitor types meanwhile stays
            yield from self._generate(replace(self._form(data), prompt=prompt), data, request)

        return draw

    def on_redraw(self, data: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Keep the top of the selected image and draw the rest again."""
        result, index = self._selected(data)
        yield from self._generate(self._form(data), data, request, result.images[index], data[self.keep_rows])

    def _generate(
        self,
        form: Form,
        data: dict[Any, Any],
        request: gr.Request,
        keep: Image.Image | None = None,
        keep_rows: int = 0,
    ) -> Iterator[dict[Any, Any]]:
        before = data[self.images]
        for update in self.session.generate(form, request.session_hash or "", keep, keep_rows):
            if update.ignored:
                yield {self.status: _status(update.note)}
            elif update.result is not None:
                history = [update.result, *data[self.history]][:HISTORY]
                yield self._idle(True) | {
                    self.status: _status(update.note),
                    self.images: self._value(update.result, before),
                    self.history: history,
                    self.strip: history_value(history),
                    self.seed: update.result.form.seed,
                }
            elif update.error:  # what was shown before comes back, with the same image selected
                kept = self._find(data) is not None
                status = _status(update.note, is_error=update.note != "Cancelled.")
                yield self._idle(kept) | {self.status: status, self.images: before if kept else None}
            else:
                yield self._busy(update)

    def _busy(self, update: Update) -> dict[Any, Any]:
        off = gr.update(interactive=False)
        previews = {} if update.previews is None else {self.images: preview_value(update.previews)}
        return {
            self.status: _status(update.note, update.progress),
            self.stop: gr.update(interactive=True),
            **dict.fromkeys((self.go, *self.examples, *self.on_result), off),
            **previews,
        }

    def _idle(self, has_result: bool) -> dict[Any, Any]:
        """Button states while no request is running."""
        on = gr.update(interactive=True)
        return {
            self.stop: gr.update(interactive=False),
            **dict.fromkeys((self.go, *self.examples), on),
            **dict.fromkeys(self.on_result, gr.update(interactive=has_result)),
        }

    def on_cancel(self, request: gr.Request) -> None:
        """Cancel, also when the page is closed or loaded again; the request itself then says so."""
        self.session.cancel(request.session_hash or "")

    # --- the selected image

    def _find(self, data: dict[Any, Any]) -> tuple[Result, int] | None:
        """The result that is shown and the index of its selected image, as the browser tells it."""
        value = data[self.images] if isinstance(data[self.images], dict) else {}
        result = next((result for result in data[self.history] if result.id == value.get("id")), None)
        index = value.get("selected")
        if result is None or not isinstance(index, int) or not 0 <= index < len(result.images):
            return None
        return result, index

    def _selected(self, data: dict[Any, Any]) -> tuple[Result, int]:
        found = self._find(data)
        if found is None:
            raise gr.Error("These images are no longer kept on the server: draw them again.", print_exception=False)
        return found

    def _value(self, result: Result, before: Any) -> dict[str, Any]:
        is_open = isinstance(before, dict) and before.get("open") is True
        return result_value(result, self._write(result), self.session.weights.name, is_open)

    def _write(self, result: Result) -> Files:
        files = self.session.write(result)
        self.images.temp_files.update(map(str, (*files.images, files.archive)))  # Gradio deletes them in time
        return files

    def on_recall(self, data: dict[Any, Any], event: gr.EventData) -> dict[Any, Any]:
        """Show an earlier result and its form."""
        result = next((result for result in data[self.history] if result.id == event.id), None)
        if result is None:
            return {self.status: _status("This result is no longer kept.", is_error=True)}
        form = self._filled(result.form)
        form.pop(self.image)  # the upload may have been deleted
        note = f"Drawn before, with seed {result.receipts[0].seed}."
        return form | {self.status: _status(note), self.images: self._value(result, data[self.images])}

    def on_use_seed(self, data: dict[Any, Any]) -> dict[Any, Any]:
        """Fill in the settings that draw the selected image again."""
        result, index = self._selected(data)
        record = result.receipts[index]
        form = result.form.with_receipt(record)
        changed = ("random_seed", "seed", "num_outputs", "candidates")
        filled = {self.fields[name]: getattr(form, name) for name in changed}
        note = f"Seed {record.image_seed} is set: one image, no other candidates."
        if form.seed != record.image_seed:
            note = f"Seed {form.seed} and its candidates are set: {MAX_SEED} is the largest that can be."
        if record.keep:
            note += f" Its top {record.keep_rows} rows came from another image: keep them from there."
        return filled | {self.status: _status(note)}

    def on_use_image(self, data: dict[Any, Any]) -> dict[Any, Any]:
        """Make the selected image the one to start from."""
        result, index = self._selected(data)
        file = str(self._write(result).images[index])
        note = _status("The image is set to start from: change the prompt or its weight, and generate.")
        return self.on_image(file) | {self.image: file, self.start: gr.update(open=True), self.status: note}

    # --- what fills the form

    def on_image(self, path: str) -> dict[Any, Any]:
        """Show an uploaded image, or say at once that it cannot be read."""
        try:
            image = load_image(path)
        except Exception as error:
            hidden = gr.update(value=None, visible=False)
            status = _status(describe_error(error), is_error=True)
            return {self.image: None, self.thumbnail: hidden, self.status: status}
        image.thumbnail((512, 512))
        return {self.thumbnail: gr.update(value=image, visible=True)}

    def on_receipt(self, data: dict[Any, Any]) -> dict[Any, Any]:
        """Fill in the settings of an image file."""
        try:
            form, note = read_receipt(data[self.receipt], self._form(data))
        except Exception as error:
            return {self.receipt: None, self.status: _status(describe_error(error), is_error=True)}
        return self._filled(form) | {self.receipt: None, self.status: _status(note)}

    def on_load(self, fragment: str | None) -> dict[Any, Any]:
        """Fill in the settings that the page's address holds."""
        if not (fragment or "").removeprefix("#"):
            return {self.status: gr.skip()}
        try:
            form = from_link(fragment or "", self.session.default_form())
        except Exception as error:
            return {self.status: _status(describe_error(error), is_error=True)}
        return self._filled(form) | {self.status: _status("The settings of the link are filled in.")}

    def _form(self, data: dict[Any, Any]) -> Form:
        """The form as it stands; Gradio gives None for a text that was never touched."""
        values = {name: data[component] for name, component in self.fields.items()}
        return Form(**values | {name: values[name] or "" for name in ("prompt", "negative_prompt")})

    def _filled(self, form: Form) -> dict[Any, Any]:
        return {component: getattr(form, name) for name, component in self.fields.items()}


def _status(note: str, progress: float | None = None, is_error: bool = False) -> str:
    bar = "" if progress is None else f'<progress value="{progress:.3f}" aria-label="Progress"></progress>'
    kind = " class=bad" if is_error else ""
    return f'<div role="status" aria-live="polite"{kind}>{html.escape(note)}{bar}</div>'
