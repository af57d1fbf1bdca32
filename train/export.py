"""Results of the training scripts -> a folder of weights that `clipgen` and `predict.py` load.

    python -m train.export --config mini --clip runs/clip/clip.safetensors --vqgan runs/vqgan --gpt runs/gpt \\
        --out weights/mine
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
from pathlib import Path

from clipgen.utils.entry_point import entry_point
from clipgen.weights.model_dir import save_model_dir
from clipgen.weights.tensor_file import load_tensors
from train.config import load_config
from train.loop.checkpoint import in_half


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini", help="mini, photos, coco, imagenet, or the path of a .yaml file")
    parser.add_argument("--clip", type=Path, required=True, help="CLIP weights, .safetensors")
    parser.add_argument("--vqgan", type=Path, required=True, help="folder that stage 1 wrote")
    parser.add_argument("--gpt", type=Path, required=True, help="folder that stage 2 wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of weights to write")
    args = parser.parse_args()
    files = {"clip": args.clip, "vqgan": args.vqgan / "vqgan.safetensors", "gpt": args.gpt / "gpt.safetensors"}
    for part, file in files.items():
        if not file.is_file():
            parser.error(f"{file} is missing; train the {part} first")
    config = load_config(args.config).model
    save_model_dir(args.out, config, {part: in_half(load_tensors(file)) for part, file in files.items()})
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
