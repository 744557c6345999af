"""The machine: its device, its memory, and the arithmetic that its processor has."""

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from runtime.errors import RunFailed, UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
CONTROL_GROUP = Path("/sys/fs/cgroup")
SAFE_SHARE = 0.9  # of the free memory, which Linux only estimates
LARGEST_KEPT = 32 * 2**20  # bytes; the largest value that glibc accepts


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU. Raises UserError if the machine lacks it."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise UserError(f"--device: {name} is not available on this machine; use --device auto")
    return torch.device(name)


@cache
def cpu_info() -> dict[str, str]:
    """The first processor's entries in Linux's /proc/cpuinfo, such as `model name` and `flags`; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    return dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.MULTILINE))


def cpu_flags() -> set[str]:
    """The instruction sets of the processor, as Linux names them; empty where that is not known."""
    return set(cpu_info().get("flags", "").split())


def machine_name(device: torch.device) -> str:
    """The processor and how much of it is used: `AMD EPYC 9R14, 2 threads`, or `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # platform.processor() is empty or "x86_64" on Linux
    name = cpu_info().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" + (f", {device.type}" if device.type != "cpu" else "")


def has_bf16(device: torch.device) -> bool:
    """Whether the processor itself multiplies in bf16 and does not emulate it: AVX-512 BF16 or AMX, Ampere or later."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of giving it back: fresh pages cost more than most layers do.

    A training step of 64 images is 12 % shorter on two cores. Only glibc has the call; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_memory() -> int | None:
    """How many bytes this process may still take before Linux ends it or another; None where that is not known."""
    try:
        known = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
        free = 1024 * (int(known["MemAvailable"]) + int(known.get("SwapFree", 0)))
    except (OSError, KeyError):
        return None
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # in a container; without a limit the file says "max"
            free = min(free, int((CONTROL_GROUP / limit).read_text()) - int((CONTROL_GROUP / used).read_text()))
    return max(0, free)


def stay_within_memory(device: torch.device, processes: int = 1) -> None:
    """Let allocations fail, in one line, that Linux would grant and then end the process for, if it runs on a CPU.

    processes: how many share the memory that is free now.
    """
    free = free_memory()
    if free is None or device.type != "cpu":
        return
    with contextlib.suppress(ImportError, OSError, ValueError, TypeError):
        import resource

        allowed, most = _first_limit()
        taken = re.search(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        limit = 1024 * int(taken[1]) + int(SAFE_SHARE * free) // processes  # pyright: ignore[reportOptionalSubscript]
        if allowed != resource.RLIM_INFINITY:
            limit = min(limit, allowed)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


@cache
def _first_limit() -> tuple[int, int]:
    """The limit of this process's data before `stay_within_memory` set one."""
    import resource

    return resource.getrlimit(resource.RLIMIT_DATA)


def make_reproducible(device: torch.device) -> None:
    """Make the same seed give the same bytes. On CUDA that excludes some kernels."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # our kernels write everything that is read
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or NumPy raised this for want of memory, on a CPU or on a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


@contextmanager
def out_of_memory_named(batch_size: int, otherwise: str) -> Iterator[None]:
    """If the block runs out of memory, raise RunFailed that suggests half of the batch size, or what else to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        half = batch_size // 2
        raise RunFailed(f"out of memory; try {f'--batch-size {half}' if half else otherwise}") from error
