"""What one of two processes does that train a model sharded by FSDP2."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from wherefrom.hf.recording import second_moments


def two_linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def two_steps(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.full((4, 3), 1.0 + step)).square().sum().backward()
        optimizer.step()
    return optimizer


def main(rank: int, folder: Path) -> None:
    """Write the moments as the recorder has them."""
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    model = two_linears()
    # In PyTorch 2.8, gloo silently adds gradients up where it is asked for their mean (pytorch#162338).
    fully_shard(model).set_force_sum_reduction_for_comms(True)
    moments = dict(second_moments(model, two_steps(model)))
    if rank == 0:
        save_file(moments, folder / "moments.safetensors")
    dist.destroy_process_group()

    # Threads that PyTorch has left behind fully_shard on a CPU now and then abort an interpreter that ends by itself.
    os._exit(0)
