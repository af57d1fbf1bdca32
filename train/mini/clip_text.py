"""Train the mini CLIP's text tower on the frozen image tower, and join both in one file.

    python train/mini/clip_text.py --data data/emoji --out runs/clip

A caption's target is the embedding of its picture, among those that the GPT learns, so that a sentence can replace a
picture. Any other text's target is a mixture of the pictures of the names that the sentence encoder finds
nearest to it and to its gloss in WordNet, so that "puppy" lands near dogs although no emoji has that name.
Writes OUT/clip.safetensors and prints retrieval of held-out pictures by name.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from clipgen.models.clip import Clip, OpenAIClip, tokenize
from train.loop.arguments import at_least
from train.loop.batches import build_accelerator
from train.loop.checkpoint import Checkpoints, save_tensors
from train.loop.health import check_finite
from train.loop.logger import Logger
from train.loop.optimization import MovingAverage, cosine_schedule, weight_decay_groups
from train.loop.script import command
from train.mini.captions import Emoji, article
from train.mini.clip_data import (
    CONTEXT,
    SCALE,
    TowerConfig,
    build_mini_clip,
    name_embeddings,
    normalise,
    read_codes,
    read_pixels,
    recall,
)
from train.mini.words import emoji_words, picture_captions, read_emoji, read_records, read_wordnet, teacher_embeddings

CAPTIONS = 6
"""Number of captions of each picture."""
NEAREST = 8
"""Number of names in the target mixture of a text that is not a caption."""
KNOWN = 0.2
"""Added to the cosine of a text and a name if the text is the name or one of its keywords."""
MIX = {"captions": 0.4, "emoji": 0.25, "wordnet": 0.35}
"""Shares of a batch."""


@dataclass
class Texts:
    """Sentences and their targets. N texts, D embedding, C names.

    Attributes:
        texts: the N sentences.
        targets: target embedding of each, (N, D) unit norm.
        names: the names nearest to each, (N, NEAREST).
        weights: weights of these names, (N, NEAREST) summing to 1.
        shares: sampling probability of each, (N,).
        places: embedding of each name's picture, (C, D) unit norm.
    """

    texts: list[str]
    targets: Tensor
    names: Tensor
    weights: Tensor
    shares: Tensor
    places: Tensor


def build_texts(data: Path, out: Path, wordnet: Path, seed: int) -> Texts:
    """Build the training data of the tower."""
    emoji, records = read_emoji(data), read_records(data / "seen")
    pictures = picture_embeddings(data / "seen", out)
    codes = sorted({code for r in records for code in r["objects"]})
    number = {code: i for i, code in enumerate(codes)}
    places = name_places(records, pictures, number)

    ours = emoji_words(emoji.values())
    meanings = read_wordnet(wordnet, 65_000, seed)
    words = sorted({*meanings, *ours})
    meant = [meanings.get(word.removeprefix("an ").removeprefix("a "), word) for word in words]
    nearest, weights = nearest_names(
        words, meant, [emoji[code] for code in codes], known_names(words, ours, number), out
    )
    bridged = F.normalize((weights[..., None] * places[nearest]).sum(1), dim=-1)

    captions = picture_captions(data, "seen", emoji, CAPTIONS, seed)
    objects = torch.tensor([[number[r["objects"][0]], number[r["objects"][-1]]] for r in records])
    objects = F.pad(objects, (0, NEAREST - 2)).repeat_interleave(CAPTIONS, 0)
    halves = torch.zeros(len(objects), NEAREST)
    halves[:, :2] = 0.5

    kind = ["emoji" if word in ours else "wordnet" for word in words] + ["captions"] * len(objects)
    count = {name: kind.count(name) for name in MIX}
    return Texts(
        texts=[*words, *(text for row in captions for text in row)],
        targets=torch.cat([bridged, pictures.repeat_interleave(CAPTIONS, 0)]),
        names=torch.cat([nearest, objects]),
        weights=torch.cat([weights, halves]),
        shares=torch.tensor([MIX[name] / count[name] for name in kind]),
        places=places,
    )


def known_names(words: list[str], owners: dict[str, list[str]], number: dict[str, int]) -> Tensor:
    """The addend to the cosines of texts and names, (N, C): `KNOWN` where the emoji has the text, else 0."""
    known = torch.zeros(len(words), len(number))
    for i, word in enumerate(words):
        known[i, [number[code] for code in owners.get(word, ()) if code in number]] = KNOWN
    return known


def nearest_names(
    words: list[str], meant: list[str], emoji: list[Emoji], known: Tensor, out: Path
) -> tuple[Tensor, Tensor]:
    """The names that the sentence encoder finds nearest to each text, and their shares: (N, NEAREST) both.

    For rare words the encoder goes by spelling ("dinghy" is near "troll"), so it also encodes their glosses, and the
    keywords with the names.

    Args:
        meant: each text in more words.
        known: added to the similarities, (N, C).
    """
    names = name_embeddings(emoji, out / "teacher_names.safetensors")
    described = [f"{e.name}: {', '.join(e.keywords)}" for e in emoji]
    names = F.normalize(names + teacher_embeddings(described, out / "teacher_keywords.safetensors"), dim=-1)
    texts = teacher_embeddings(words, out / "teacher_text.safetensors")
    texts = F.normalize(texts + teacher_embeddings(meant, out / "teacher_meaning.safetensors"), dim=-1)
    similar, nearest = (texts @ names.t() + known).topk(NEAREST)
    return nearest, (similar / 0.02).softmax(-1)


def name_places(records: list[dict], pictures: Tensor, number: dict[str, int]) -> Tensor:
    """Embedding of each name's picture, (C, D) out of (N, D): alone, on white, glossy if available."""
    places = torch.zeros(len(number), pictures.shape[1])
    plain = [i for i, r in enumerate(records) if len(r["objects"]) == 1 and r["background"] == "white"]
    for i in sorted(plain, key=lambda i: records[i]["style"] == "3d"):  # glossy ones last: they overwrite others
        places[number[records[i]["objects"][0]]] = pictures[i]
    return places


@torch.no_grad()
def picture_embeddings(folder: Path, out: Path) -> Tensor:
    """The trained image tower's unit-norm embeddings (N, D) of a split, in the order of its metadata."""
    tower = build_mini_clip().visual.eval().to(memory_format=torch.channels_last)
    tower.load_state_dict(load_file(out / "image.safetensors"))
    with torch.autocast("cpu", torch.bfloat16):
        found = [tower(normalise(batch)).float() for batch in read_pixels(folder).split(128)]
    return F.normalize(torch.cat(found), dim=-1)


def encode_tokens(model: OpenAIClip, tokens: Tensor) -> Tensor:
    """The text tower on tokens (B, L), L at most its context: unit-norm embeddings (B, D).

    `CLIP.encode_text` needs the image tower for its dtype, which is missing while the text tower trains alone.
    """
    length = tokens.shape[1]
    x = (model.token_embedding(tokens) + model.positional_embedding[:length]).permute(1, 0, 2)  # (L, B, C)
    x = model.ln_final(model.transformer(x).permute(1, 0, 2))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


def join(data: Path, out: Path) -> None:
    """Join both towers in one file under OpenAI's names and measure retrieval with it."""
    weights = load_file(out / "text.safetensors")
    weights |= {f"visual.{k}": v for k, v in load_file(out / "image.safetensors").items()}
    save_tensors(weights, out / "clip.safetensors")
    clip = Clip.from_state_dict(weights)
    emoji = read_emoji(data)
    with torch.no_grad():
        texts = clip.encode_text([article(e.name) for e in emoji.values()])
        images = clip.encode_image(normalise(read_pixels(data / "heldout")))
    print(json.dumps(recall(texts, images, list(emoji), read_codes(data / "heldout"))))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="what `train.mini.emoji` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/clip"))
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="WordNet's database")
    parser.add_argument("--steps", type=at_least(1), default=6000, help="training steps")
    args = parser.parse_args()
    config = TowerConfig(steps=args.steps, batch_size=512, lr=1.5e-3)
    accelerator = build_accelerator(config)
    device = accelerator.device

    data = build_texts(args.data, args.out, args.wordnet, config.seed)
    places = data.places.to(device)
    tokens, _ = tokenize(data.texts, CONTEXT)
    lengths = tokens.argmax(1) + 1  # the end token has the highest id

    model = build_mini_clip()
    model.visual = torch.nn.Identity()
    model.train()
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model, config.weight_decay), config.lr, betas=(0.9, 0.98), fused=True
    )
    schedule = LambdaLR(optimizer, cosine_schedule(config))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    tower = accelerator.unwrap_model(model)
    ema = MovingAverage(tower, config.ema)
    accelerator.register_for_checkpointing(ema)
    out = args.out / "text"
    checkpoints = Checkpoints(accelerator, out, config.keep, about=asdict(config))
    start = checkpoints.load()
    log = Logger(out, config.steps, config.batch_size)

    for step in range(start, config.steps):
        # A batch is a quarter of a pool with similar lengths, to reduce padding.
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        pool = torch.multinomial(data.shares, 4 * config.batch_size, replacement=True, generator=generator)
        pool = pool[lengths[pool].argsort()].view(4, config.batch_size)
        rows = pool[int(torch.randint(4, (), generator=generator))]
        with accelerator.autocast():
            y = encode_tokens(tower, tokens[rows, : int(lengths[rows].max())].to(device))
        target = data.targets[rows].to(device)
        alignment = 1 - (y * target).sum(-1).mean()
        # Compare with all names, not only the batch's: their embeddings are frozen, so this is free.
        log_share = F.log_softmax(SCALE * y @ places.t(), dim=-1).gather(1, data.names[rows].to(device))
        naming = -(data.weights[rows].to(device) * log_share).sum(-1).mean()
        # Match similarities between sentences too, to keep styles and colours of one thing apart.
        relation = F.cross_entropy(SCALE * y @ target.t(), (SCALE * target @ target.t()).softmax(-1))
        optimizer.zero_grad()
        accelerator.backward(30 * alignment + naming + relation)
        accelerator.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        schedule.step()
        ema.update_parameters(tower)

        done = step + 1
        if done % config.log_every == 0:
            scalars: dict[str, float | Tensor] = {
                "alignment": alignment.detach(),
                "naming": naming.detach(),
                "relation": relation.detach(),
            }
            log.scalars(done, scalars)
            check_finite(done, scalars)
        if done % config.save_every == 0 or done == config.steps:
            checkpoints.save(done)
            save_tensors(ema.module.state_dict(), args.out / "text.safetensors")
    join(args.data, args.out)


if __name__ == "__main__":
    main()
