"""Training speed of both stages, and its share of the machine's matrix rate.

    python benchmarks/training.py [--config mini] [--steps 5] [--batch 16] [--recipes plain bf16 channels-last] [--json]

Stage 1: images per second of whole steps with the losses of the script, from files, by recipe: plain (float32), bf16,
bf16 with channels-last, and compiled as well. Stage 2: tokens per second from pixels and from extracted tokens. Each is
measured in a fresh process, after warm-up steps. Operations are counted on the meta device (stage 1) or by formula
(GPT: 6 per weight and token, 12 * layers * tokens * width for attention), so recomputation does not count as work. The
share is that of the rate of a square matrix product in the same precision and process. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # run from anywhere, installed or not

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from PIL import Image  # noqa: E402
from roofline import describe, in_words, matrix_weights, seconds  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from clipgen.config import GPTConfig  # noqa: E402
from clipgen.models.clip import Clip, OpenAIClip  # noqa: E402
from clipgen.models.gpt import GPT  # noqa: E402
from clipgen.models.vqgan import VQGAN  # noqa: E402
from clipgen.utils.entry_point import entry_point  # noqa: E402
from train.config import Config, load_config  # noqa: E402
from train.data.images import Images  # noqa: E402
from train.encode import Encoded, Encoders, write_shards  # noqa: E402
from train.loop.arguments import at_least  # noqa: E402
from train.loop.batches import choose_precision  # noqa: E402
from train.loop.loader import image_batches  # noqa: E402
from train.loop.optimization import MovingAverage, build_optimizers  # noqa: E402
from train.loop.stopping import Stop  # noqa: E402
from train.losses.gan import Gan  # noqa: E402
from train.losses.stage1 import Crop, LeCam, PatchDiscriminator, ReconstructionLoss  # noqa: E402

WARM_UP, IMAGES = 2, 64


@dataclass(frozen=True)
class Recipe:
    """How stage 1 is computed."""

    precision: str = "bf16"
    channels_last: bool = False
    compiled: bool = False


RECIPES = {
    "plain": Recipe("no"),
    "bf16": Recipe(),
    "channels-last": Recipe(channels_last=True),
    "compiled": Recipe(channels_last=True, compiled=True),
}
PARTS = (*(f"stage 1, {name}" for name in RECIPES), "stage 2, from pixels", "stage 2, from tokens")


class Stage1:
    """The step of train/stage1.py on one device."""

    def __init__(self, config: Config, recipe: Recipe, device: torch.device) -> None:
        c = config.stage1
        self.config, self.gan_on = c, c.disc_start < c.steps
        self.precision = choose_precision(replace(c, precision=recipe.precision))
        self.accelerator = Accelerator(mixed_precision=self.precision, cpu=device.type != "cuda")
        with device:
            self.vqgan, discriminator = VQGAN(config.model.vqgan), PatchDiscriminator(c.disc_ch)
        # LPIPS takes the same time with random weights.
        self.reconstruction_loss = ReconstructionLoss(
            replace(c, perceptual="none" if c.perceptual == "lpips" else c.perceptual)
        )
        if c.perceptual == "lpips":
            from lpips import LPIPS

            self.reconstruction_loss.perceptual = (
                LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
            )
        self.reconstruction_loss.to(device)
        self.opt_g = torch.optim.Adam(self.vqgan.parameters(), c.lr)
        opt_d = torch.optim.Adam(discriminator.parameters(), c.disc_lr)
        losses = self.reconstruction_loss, LeCam().to(device)
        self.gan = Gan(c, self.accelerator, self.vqgan, discriminator, opt_d, *losses)
        if recipe.channels_last:
            for module in (self.vqgan, discriminator, self.reconstruction_loss):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = torch.compile(self.vqgan) if recipe.compiled else self.vqgan
        self.ema = MovingAverage(self.vqgan, c.ema)

    def backward(self, x: Tensor) -> Tensor:
        """Compute the gradients of the VQGAN's losses for images (B, 3, H, W); returns their reconstructions."""
        x = x.contiguous(memory_format=self.layout)
        crop = Crop.random(x.shape[-2:], self.config.perceptual_crop, torch.Generator().manual_seed(0))
        self.opt_g.zero_grad()
        with self.accelerator.autocast():
            y, codebook, _ = self.model(x)
            reconstruction, _ = self.reconstruction_loss(y, x, crop)
        loss = reconstruction + codebook
        if self.gan_on:
            loss = loss + self.gan.loss(reconstruction, y, None)[0]
        self.accelerator.backward(loss)
        return y.detach().float()

    def step(self, x: Tensor) -> None:
        """Train on images (B, 3, H, W) for one step."""
        y = self.backward(x)
        self.accelerator.clip_grad_norm_(self.vqgan.parameters(), self.config.grad_clip)
        self.opt_g.step()
        self.ema.update_parameters(self.vqgan)
        if self.gan_on:
            self.gan.step([x], [y])


def stage1_flops(config: Config) -> float:
    """Operations per image of a step of stage 1, without those of the optimizers."""
    trainer = Stage1(config, RECIPES["plain"], torch.device("meta"))
    size = config.model.vqgan.image_size
    x = torch.empty(2, 3, size, size, device="meta")
    trainer.gan.optimizer.step = lambda *_: None  # type: ignore[method-assign, assignment]
    with FlopCounterMode(display=False) as counter:
        y = trainer.backward(x)
        if trainer.gan_on:
            trainer.gan.step([x], [y])
    return counter.get_total_flops() / len(x)


def gpt_flops(config: GPTConfig) -> float:
    """Operations per image of a step of stage 2, forward and backward; causal attention is not counted as half."""
    length = config.block_size
    return length * (6.0 * matrix_weights(config) + 12.0 * config.n_layer * length * config.n_embd)


def matrix_rate(precision: str, device: torch.device) -> float:
    """Operations per second of a square matrix product, in float32 on a GPU with TF32 where convolutions use it."""
    size, times = (8192, 8) if device.type == "cuda" else (2048, 1)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def product() -> None:
        for _ in range(times):
            a @ b
        synchronize(device)

    with float32_products(convolution_precision(device)):
        return times * 2 * size**3 / seconds(product)


def convolution_precision(device: torch.device) -> str:
    """PyTorch's name for the precision of float32 convolutions: TF32 is on for them by default, for products off."""
    return "high" if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "highest"


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products in a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Mean seconds of a step over `steps`, after `WARM_UP` more."""
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / steps


def write_noise_images(folder: Path, size: int) -> Path:
    """Write JPEG files of smooth noise, an eighth larger than the model's images."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(IMAGES):
        noise = torch.rand(8, 8, 3, generator=generator).mul(255).byte().numpy()
        Image.fromarray(noise).resize((size * 9 // 8,) * 2, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def keys(batch: int) -> Callable[[int], list[tuple[int, int]]]:
    """Keys of the images that each step reads: all in turn."""
    return lambda step: [(i % IMAGES, i) for i in range(step * batch, (step + 1) * batch)]


def measure_stage1(config: Config, name: str, steps: int, folder: Path, device: torch.device) -> dict[str, Any]:
    """Speed of stage 1 with one recipe, on a folder of images."""
    c, recipe = config.stage1, RECIPES[name]
    trainer = Stage1(config, recipe, device)
    rate = matrix_rate(trainer.precision, device)
    data = Images(folder, config.model.vqgan.image_size, c.min_scale)
    batches = image_batches(data, keys(c.batch_size), count(), c.workers)
    spent = timed(lambda: trainer.step(next(batches).pixels.to(device)), steps, device)
    return {"batch": c.batch_size, "seconds": spent, "images_per_s": c.batch_size / spent, "matrix_flops": rate}


def build_clip(config: Config) -> Clip:
    """A ViT-B/32 with random weights if embeddings have 512 numbers, else the CLIP of the mini model."""
    if config.model.gpt.n_cond == 512:
        return Clip(OpenAIClip(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12))
    return Clip.from_state_dict(load_file(ROOT / "weights" / "mini" / "clip.safetensors"))


def measure_stage2(config: Config, source: str, steps: int, folder: Path, device: torch.device) -> dict[str, Any]:
    """Speed of stage 2 from "pixels", encoded in every step, or from "tokens", an encoded set."""
    c = config.stage2
    precision = choose_precision(c)
    rate = matrix_rate(precision, device)
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type != "cuda")
    clip = build_clip(config)
    images = Images(folder, config.model.vqgan.image_size, c.min_scale, clip_size=clip.image_size)
    vqgan = VQGAN(config.model.vqgan).requires_grad_(False).eval()
    read: Encoders | Encoded = Encoders(accelerator, images, vqgan, clip, 1, 0, {"settings": {"views": 1}})
    if source == "tokens":
        write_shards(read, folder / "encoded", c.workers, Stop())  # type: ignore[arg-type]
        read = Encoded(folder / "encoded")
        del vqgan, clip
    batches: Iterator[tuple[Tensor, Tensor]] = read.batches(lambda s: [row for row, _ in keys(c.batch_size)(s)], 0, 0)
    gpt = GPT(config.model.gpt).to(device)
    optimizers, ema = build_optimizers(gpt, c, precision), MovingAverage(gpt, c.ema)

    def step() -> None:
        tokens, condition = (t.to(device) for t in next(batches))
        for optimizer in optimizers:
            optimizer.zero_grad()
        with accelerator.autocast():
            logits = gpt(tokens[:, :-1], condition)
        accelerator.backward(F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()))
        accelerator.clip_grad_norm_(gpt.parameters(), c.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        ema.update_parameters(gpt)

    spent = timed(step, steps, device)
    images_per_s = c.batch_size / spent
    tokens = images_per_s * config.model.gpt.block_size
    return {
        "batch": c.batch_size,
        "seconds": spent,
        "images_per_s": images_per_s,
        "tokens_per_s": tokens,
        "matrix_flops": rate,
    }


def run_part(part: str, config: Config, steps: int) -> dict[str, Any]:
    """Measure one of `PARTS` in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage, how = part.split(", ")
    with tempfile.TemporaryDirectory(prefix="training-") as name:
        folder = write_noise_images(Path(name) / "images", config.model.vqgan.image_size)
        if stage == "stage 1":
            found = measure_stage1(config, how, steps, folder, device)
        else:
            found = measure_stage2(config, how.removeprefix("from "), steps, folder, device)
    gpu = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return found | {"part": part, "gpu_peak_gb": gpu}


def to_table(report: dict[str, Any]) -> str:
    """Markdown table of a report."""
    plain = {r["part"]: r["images_per_s"] for r in report["results"]}.get("stage 1, plain")
    head = "| part | batch | images/s | tokens/s | GFLOP/image | share of the matrix rate | against plain |"
    lines = [in_words(report["machine"]), report["gpu"] or "no GPU", "", head, "|---|---|---|---|---|---|---|"]
    for r in report["results"]:
        tokens = f"{r['tokens_per_s']:.0f}" if "tokens_per_s" in r else ""
        faster = f"{r['images_per_s'] / plain:.2f}x" if plain and r["part"].startswith("stage 1") else ""
        rate = f"{r['share']:.0%} of {r['matrix_flops'] / 1e9:.0f} GFLOP/s" if r["share"] else ""
        count = f"{r['flops_per_image'] / 1e9:.1f}" if r["flops_per_image"] else ""
        cells = (r["part"], r["batch"], f"{r['images_per_s']:.2f}", tokens, count, rate)
        lines.append(f"| {' | '.join(map(str, cells))} | {faster} |")
    return "\n".join(lines)


def in_fresh_process(arguments: list[str]) -> dict[str, Any]:
    """Measure one part in a new Python process, whose memory and caches are not affected by earlier parts."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini", help="mini, photos, coco, imagenet, or a .yaml file")
    parser.add_argument("--steps", type=at_least(1), default=5, help="steps that are timed")
    parser.add_argument("--batch", type=at_least(1), help="images per step, by default the configuration's")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, help="of stage 1; compiled by default on GPUs only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="changes to the configuration, such as stage1.disc_start=0")
    args = parser.parse_intermixed_args()
    sizes = [f"stage{i}.batch_size={args.batch}" for i in (1, 2)] if args.batch else []
    config = load_config(args.config, [*args.overrides, *sizes])
    if args.part:
        print(json.dumps(run_part(args.part, config, args.steps)))
        return
    default = [name for name in RECIPES if name != "compiled" or torch.cuda.is_available()]
    parts = [f"stage 1, {name}" for name in (default if args.recipes is None else args.recipes)] + list(PARTS[-2:])
    flops = {"stage 1": stage1_flops(config), "stage 2": gpt_flops(config.model.gpt)}
    flops["stage 2, from pixels"] = None  # the encoders' operations are not counted
    results = []
    for part in parts:
        print(f"  {part} ...", file=sys.stderr, flush=True)
        common = ["--config", args.config, "--steps", str(args.steps), "--part", part, *args.overrides, *sizes]
        found, counted = in_fresh_process(common), flops.get(part, flops[part.split(",")[0]])
        share = counted and counted * found["images_per_s"] / found["matrix_flops"]
        results.append(found | {"flops_per_image": counted, "share": share})
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = {"machine": describe(), "gpu": gpu, "config": asdict(config), "steps": args.steps, "results": results}
    print(json.dumps(report) if args.json else to_table(report))


if __name__ == "__main__":
    main()
