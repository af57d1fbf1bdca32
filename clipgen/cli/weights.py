"""`clipgen weights`: list, fetch, verify, convert and describe weights."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgen.cli.common import Quiet, check_out, log
from clipgen.cli.progress import downloads
from clipgen.weights.catalog import CATALOG, PretrainedModel

if TYPE_CHECKING:
    from clipgen.weights.cache import Settings

MODELS = Path("weights")
"""Folder of the models below the current one: `fetch coco` makes weights/coco."""
NAMES = ("list", "fetch", "verify", "convert", "info")

app = typer.Typer(rich_markup_mode="rich")


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """List, fetch, verify, convert and describe published weights."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


_JSON = typer.Option("--json", help="Print one JSON document.")
_CACHE = typer.Option(
    envvar="CLIPGEN_CACHE", show_default="~/.cache/clipgen", file_okay=False, help="Folder of the downloads."
)
_NAME = typer.Argument(
    metavar="NAME", show_default=False, help=f"One of {', '.join(CATALOG)}.", autocompletion=lambda: list(CATALOG)
)
_FOLDER = typer.Argument(metavar="DIR", show_default=False, help="Folder of a model, such as weights/mini.")


@app.command("list")
def list_(cache: Annotated[Path | None, _CACHE] = None, as_json: Annotated[bool, _JSON] = False) -> None:
    """Show what can be fetched: files, sizes, licences, and whether they have been downloaded."""
    settings = _settings(cache)
    records = [_record(entry, settings) for entry in CATALOG.values()]
    if as_json:
        typer.echo(json.dumps(records, indent=2))
        return
    for record in records:
        typer.echo(f"{record['name']}: {record['what']}")
        typer.echo(f"  {record['page']}, licence: {record['licence']}")
        for file in record["files"]:
            typer.echo(f"  {file['name']:30} {_size(file):40} {file['state']}")
        if record["model"]:
            state = "converted" if record["converted"] else "not converted yet"
            typer.echo(f"  {record['model']:30} {'the model that fetch converts them to':40} {state}")
    typer.echo(f"downloads go to {settings.cache}")


@app.command(epilog="Example: clipgen weights fetch coco")
def fetch(
    name: Annotated[str, _NAME],
    cache: Annotated[Path | None, _CACHE] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            file_okay=False,
            callback=check_out,
            help="Folder of the converted model. [dim]\\[default: weights/NAME][/dim]",
        ),
    ] = None,
    convert: Annotated[bool, typer.Option(help="Convert a whole model once its files are downloaded.")] = True,
    quiet: Quiet = False,
) -> None:
    """Download files into the cache, check them, and convert those of a whole model.

    A stopped download resumes. CLIPGEN_MIRROR names servers to use instead, CLIPGEN_OFFLINE=1 forbids any download.
    Prints the paths of the files or of the model.
    """
    from clipgen.weights.cache import fetch as fetch_files
    from clipgen.weights.cache import find_model

    entry, settings = find_model(name), _settings(cache)
    target = (out or MODELS / name) if entry.config and convert else None
    if out and not target:
        raise typer.BadParameter("--out is for a model that is converted; nothing is converted here: leave it out")
    if target and _is_model(target, entry.config):
        log(f"{target} exists and is complete; delete it to convert it again")
        typer.echo(target)
        return
    with downloads() as report:
        paths = fetch_files(entry, settings, report=report, log=log)
    if not target:
        for path in paths.values():
            typer.echo(path)
        return
    _convert(paths, target, entry.config or "")


@app.command()
def verify(folder: Annotated[Path, _FOLDER]) -> None:
    """Check a folder of weights against its manifest: sizes, SHA-256, and that its parts fit together."""
    from clipgen.weights.model_dir import load_model_dir

    config, parts = load_model_dir(folder)
    typer.echo(f"{folder} is complete: the model {config.name}, {sum(map(len, parts.values()))} tensors")


def _source(help: str) -> Any:
    return typer.Option(dir_okay=False, show_default=False, help=help)


_OUT = typer.Option("--out", "-o", file_okay=False, callback=check_out, show_default=False, help="Folder to write.")


@app.command(epilog="Example: clipgen weights convert --clip a.pt --vqgan b.pt --gpt c.pt --out weights/mine")
def convert(
    out: Annotated[Path, _OUT],
    clip: Annotated[
        Path | None, _source("CLIP: OpenAI's file, HFAiLab's, or .safetensors under OpenAI's names.")
    ] = None,
    vqgan: Annotated[
        Path | None, _source("VQGAN: HFAiLab's or CompVis' checkpoint, or .safetensors of stage 1.")
    ] = None,
    gpt: Annotated[Path | None, _source("GPT: HFAiLab's checkpoint, or .safetensors of stage 2.")] = None,
    config: Annotated[str, typer.Option(help="Their model: coco, imagenet, or a .yaml file.")] = "coco",
) -> None:
    """Turn published checkpoints into a folder of weights. Code in them is never executed.

    All three make a model. One or two become files for training the rest: clip.safetensors, vqgan.safetensors.
    """
    given = {part: path for part, path in (("clip", clip), ("vqgan", vqgan), ("gpt", gpt)) if path}
    if not given:
        raise typer.BadParameter("nothing to convert: give --clip, --vqgan and --gpt, or some of them")
    if (out / "manifest.json").exists():
        raise typer.BadParameter(f"{out} already holds a model; give another --out, or delete it")
    taken = [file for part in given if (file := out / f"{part}.safetensors").exists()]
    if taken:
        raise typer.BadParameter(f"{taken[0]} exists; give another --out, or delete it")
    if len(given) == 3:
        _convert(given, out, config)
    else:
        _convert_parts(given, out, config)


@app.command()
def info(folder: Annotated[Path, _FOLDER], as_json: Annotated[bool, _JSON] = False) -> None:
    """Show a model's configuration, its parameters, the memory it needs and the GPUs that it fits on."""
    from clipgen.weights.describe import describe_model_dir

    facts = describe_model_dir(folder)
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def _settings(cache: Path | None) -> Settings:
    """Read the settings from the environment; --cache takes the place of CLIPGEN_CACHE."""
    from clipgen.weights.cache import Settings

    return Settings.from_environment(os.environ | ({"CLIPGEN_CACHE": str(cache)} if cache else {}))


def _record(entry: PretrainedModel, settings: Settings) -> dict[str, Any]:
    from clipgen.weights.cache import expected_fingerprint, file_state

    files = []
    for file in entry.files:
        path = settings.path(entry, file)
        size, sha256 = expected_fingerprint(file, path)
        known = {"bytes": size, "sha256": sha256}
        where = {"path": str(path), "state": file_state(entry, file, settings)}
        files.append({"name": file.name, "url": file.url, **known, "tensor_bytes": file.tensors, **where})
    model = MODELS / entry.name if entry.config else None
    return {
        "name": entry.name,
        "what": entry.what,
        "page": entry.page,
        "licence": entry.licence,
        "files": files,
        "model": model and str(model),
        "converted": model and (model / "manifest.json").is_file(),
    }


def _size(file: dict[str, Any]) -> str:
    if file["bytes"]:
        return f"{file['bytes']:,} bytes"
    return "size unknown" + (f", more than {file['tensor_bytes'] / 1e6:,.0f} MB" if file["tensor_bytes"] else "")


def _is_model(folder: Path, name: str | None) -> bool:
    """Check whether `folder` already holds the complete model `name`; False if it is damaged.

    Raises:
        BadParameter: it holds another model.
        ConfigError: it holds one whose configuration cannot be read.
    """
    if not (folder / "manifest.json").exists():
        return False
    from clipgen.config import load_model_config
    from clipgen.errors import WeightsError
    from clipgen.weights.model_dir import load_model_dir

    found = load_model_config(folder / "config.yaml").name
    if found != name:
        raise typer.BadParameter(f"{folder} holds the model {found}; give another --out, or delete it")
    try:
        load_model_dir(folder)
    except WeightsError as error:
        log(f"{error}. It is converted again")
        return False
    return True


def _convert(paths: dict[str, Path], out: Path, config: str) -> None:
    """Convert three checkpoints to a model."""
    from clipgen.weights.convert import convert_checkpoints

    started = time.perf_counter()
    log(f"converting into {out} ...")
    folder = convert_checkpoints(paths["clip"], paths["vqgan"], paths["gpt"], out, config)
    log(f"converted in {time.perf_counter() - started:.0f} s; draw with: clipgen generate PROMPT --weights {folder}")
    typer.echo(folder)


def _convert_parts(paths: dict[str, Path], out: Path, config: str) -> None:
    """Convert one or two checkpoints to the files that the training scripts read."""
    from clipgen.config import load_preset
    from clipgen.utils.files import replacing
    from clipgen.weights.convert import convert_parts
    from clipgen.weights.tensor_file import write_tensors

    parts = convert_parts(paths, load_preset(config))  # all of them before any is written
    out.mkdir(parents=True, exist_ok=True)
    for part, tensors in parts.items():
        file = out / f"{part}.safetensors"
        with replacing(file) as temporary:
            write_tensors(temporary, tensors)
        typer.echo(file)


def _lines(facts: dict[str, Any], indent: str = "", in_bytes: bool = False) -> Iterator[str]:
    """Format nested facts as indented lines; numbers under "memory" and "bytes" are bytes."""
    for key, value in facts.items():
        sized = in_bytes or key in ("memory", "bytes")
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ", sized)
        elif isinstance(value, list):
            yield f"{indent}{key}: {', '.join(map(str, value)) or 'none'}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{indent}{key}: {f'{value / 1e6:,.1f} MB' if sized else f'{value:,}'}"
        else:
            yield f"{indent}{key}: {value}"
