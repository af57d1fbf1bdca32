"""`clipgen morph`: images between two prompts, as a strip or an animation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipgen.cli.common import (
    FILES,
    HOW,
    Device,
    Dtype,
    Json,
    Out,
    Quiet,
    Seed,
    Weights,
    checked_text,
    load,
    make_folder,
    option,
    printable,
    show_figure,
)
from clipgen.cli.progress import progress
from clipgen.outputs.naming import free_stem
from clipgen.request import new_seed

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "Example: clipgen morph 'a lemon' 'a heart' --steps 8 --gif"

_FROM = typer.Argument(metavar="FROM", show_default=False, help="The first prompt, in quotes.")
_TO = typer.Argument(metavar="TO", show_default=False, help="The last prompt, in quotes.")
_CANDIDATES = option(HOW, "Images to draw per step, of which CLIP picks the best. 1 gives the smoothest change.")
_GIF = option(FILES, "Write a .gif that goes there and back instead of a strip.", "--gif")


def morph(
    start: Annotated[str, _FROM],
    end: Annotated[str, _TO],
    steps: Annotated[int, option(HOW, "Images, including both ends.", min=2, max=64)] = 8,
    candidates: Annotated[int, _CANDIDATES] = 1,
    guidance: Annotated[float | None, option(HOW, "How closely to follow, 0 to 30.", model="the model's")] = None,
    temperature: Annotated[float | None, option(HOW, "Randomness of the tokens, 0 to 10.", model="the model's")] = None,
    seed: Seed = None,
    out: Out = Path("outputs"),
    gif: Annotated[bool, _GIF] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    weights: Weights = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw images between two prompts: their embeddings are interpolated on the sphere, with one seed."""
    from clipgen.images.grids import labelled_grid, save_gif
    from clipgen.images.pixels import save_image
    from clipgen.outputs.metadata import KEY, together
    from clipgen.request import GenerationRequest

    settings: dict[str, Any] = {"candidates": candidates, "guidance": guidance, "temperature": temperature}
    settings["seed"] = new_seed() if seed is None else seed
    ends = [GenerationRequest(checked_text(text), **settings) for text in (start, end)]
    pipe = load(weights, device, dtype)
    make_folder(out)
    path = arc(pipe.embed(start), pipe.embed(end), steps)
    requests = [GenerationRequest([(start, a), (end, b)], **settings) for a, b in path[1:-1]]
    with progress(f"drawing {steps} steps", f"drew {steps} steps") as report:
        results = pipe.generate([ends[0], *requests, ends[1]], progress=report)
    images = [result.images[0] for result in results]
    metadata = together([result.receipts[0] for result in results])
    stem = free_stem(out, f"{start} to {end}", results[0].seed)
    if gif:
        file = save_gif(images, stem.with_name(f"{stem.name}-morph.gif"), comment=metadata[KEY])
    else:
        labels = [start, *("" for _ in requests), end]
        strip = labelled_grid(images, [printable(label) for label in labels], [""])
        file = save_image(strip, stem.with_name(f"{stem.name}-morph.png"), metadata=metadata)
    show_figure(file, results, f"{printable(start)} to {printable(end)}", {"from": start, "to": end}, as_json)


def arc(a: Tensor, b: Tensor, steps: int) -> list[tuple[float, float]]:
    """Compute the weights of `a` and `b`, (D,) unit norm, for `steps` equal angles from one to the other.

    Spherical interpolation (Shoemake 1985): sin((1 - s) w) / sin w and sin(s w) / sin w, where w is the angle between
    a and b. The weighted sum has unit norm, so a request with these parts is embedded exactly there. The weights are
    linear where a and b are equal, or opposite, when there is no shortest path.
    """
    angle = math.acos(min(max(float(a.cpu().double() @ b.cpu().double()), -1), 1))
    shares = [i / (steps - 1) for i in range(steps)]
    if math.sin(angle) < 1e-6:
        return [(1 - s, s) for s in shares]
    return [(math.sin((1 - s) * angle) / math.sin(angle), math.sin(s * angle) / math.sin(angle)) for s in shares]
