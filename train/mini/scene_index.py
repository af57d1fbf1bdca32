"""Scenes -> coverage.safetensors beside the weights: how near a sentence is to the world that the GPT was trained on.

python -m train.mini.scene_index --weights weights/mine --data data/emoji
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import random
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from clipgen.images.pixels import to_clip
from clipgen.models.clip import Clip
from clipgen.utils.entry_point import entry_point
from clipgen.weights.model_dir import MANIFEST, read_manifest
from clipgen.weights.tensor_file import load_tensors
from train.index import build_index, write_index
from train.loop.arguments import at_least
from train.mini.describe import Words, describe
from train.mini.objects import read_objects
from train.mini.source import Scenes, trained_scenes
from train.mini.wordnet import narrower_words

SCENES = 8_000
SENTENCES = 1_000
_BATCH = 64


def add_scene_index(weights: Path, scenes: Scenes, words: Words, count: int = SCENES) -> Path:
    """Write the index of the first `count` scenes, and name it in the manifest.

    Sentences that prompts are measured against describe the scenes after those.

    Args:
        weights: folder of weights.
        words: more words for objects, as for `describe`.

    Raises:
        WeightsError: the folder of weights has no manifest, or its CLIP cannot be read.
    """
    read_manifest(weights / MANIFEST)  # fails before the work, not after it; an old index may be damaged
    clip = Clip.from_state_dict(load_tensors(weights / "clip.safetensors"))
    others = range(count, count + SENTENCES)
    sentences = [describe(scenes.facts(i), random.Random(i), words) for i in others]
    names = [f"scene {i}: {describe(scenes.facts(i), random.Random(i))}" for i in range(count)]
    with torch.inference_mode():
        texts = [clip.encode_text(sentences[i : i + _BATCH]) for i in range(0, len(sentences), _BATCH)]
        images = _embed(clip, scenes, count)
    return write_index(weights, build_index(images.clone(), names, torch.cat(texts).clone()))


def _embed(clip: Clip, scenes: Scenes, count: int) -> Tensor:
    found = []
    for first in track(range(0, count, _BATCH), f"embedding {count} scenes"):
        images = [Image.fromarray(scenes.image(i)) for i in range(first, min(count, first + _BATCH))]
        found.append(clip.encode_image(to_clip(images, clip.image_size)))
    return torch.cat(found)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights that gets the index")
    parser.add_argument("--data", default="data/emoji", help="the folder that `make renders` fills")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="WordNet's database")
    parser.add_argument("--scenes", type=at_least(1), default=SCENES, help="scenes in the index")
    args = parser.parse_args()
    words = narrower_words(args.wordnet, read_objects().values())
    path = add_scene_index(args.weights, trained_scenes(args.data), words, args.scenes)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
