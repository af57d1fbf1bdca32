"""The images on the page, one of them selected, with what can be done to it in the browser: download, link, API call.

The selection is part of the component's value, which the browser sends along when a button is pressed. So buttons act
on the image that is shown as selected, whatever the server sent in between.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image, ImageOps

from clipgen.images.pixels import to_data_url
from clipgen.webui.form import settings_of, to_link
from clipgen.webui.session import Files, Result
from clipgen.webui.snippets import as_curl, as_python

THUMBNAIL = (96, 96)
"""Pixels."""

# Gradio evaluates Handlebars first and its output as a JavaScript template, so a prompt given to Handlebars could run
# code. `${}` is evaluated once. It does not escape HTML: `html.escape` has done that in Python.
IMAGES_HTML = """${!value ? `<p class="empty">Your images appear here.</p>` : `
<div class="images${value.zoomed ? ' zoomed' : ''}" style="--columns: ${value.columns}; --rows: ${value.rows}">
  ${value.images.map((image, i) => `
    <figure${value.id && i === value.selected ? ' class="selected"' : ''}>
      <button type="button" data-index="${i}" aria-pressed="${Boolean(value.id) && i === value.selected}"
        ${value.id ? '' : 'disabled'}><img src="${image.src}" alt="${image.alt}"></button>
      <figcaption>${image.caption}</figcaption>
    </figure>`).join('')}
</div>
${!value.id ? '' : `
<div class="bar">
  <a id="download" class="action" download href="${value.images[value.selected].src}">Download</a>
  <a id="download-all" class="action" download href="${value.archive}">Download all (ZIP)</a>
  <button type="button" id="share" class="action" aria-expanded="${value.open}">Link and API call</button>
</div>
${!value.open ? '' : `
<div class="share">
  ${[['Link', 'link'], ['curl', 'curl'], ['Python', 'python']].map(([title, name]) => `
    <div><b>${title}</b><button type="button" class="action" data-copy="${name}">Copy</button></div>
    <pre id="share-${name}" tabindex="0">${name === 'link' ? location.href.split('#')[0] + '#' : ''}${
      value.images[value.selected][name]}</pre>`).join('')}
</div>`}`}`}"""
IMAGES_JS = """
element.addEventListener('click', async (event) => {
  const value = props.value;
  const image = event.target.closest('[data-index]'), copy = event.target.closest('[data-copy]');
  if (image) {
    const index = Number(image.dataset.index);
    const zoomed = index === value.selected && !value.zoomed && value.images.length > 1;
    props.value = {...value, selected: index, zoomed};
  } else if (event.target.closest('#share')) {
    props.value = {...value, open: !value.open};
  } else if (copy) {
    const shown = element.querySelector('#share-' + copy.dataset.copy);
    try {
      await navigator.clipboard.writeText(shown.textContent);
    } catch {  // pages that are not served from this machine or over HTTPS may not write to the clipboard
      getSelection().selectAllChildren(shown);
      document.execCommand('copy');
    }
    copy.textContent = 'Copied';
  }
});
"""
HISTORY_HTML = """${!value ? '' : `<h2>History</h2><div class="history">${value.map((entry) => `
  <button type="button" data-id="${entry.id}" title="${entry.prompt}"><img src="${entry.src}" alt="${entry.prompt}"
  ></button>`).join('')}</div>`}"""
HISTORY_JS = """
element.addEventListener('click', (event) => {
  const entry = event.target.closest('[data-id]');
  if (entry) trigger('select', {id: entry.dataset.id});
});
"""


# Functions, not subclasses: Gradio writes a .pyi file beside every module that derives from a component.
def image_gallery() -> gr.HTML:
    """Images in a grid: a click selects one, another click on it enlarges it. Its values are made below."""
    return gr.HTML(html_template=IMAGES_HTML, js_on_load=IMAGES_JS, apply_default_css=False, elem_id="images")


def history_strip() -> gr.HTML:
    """Thumbnails of earlier results: a click triggers `select` with the result's id."""
    return gr.HTML(html_template=HISTORY_HTML, js_on_load=HISTORY_JS, apply_default_css=False, elem_id="history")


def result_value(result: Result, files: Files, weights: str, is_open: bool = False) -> dict[str, Any]:
    """The value of an image gallery that shows a result, its first image selected; `weights` is for the Python call."""
    images = [
        {
            "src": _address(file),
            "alt": html.escape(record.text),
            "caption": f"<span>score {record.score:.3f}</span> <span>seed {record.image_seed}</span>",
            "link": html.escape(to_link(settings_of(record))),
            "curl": html.escape(as_curl(record)),
            "python": html.escape(as_python(record, weights)),
        }
        for file, record in zip(files.images, result.receipts, strict=True)
    ]
    return _grid(images) | {"id": result.id, "archive": _address(files.archive), "open": is_open}


def preview_value(images: Sequence[Image.Image]) -> dict[str, Any]:
    """The value of an image gallery that shows unfinished images, of which none can be selected."""
    shown = [{"src": to_data_url(image), "alt": "unfinished image", "caption": "unfinished"} for image in images]
    return _grid(shown) | {"id": ""}


def history_value(history: Sequence[Result]) -> list[dict[str, str]]:
    """The value of a history strip."""
    entries = []
    for result in history:
        src = to_data_url(ImageOps.contain(result.images[0], THUMBNAIL))
        entries.append({"id": result.id, "src": src, "prompt": html.escape(result.receipts[0].text)})
    return entries


def _grid(images: list[dict[str, str]]) -> dict[str, Any]:
    columns = {1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 6: 3}.get(len(images), 4)
    return {"images": images, "selected": 0, "zoomed": False, "columns": columns, "rows": -(-len(images) // columns)}


def _address(file: Path) -> str:
    """Where Gradio serves a file, relative to the page."""
    return f"gradio_api/file={quote(str(file))}"
