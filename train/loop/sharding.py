"""Models too large for one GPU: FSDP2 (`torch.distributed.fsdp.fully_shard`) and its checkpoints.

Every process keeps a shard of each weight, gradient and optimizer moment, and gathers a block's weights when the block
runs. Accelerate's FSDP refuses CPUs, where this is tested, so this makes the same calls directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from clipgen.errors import ConfigError


def check_processes() -> None:
    """Check that there are processes to shard a model over.

    Raises:
        ConfigError: this one was not started by torchrun.
    """
    if not dist.is_initialized():
        raise ConfigError("parallel=fsdp shards the model over processes: start it with torchrun, or use parallel=ddp")


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, bf16: bool) -> None:
    """Shard a model's parameters over all processes, in place. Build optimizers afterwards.

    Args:
        blocks: submodules that are gathered one at a time; the rest is gathered together.
        bf16: whether weights are gathered in bfloat16; they are stored, and gradients reduced, in float32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model. If it is sharded: on the CPU, of the main process only, and empty on the others.

    All processes call this.
    """
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


@dataclass(frozen=True)
class ShardedState:
    """Sharded models and the optimizer of the first one, as a checkpoint that any number of processes can load."""

    models: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer

    def save(self, folder: Path) -> None:
        """Write the shards of every process. All processes call this."""
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Read the shards of this process, whichever processes wrote them. All processes call this."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        for name, model in self.models.items():
            set_model_state_dict(model, state[name])
        set_optimizer_state_dict(self._first, self.optimizer, state["optimizer"])

    @property
    def _first(self) -> nn.Module:
        return next(iter(self.models.values()))

    def _state(self) -> dict[str, dict]:
        moments = get_optimizer_state_dict(self._first, self.optimizer)
        return {name: get_model_state_dict(model) for name, model in self.models.items()} | {"optimizer": moments}
