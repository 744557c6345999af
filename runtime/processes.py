"""This process among those that `torchrun` started: who is the main one, and what they agree on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import user_errors
from runtime.hardware import choose_device

FROM_TORCHRUN = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `world_size` equal ones. Alone, its collectives do nothing."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None  # gloo, on the CPU: small agreements do not wait for a GPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        if self.control is None:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, dist.ReduceOp.MAX, group=self.control)
        return together.tolist()

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        value = value.detach().cpu().clone()
        if self.control is not None:
            dist.all_reduce(value, dist.ReduceOp.SUM, group=self.control)
        return value

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the main process runs before the others do, so that they find what it downloads."""
        if self.control is not None and not self.is_main:
            dist.barrier(group=self.control)
        yield
        if self.control is not None and self.is_main:
            dist.barrier(group=self.control)


@contextmanager
def join_processes(device_name: str) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, if it did, and leave them at the end of the block.

    Raises UserError if the variables that it sets have no meaning.
    """
    device = choose_device(device_name)
    if not all(os.environ.get(name) for name in FROM_TORCHRUN):  # some cluster software sets one or another alone
        yield Processes(device)
        return
    if device.type == "cuda":
        with user_errors("the environment's LOCAL_RANK"):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with user_errors(f"the environment's {', '.join(FROM_TORCHRUN)}"):
        if not 0 <= int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):  # it would be waited for without end
            raise ValueError(f"there is no process {os.environ['RANK']} among {os.environ['WORLD_SIZE']}")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        yield Processes(device, dist.get_rank(), dist.get_world_size(), control)
    finally:
        dist.destroy_process_group()


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective raised this because another process of the group is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo has no error type of its own
