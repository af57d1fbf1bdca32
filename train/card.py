"""Write the model card of a model folder: README.md, which says how it was made and how good it is, and samples.jpg.

    python -m train.card --weights runs/mine/weights --evaluation runs/mine/evaluation.json --data photos \\
        --config runs/mine/config.yaml --minutes runs/mine/minutes.json [--prompts prompts.txt]
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from clipgen import ClipGen
from clipgen.images.grids import labelled_grid
from clipgen.images.pixels import from_pixels, save_image, to_pixels
from clipgen.images.sources import Source, Subset, open_source
from clipgen.request import GenerationRequest
from clipgen.utils.files import write_text
from clipgen.utils.text import read_lines
from clipgen.weights.describe import describe_model_dir
from train.config import Config, load_config
from train.data.images import readable_images
from train.loop.script import command

ROWS, COLUMNS, CANDIDATES = 6, 4, 16


def best_of_grid(pipe: ClipGen, prompts: Sequence[str], source: Source) -> Image.Image:
    """Best 4 of 16 candidates, seed 0, for some prompts, or without prompts for some images, shown first."""
    size = pipe.config.vqgan.image_size
    images = [] if prompts else list(readable_images(Subset(source, 2 * ROWS)))[:ROWS]
    given = from_pixels(to_pixels(images, size)) if images else []
    asked: list[str | Image.Image] = [*prompts[:ROWS], *given]
    requests = [GenerationRequest(prompt, num_outputs=COLUMNS, candidates=CANDIDATES, seed=0) for prompt in asked]
    cells: list[Image.Image] = []
    for i, result in enumerate(pipe.generate(requests)):
        cells += [*given[i : i + 1], *result.images]
    columns = [""] * COLUMNS if prompts else ["given", "generated from its embedding", "", "", ""]
    return labelled_grid(cells, columns, [text[:40] for text in prompts[:ROWS]] or [""] * len(given))


def hub_metadata(prompts: Sequence[str]) -> str:
    """YAML that the Hub reads at the top of a model card: library, task, licence, and the samples as example.

    The licence is "other", to be changed by whoever publishes: it follows from that of the training images.
    """
    metadata = {
        "library_name": "clipgen",
        "pipeline_tag": "text-to-image",
        "license": "other",
        "license_name": "follows-training-images",
        "tags": ["clip-gen", "vqgan", "text-to-image"],
        "widget": [{"text": prompts[0] if prompts else "-", "output": {"url": "samples.jpg"}}],
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def card(
    facts: dict[str, Any],
    config: Config,
    data: str,
    evaluation: dict[str, Any],
    minutes: dict[str, float],
    prompts: Sequence[str] = (),
) -> str:
    """Compose the README.md of a model folder.

    Args:
        facts: what `describe_model_dir` returns.
        config: of the training.
        data: --data of the training.
        evaluation: the JSON of `clipgen evaluate`.
        minutes: by step of the training.
        prompts: sentences that samples.jpg shows; none for variations of images.
    """
    model, one, two = config.model, config.stage1, config.stage2
    parts = "\n".join(
        f"| `{name}.safetensors` | {part['parameters'] / 1e6:.1f} M |" for name, part in facts["parts"].items()
    )
    spent = "\n".join(f"| {name} | {value:.1f} |" for name, value in minutes.items())
    reference, generated = evaluation["reference"], evaluation["prompts"]
    left_out = "".join(f"- {name}: {why}\n" for name, why in evaluation["left_out"].items())
    return f"""{hub_metadata(prompts)}
# {model.name}

A CLIP-GEN model of {model.vqgan.image_size} px images in {model.vqgan.grid} x {model.vqgan.grid} tokens of \
{model.vqgan.codebook_size} codes, trained on images alone.

```sh
clipgen generate "a lemon" --weights THIS_FOLDER
```

![Samples](samples.jpg)

*The best {COLUMNS} of {CANDIDATES} candidates by CLIP, seed 0, nothing picked by hand.*

| part | parameters |
|---|---|
{parts}

## Data
`{data}`; SHA-256 of the images used for evaluation: `{reference["sha256"]}`. What may be done with the
model depends on what may be done with these images.

## Training
| stage | steps | batch | learning rate | other settings |
|---|---|---|---|---|
| 1, VQGAN | {one.steps} | {one.batch_size} | {one.lr:g} | perceptual loss: {one.perceptual}, GAN from step \
{one.disc_start} |
| 2, GPT | {two.steps} | {two.batch_size} | {two.lr:g} | {two.optimizer}, condition dropout \
{two.condition_dropout:g}, noise {two.noise_angle:g} degrees |

`config.yaml` holds the model; the training's whole configuration lies beside the checkpoints.

| step | minutes, since it was last begun |
|---|---|
{spent}

## Figures
{generated["count"]} generated images ({generated["what"]}) against {reference["count"]} real ones, which are among \
those it was trained on; compared by {evaluation["features"]["what"]}.

| figure | value |
|---|---|
{_figures(evaluation["figures"])}

Not measured:
{left_out}
{"".join(f"Note: {warning}.{chr(10)}{chr(10)}" for warning in evaluation["warnings"])}"""


def _figures(figures: dict[str, Any], prefix: str = "") -> str:
    rows = []
    for name, value in figures.items():
        label = f"{prefix}{name}"
        rows.append(_figures(value, f"{label}, ") if isinstance(value, dict) else f"| {label} | {value:.4g} |")
    return "\n".join(rows)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="model folder")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON that `clipgen evaluate --out` wrote")
    parser.add_argument("--data", required=True, help="images it was trained on")
    parser.add_argument("--config", required=True, help="configuration of the training")
    parser.add_argument("--minutes", type=Path, required=True, help="JSON: step -> minutes")
    parser.add_argument(
        "--prompts", type=Path, help="prompts for the samples, one a line; by default variations of images"
    )
    args = parser.parse_args()
    prompts = [line for line in read_lines(args.prompts) if line] if args.prompts else []
    pipe = ClipGen.from_pretrained(args.weights)
    save_image(best_of_grid(pipe, prompts, open_source(args.data)), args.weights / "samples.jpg")
    evaluation, minutes = (json.loads(path.read_text()) for path in (args.evaluation, args.minutes))
    text = card(describe_model_dir(args.weights), load_config(args.config), args.data, evaluation, minutes, prompts)
    write_text(args.weights / "README.md", text)
    print(args.weights / "README.md")


if __name__ == "__main__":
    main()
