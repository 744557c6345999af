"""Where a run runs: the device, its memory, and this process among those of `torchrun`."""

import contextlib
import ctypes
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

import liquid_kernel
from errors import RunFailed, UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 32 * 2**20  # bytes; the largest value that glibc accepts


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU. Raises UserError where it is not available."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise UserError(f"--device: {name} is not available on this machine; use --device auto")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of giving it back: fresh pages cost more than most layers do.

    A training step of 64 images is 12 % shorter on two cores. Only glibc has the call; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def make_reproducible(device: torch.device) -> None:
    """Let the same seed give the same bytes, which on CUDA excludes some kernels."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # kernels here write all that is read


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is worth a trial on this device."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def synchronize(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Processes:
    """This process among `world_size` equal ones. Its collectives are no-ops when it is alone."""

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
        """A block that the main process runs before the others do: what it downloads, they find."""
        if self.control is not None and not self.is_main:
            dist.barrier(group=self.control)
        yield
        if self.control is not None and self.is_main:
            dist.barrier(group=self.control)


@contextmanager
def join_processes(device_name: str) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, if it did; leave them at the end of the block."""
    device = choose_device(device_name)
    if "LOCAL_RANK" not in os.environ:
        yield Processes(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or NumPy raised this for want of memory, on a CPU or on a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


@contextmanager
def out_of_memory_named(batch_size: int, otherwise: str) -> Iterator[None]:
    """Raise RunFailed with half of the batch size, or what else to try, where the block runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        half = batch_size // 2
        raise RunFailed(f"out of memory; try {f'--batch-size {half}' if half else otherwise}") from error


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective raised this because another process of the group is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo raises nothing of its own


def compiled(network: nn.Module) -> nn.Module:
    """`torch.compile` of the network, whose weights are channels last, and so is what it computes in between.

    By itself torch leaves the layout alone where a convolution is grouped, and then copies: a training step of 64
    images of the true model is 4 to 7 % shorter so on two cores. Remarks that help nobody are silenced: that there is
    no CUDA here, and that diffusers looks up torch's version in a cache.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    torch.compiler.assume_constant_result(liquid_kernel.available)  # a decorator would load the compiler at the import
    return torch.compile(network, options={"force_layout_optimization": True})


def is_compiler_failure(error: RuntimeError) -> bool:
    """Whether torch.compile raised this, for want of a compiler for instance."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
