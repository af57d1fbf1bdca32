"""Train the image tower of the mini CLIP to recognise the facts of scenes.

    python -m train.mini.image_tower --data data/emoji --out runs/clip [--minutes 9] [batch_size=256 ...]

Linear heads predict the facts of scenes from the embedding, so that it encodes all of them. `train/mini/text_tower.py`
then maps sentences to the embeddings of their scenes. After Ctrl-C, SIGTERM or --minutes, the same command resumes.
Writes OUT/image.safetensors and OUT/heads.safetensors; init=FILE starts from these, as copied from another machine, or
from the image tower of a whole CLIP, such as weights/mini/clip.safetensors, which already recognises the objects.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

from argparse import Namespace
from collections import deque
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from clipgen.weights.tensor_file import load_tensors
from train.loop.batches import build_accelerator, process_rows
from train.loop.checkpoint import Checkpoints, save_tensors
from train.loop.health import check_finite
from train.loop.loader import ignore_signals
from train.loop.logger import Logger
from train.loop.optimization import MovingAverage, cosine_schedule, load_model_weights, set_lr, weight_decay_groups
from train.loop.output import lock_output
from train.loop.script import command
from train.loop.stopping import Stop
from train.mini.labels import Heads, accuracy, heads_loss
from train.mini.towers import EMBED_DIM, TowerConfig, build_clip, embed, normalise, open_scenes, parse_tower


def init_tower(tower: nn.Module, heads: Heads, path: Path) -> None:
    """Load the tower and its heads, or the tower alone if the file is a whole CLIP.

    Raises:
        WeightsError: the file is missing, is not .safetensors, or does not fit.
    """
    is_clip = any(name.startswith("visual.") for name in load_tensors(path))
    load_model_weights(tower, path, "visual." if is_clip else "")
    if not is_clip:
        load_model_weights(heads, path.with_name("heads.safetensors"))


@command
def main() -> None:
    args, config = parse_tower(__doc__ or "")
    with lock_output(args.out):
        train(args, config)


def train(args: Namespace, config: TowerConfig) -> None:
    """Train an image tower to the last step, or until stopped."""
    accelerator = build_accelerator(config)
    device, is_main = accelerator.device, accelerator.is_main_process
    scenes = open_scenes(args.data)

    tower = build_clip().visual.train().to(memory_format=torch.channels_last)  # a third faster on a CPU
    heads = Heads(EMBED_DIM)
    if config.init:
        init_tower(tower, heads, Path(config.init))
    groups = [
        *weight_decay_groups(tower, config.weight_decay),
        {"params": list(heads.parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.98), fused=True)
    tower, heads, optimizer = accelerator.prepare(tower, heads, optimizer)
    ema = MovingAverage(accelerator.unwrap_model(tower), config.ema)
    average = ema.module
    accelerator.register_for_checkpointing(ema)
    out = args.out / "image"
    checkpoints = Checkpoints(accelerator, out, config.keep, {"batch_size": config.batch_size}, asdict(config))
    start = checkpoints.load()
    part = process_rows(accelerator, config.batch_size)
    # The first scenes are for validation only.
    firsts = [config.held_out + step * config.batch_size for step in range(start, config.steps)]
    rows = [list(range(first, first + config.batch_size))[part] for first in firsts]
    batches = DataLoader(scenes, batch_sampler=rows, num_workers=config.workers, worker_init_fn=ignore_signals)
    held = [tensor.to(device) for tensor in scenes.batch(list(range(config.held_out)))]
    log = Logger(out, config.steps, config.batch_size, start) if is_main else None
    factor = cosine_schedule(config)
    recent = deque[Tensor](maxlen=8)

    with Stop(args.minutes) as stop:
        for step, batch in zip(range(start, config.steps), batches, strict=True):
            pixels, labels = (tensor.to(device) for tensor in batch)
            set_lr(optimizer, config.lr * factor(step))
            with accelerator.autocast():
                embedding = embed(tower, pixels)
            loss = heads_loss(heads(embedding), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(tower.parameters(), config.grad_clip)
            optimizer.step()
            ema.update_parameters(accelerator.unwrap_model(tower))
            recent.append(pixels)

            done = step + 1
            stopping = stop.requested()
            sampling = done % config.sample_every == 0 or done == config.steps
            saving = done % config.save_every == 0 or done == config.steps or stopping
            if is_main and (sampling or saving):
                update_bn(map(normalise, recent), average)  # averaged weights have activation statistics of their own
            if log is not None and (done % config.log_every == 0 or done == config.steps):
                line: dict[str, float | Tensor] = {"loss": loss.detach()}
                check_finite(done, line)
                if sampling:
                    with torch.no_grad():
                        found = torch.cat([embed(average, some) for some in held[0].split(128)])
                        line |= accuracy(accelerator.unwrap_model(heads)(found), held[1])
                log.scalars(done, line)
            if saving:
                if is_main:
                    save_tensors(average.state_dict(), args.out / "image.safetensors")
                    save_tensors(accelerator.unwrap_model(heads).state_dict(), args.out / "heads.safetensors")
                checkpoints.save(done)
            if stopping:
                stop.leave(f"step {done} of {config.steps} is saved in {out}")


if __name__ == "__main__":
    main()
