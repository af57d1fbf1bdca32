"""The mini CLIP: OpenAI's architecture with small sizes, its words distilled from a sentence encoder.

    python train/mini_clip.py image --data data/emoji --out runs/clip
    python train/mini_clip.py text  --data data/emoji --out runs/clip
    python train/mini_clip.py join  --data data/emoji --out runs/clip

`image` trains the image tower against the encoder's embeddings of captions (contrastive, the text side frozen as in
LiT, arXiv 2111.07991, plus the cosine itself, which keeps the gap between words and pictures small). `text` distils
the text tower from the same encoder on WordNet and captions. They are independent and may run side by side; `join`
writes OUT/clip.safetensors and the retrieval of held-out pictures by their names.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from clipgen.clip import Clip, tokenize
from clipgen.config import TrainConfig
from clipgen.images import CLIP_MEAN, CLIP_STD, load_image, to_clip
from train.captions import article
from train.common import (
    Logger,
    build_accelerator,
    build_ema,
    command,
    cosine,
    decayed,
    load_checkpoint,
    save_checkpoint,
    save_tensors,
)
from train.words import emoji_texts, picture_captions, read_emoji, read_wordnet, teacher_embeddings

EMBED_DIM = 384  # of all-MiniLM-L6-v2
CONTEXT = 32
CAPTIONS = 3


@dataclass
class TowerConfig(TrainConfig):
    """One tower's training."""

    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.997
    weight_decay: float = 0.05
    precision: str = "bf16"
    log_every: int = 50
    save_every: int = 100


def build_mini_clip() -> CLIP:
    """OpenAI's CLIP with 14 M parameters, two thirds of them the table of its 49,408 byte-pair tokens."""
    return CLIP(
        embed_dim=EMBED_DIM,
        image_resolution=64,
        vision_layers=6,
        vision_width=192,
        vision_patch_size=8,
        context_length=CONTEXT,
        vocab_size=49408,
        transformer_width=192,
        transformer_heads=3,
        transformer_layers=4,
    )


def train_image(args: argparse.Namespace, config: TowerConfig, accelerator: Accelerator) -> None:
    emoji = read_emoji(args.data)
    captions = picture_captions(args.data, "train", emoji, CAPTIONS, config.seed)
    unique = sorted({text for row in captions for text in row})
    vectors = teacher_embeddings(unique, args.out / "teacher_image.safetensors").to(accelerator.device)
    place = {text: i for i, text in enumerate(unique)}
    targets = torch.tensor([[place[text] for text in row] for row in captions])
    pixels = read_pixels(args.data / "train")  # (N, 3, 64, 64) uint8: small enough to hold
    held_pixels, held_codes = read_pixels(args.data / "heldout"), read_codes(args.data / "heldout")

    model = build_mini_clip()
    model.train()
    tower = model.visual
    temperature = torch.nn.ParameterDict({"scale": torch.nn.Parameter(torch.tensor(2.7))})
    scale = temperature["scale"]
    optimizer = AdamW([*decayed(tower, config.weight_decay), *decayed(temperature, 0.0)], config.lr)
    schedule = LambdaLR(optimizer, cosine(config))
    tower, optimizer, schedule = accelerator.prepare(tower, optimizer, schedule)
    ema = build_ema(accelerator.unwrap_model(tower), config.ema)
    accelerator.register_for_checkpointing(ema, temperature)
    out = args.out / "image"
    start = load_checkpoint(accelerator, out)
    log = Logger(out, config.steps, config.batch_size)

    for step in range(start, config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        rows = torch.randint(len(pixels), (config.batch_size,), generator=generator)
        x = normalise(augment(pixels[rows], generator)).to(accelerator.device)
        text = vectors[targets[rows, torch.randint(CAPTIONS, (len(rows),), generator=generator)]]
        with accelerator.autocast():
            image = tower(x)
        image = F.normalize(image.float(), dim=-1)
        cosines = image @ text.t()
        # Pictures of one thing in many styles share a batch: an equal caption is no negative.
        same = torch.eye(len(rows), device=x.device, dtype=torch.bool)
        logits = (cosines * scale.exp().clamp(max=100)).masked_fill((text @ text.t() > 0.98) & ~same, -1e4)
        labels = torch.arange(len(rows), device=x.device)
        contrastive = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels))
        alignment = 1 - cosines.diagonal().mean()
        optimizer.zero_grad()
        accelerator.backward(contrastive + 2 * alignment)
        accelerator.clip_grad_norm_(tower.parameters(), config.grad_clip)
        optimizer.step()
        schedule.step()
        ema.update_parameters(accelerator.unwrap_model(tower))

        done = step + 1
        if done % config.log_every == 0:
            scalars: dict[str, float | Tensor] = {
                "contrastive": contrastive.detach(),
                "alignment": alignment.detach(),
                "scale": scale.exp(),
            }
            if done % config.sample_every == 0:
                names = teacher_embeddings([article(e.name) for e in emoji.values()], args.out / "names.safetensors")
                with torch.no_grad():
                    found = F.normalize(ema.module(normalise(held_pixels).to(x.device)).float(), dim=-1).cpu()
                scalars |= recall(names, found, list(emoji), held_codes)
            log.scalars(done, scalars)
        if done % config.save_every == 0 or done == config.steps:
            save_checkpoint(accelerator, out, done, config)
            save_tensors(ema.module.state_dict(), args.out / "image.safetensors")


def train_text(args: argparse.Namespace, config: TowerConfig, accelerator: Accelerator) -> None:
    emoji = read_emoji(args.data)
    words = read_wordnet(args.wordnet, 55_000, config.seed)
    captions = emoji_texts(list(emoji.values()), per_emoji=16, pairs=12_000, seed=config.seed)
    texts = sorted({*words, *captions})
    vectors = teacher_embeddings(texts, args.out / "teacher_text.safetensors").to(accelerator.device)
    tokens, _ = tokenize(texts, CONTEXT)
    lengths = tokens.argmax(1) + 1  # the end token has the highest id
    held = torch.zeros(len(texts), dtype=torch.bool)
    held[torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))[:1000]] = True
    known = set(captions)
    is_caption = torch.tensor([text in known for text in texts])

    model = build_mini_clip()
    model.visual = torch.nn.Identity()
    model.train()
    optimizer = AdamW(decayed(model, config.weight_decay), config.lr, betas=(0.9, 0.98))
    schedule = LambdaLR(optimizer, cosine(config))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    tower = accelerator.unwrap_model(model)
    ema = build_ema(tower, config.ema)
    accelerator.register_for_checkpointing(ema)
    out = args.out / "text"
    start = load_checkpoint(accelerator, out)
    log = Logger(out, config.steps, config.batch_size)

    # Batches of similar lengths, and captions as often as WordNet, which has more texts.
    weight = torch.where(is_caption, 1.0 / is_caption.sum(), 1.0 / (~is_caption).sum()) * ~held
    for step in range(start, config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        pool = torch.multinomial(weight, 4 * config.batch_size, replacement=True, generator=generator)
        pool = pool[lengths[pool].argsort()].view(4, config.batch_size)
        rows = pool[int(torch.randint(4, (), generator=generator))]
        with accelerator.autocast():
            y = encode_tokens(tower, tokens[rows, : int(lengths[rows].max())].to(accelerator.device))
        y = F.normalize(y.float(), dim=-1)
        target = vectors[rows]
        alignment = 1 - (y * target).sum(-1).mean()
        # Relations between sentences, not only their places: the contrastive term keeps neighbours apart.
        contrastive = F.cross_entropy(y @ target.t() * 20, torch.arange(len(rows), device=y.device))
        optimizer.zero_grad()
        accelerator.backward(10 * alignment + contrastive)
        accelerator.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        schedule.step()
        ema.update_parameters(tower)

        done = step + 1
        if done % config.log_every == 0:
            scalars: dict[str, float | Tensor] = {
                "alignment": alignment.detach(),
                "contrastive": contrastive.detach(),
            }
            if done % config.sample_every == 0:
                with torch.no_grad():
                    found = F.normalize(encode_tokens(ema.module, tokens[held].to(y.device)).float(), dim=-1)
                scalars["held_cosine"] = (found * vectors[held]).sum(-1).mean()
            log.scalars(done, scalars)
        if done % config.save_every == 0 or done == config.steps:
            save_checkpoint(accelerator, out, done, config)
            save_tensors(ema.module.state_dict(), args.out / "text.safetensors")


def join(args: argparse.Namespace) -> None:
    """Put both towers into one file of OpenAI's names and measure retrieval with it."""
    weights = load_file(args.out / "text.safetensors")
    weights |= {f"visual.{k}": v for k, v in load_file(args.out / "image.safetensors").items()}
    save_tensors(weights, args.out / "clip.safetensors")
    clip = Clip.from_state_dict(weights)
    emoji = read_emoji(args.data)
    with torch.no_grad():
        texts = clip.encode_text([article(e.name) for e in emoji.values()])
        images = clip.encode_image(normalise(read_pixels(args.data / "heldout")))
    print(json.dumps(recall(texts, images, list(emoji), read_codes(args.data / "heldout"))))


def encode_tokens(model: CLIP, tokens: Tensor) -> Tensor:
    """The text tower on tokens (B, L), L at most its context: embeddings (B, D), not normalised.

    `CLIP.encode_text` asks the image tower for its precision, which is not there while the text tower trains alone.
    """
    length = tokens.shape[1]
    x = (model.token_embedding(tokens) + model.positional_embedding[:length]).permute(1, 0, 2)  # (L, B, C)
    x = model.ln_final(model.transformer(x).permute(1, 0, 2))
    return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ model.text_projection


def read_records(folder: Path) -> list[dict]:
    """The metadata of a split."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def read_codes(folder: Path) -> list[str]:
    """The first object of each picture of a split."""
    return [record["objects"][0] for record in read_records(folder)]


def read_pixels(folder: Path) -> Tensor:
    """All pictures of a split as the image tower will see them, uint8 (N, 3, 64, 64), in the metadata's order."""
    mean, std = clip_statistics()
    out = []
    for record in read_records(folder):
        x = to_clip([load_image(folder / record["file_name"])], 64) * std + mean
        out.append((x * 255).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(out)


def clip_statistics() -> tuple[Tensor, Tensor]:
    """CLIP's mean and std, (1, 3, 1, 1)."""
    return torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), torch.tensor(CLIP_STD).view(1, 3, 1, 1)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> CLIP-normalised float32."""
    mean, std = clip_statistics()
    return (pixels.float() / 255 - mean) / std


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift uint8 (B, 3, S, S) by up to 4 px at its edges' colour, and flip half of the batch."""
    side = pixels.shape[-1]
    padded = F.pad(pixels.float(), (4, 4, 4, 4), mode="replicate").to(torch.uint8)
    y, x = torch.randint(9, (2,), generator=generator).tolist()
    shifted = padded[..., y : y + side, x : x + side]
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], shifted.flip(-1), shifted)


def recall(texts: Tensor, images: Tensor, text_codes: list[str], image_codes: list[str]) -> dict[str, float]:
    """Share of the pictures whose own name is found: for each picture's name, is it among the k nearest pictures?

    Args:
        texts: unit norm (M, D), one per emoji; images: unit norm (N, D), of distinct emoji.
    """
    rows = [text_codes.index(code) for code in image_codes]
    order = (texts[rows] @ images.t()).argsort(dim=1, descending=True)
    rank = (order == torch.arange(len(rows))[:, None]).float().argmax(1)
    return {f"recall_{k}": (rank < k).float().mean().item() for k in (1, 5, 10)}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tower", choices=("image", "text", "join"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="what `train.emoji` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/clip"))
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="WordNet's database")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    config = TowerConfig(steps=args.steps, sample_every=200)
    if args.tower == "join":
        join(args)
    else:
        train = train_image if args.tower == "image" else train_text
        train(args, config, build_accelerator(config))


if __name__ == "__main__":
    main()
