"""The mini CLIP: OpenAI's architecture with small sizes; a sentence encoder teaches it what words mean.

    python train/mini_clip.py image --data data/emoji --out runs/clip
    python train/mini_clip.py text  --data data/emoji --out runs/clip
    python train/mini_clip.py join  --data data/emoji --out runs/clip

`image` trains the image tower with the text side frozen, as in LiT (arXiv 2111.07991): a picture must find its objects'
names among all names, and its caption among the batch's, in the encoder's space. `text` trains the text tower towards
the pictures: a caption belongs where its picture is, any other text among the pictures of the names that the encoder
finds nearest to it, so that "puppy" lands near dogs. `join` writes OUT/clip.safetensors and measures retrieval.
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
from train.captions import Emoji, article
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
from train.words import emoji_words, picture_captions, read_emoji, read_wordnet, teacher_embeddings

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
    # All names are negatives, not only those of the batch: the text side is frozen, so they cost nothing.
    records = read_records(args.data / "train")
    present = sorted({code for r in records for code in r["objects"]})
    names = name_embeddings([emoji[code] for code in present], args.out / "teacher_names.safetensors")
    names = names.to(accelerator.device)
    number = {code: i for i, code in enumerate(present)}
    objects = torch.tensor([[number[r["objects"][0]], number[r["objects"][-1]]] for r in records])
    pixels = read_pixels(args.data / "train")  # (N, 3, 64, 64) uint8: small enough to hold
    held_pixels, held_codes = read_pixels(args.data / "heldout"), read_codes(args.data / "heldout")

    model = build_mini_clip()
    model.train()
    tower = model.visual
    temperature = torch.nn.ParameterDict({"scale": torch.nn.Parameter(torch.tensor(2.7))})
    scale = temperature["scale"]
    scales = {"params": [scale], "weight_decay": 0.0}
    optimizer = AdamW([*decayed(tower, config.weight_decay), scales], config.lr)
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
        both = objects[rows].to(x.device)
        name_logits = (image @ names.t()) * scale.exp().clamp(max=100)
        naming = 0.5 * (F.cross_entropy(name_logits, both[:, 0]) + F.cross_entropy(name_logits, both[:, 1]))
        optimizer.zero_grad()
        accelerator.backward(naming + contrastive + 2 * alignment)
        accelerator.clip_grad_norm_(tower.parameters(), config.grad_clip)
        optimizer.step()
        schedule.step()
        ema.update_parameters(accelerator.unwrap_model(tower))

        done = step + 1
        if done % config.log_every == 0:
            scalars: dict[str, float | Tensor] = {
                "naming": naming.detach(),
                "contrastive": contrastive.detach(),
                "alignment": alignment.detach(),
                "scale": scale.exp(),
            }
            if done % config.sample_every == 0:
                with torch.no_grad():
                    found = F.normalize(ema.module(normalise(held_pixels).to(x.device)).float(), dim=-1).cpu()
                scalars |= recall(names.cpu(), found, present, held_codes)
            log.scalars(done, scalars)
        if done % config.save_every == 0 or done == config.steps:
            save_checkpoint(accelerator, out, done, config)
            save_tensors(ema.module.state_dict(), args.out / "image.safetensors")


def train_text(args: argparse.Namespace, config: TowerConfig, accelerator: Accelerator) -> None:
    emoji = read_emoji(args.data)
    pictures = picture_embeddings(args.data / "train", args.out)
    captions = picture_captions(args.data, "train", emoji, CAPTIONS, config.seed)
    words = sorted({*read_wordnet(args.wordnet, 55_000, config.seed), *emoji_words(list(emoji.values()))})
    bridged = bridge(words, emoji, pictures, read_records(args.data / "train"), args.out)
    texts = [*words, *(text for row in captions for text in row)]
    targets = torch.cat([bridged, pictures.repeat_interleave(CAPTIONS, 0)]).to(accelerator.device)
    tokens, _ = tokenize(texts, CONTEXT)
    lengths = tokens.argmax(1) + 1  # the end token has the highest id
    held = torch.zeros(len(texts), dtype=torch.bool)
    held[torch.randperm(len(words), generator=torch.Generator().manual_seed(1))[:1000]] = True

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

    # Words as often as captions; the quarter of a pool whose lengths are alike makes a batch with little padding.
    is_word = torch.arange(len(texts)) < len(words)
    weight = torch.where(is_word, 1 / is_word.sum(), 1 / (~is_word).sum()) * ~held
    for step in range(start, config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        pool = torch.multinomial(weight, 4 * config.batch_size, replacement=True, generator=generator)
        pool = pool[lengths[pool].argsort()].view(4, config.batch_size)
        rows = pool[int(torch.randint(4, (), generator=generator))]
        with accelerator.autocast():
            y = encode_tokens(tower, tokens[rows, : int(lengths[rows].max())].to(accelerator.device))
        y = F.normalize(y.float(), dim=-1)
        target = targets[rows]
        alignment = 1 - (y * target).sum(-1).mean()
        # Relations between sentences, not only their places: the contrastive term keeps neighbours apart.
        contrastive = F.cross_entropy(y @ target.t() * 20, (target @ target.t() * 20).softmax(-1))
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
                scalars["held_cosine"] = (found * targets[held]).sum(-1).mean()
            log.scalars(done, scalars)
        if done % config.save_every == 0 or done == config.steps:
            save_checkpoint(accelerator, out, done, config)
            save_tensors(ema.module.state_dict(), args.out / "text.safetensors")


@torch.no_grad()
def picture_embeddings(folder: Path, out: Path) -> Tensor:
    """The trained image tower's unit-norm embeddings (N, D) of a split, in the order of its metadata."""
    tower = build_mini_clip().visual.eval()
    tower.load_state_dict(load_file(out / "image.safetensors"))
    pixels = read_pixels(folder)
    with torch.autocast("cpu", torch.bfloat16):
        found = [tower(normalise(batch)).float() for batch in pixels.split(128)]
    return F.normalize(torch.cat(found), dim=-1)


def bridge(words: list[str], emoji: dict[str, Emoji], pictures: Tensor, records: list[dict], out: Path) -> Tensor:
    """Where texts belong among the pictures: (len(words), D) unit norm.

    Each text is a mixture of the pictures' means of its nearest names, weighted by the encoder's similarity.
    """
    codes = sorted({code for r in records for code in r["objects"]})
    names = name_embeddings([emoji[code] for code in codes], out / "teacher_names.safetensors")
    number = {code: i for i, code in enumerate(codes)}
    single = [i for i, r in enumerate(records) if len(r["objects"]) == 1]
    owner = torch.tensor([number[records[i]["objects"][0]] for i in single])
    means = torch.zeros(len(codes), pictures.shape[1]).index_add(0, owner, pictures[single])
    similar, nearest = (teacher_embeddings(words, out / "teacher_text.safetensors") @ names.t()).topk(8)
    weight = (similar / 0.04).softmax(-1)[..., None]
    return F.normalize((weight * F.normalize(means, dim=-1)[nearest]).sum(1), dim=-1)


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


def name_embeddings(emoji: list[Emoji], cache: Path) -> Tensor:
    """The teacher's unit-norm embeddings of each emoji's name, with and without its article averaged, (N, 384)."""
    names = [e.name for e in emoji]
    vectors = teacher_embeddings([*names, *(article(name) for name in names)], cache)
    return F.normalize(vectors[: len(names)] + vectors[len(names) :], dim=-1)


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
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    args = parser.parse_args()
    config = TowerConfig(steps=args.steps, sample_every=200)
    if args.tower == "join":
        join(args)
    else:
        train = train_image if args.tower == "image" else train_text
        train(args, config, build_accelerator(config))


if __name__ == "__main__":
    main()
