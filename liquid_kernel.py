"""A liquid cell's ODE steps as one call of compiled C++, on CPUs with a matrix unit for bf16 (Intel AMX, Linux).

    if fits(drive):
        h = integrate(h, drive, share, weight, num_steps)

`RealLiquidCell.integrate` is the same in torch, for every device and precision. Here an image's state stays in the
cache from the first step to the last (liquid_kernel.cpp), where torch writes and reads it several times a step. The
kernel is compiled at its first use, in a second or two, and kept in torch's cache folder.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("liquid_kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
PROCESSOR = {"amx_tile", "amx_bf16", "avx512bw", "avx512dq", "avx512_bf16"}  # what /proc/cpuinfo has to name
MOST_CHANNELS = 32  # that the kernel has room for


def fits(drive: Tensor) -> bool:
    """Whether the kernel can integrate a cell with this drive (B, C, H, W) here."""
    return (
        drive.device.type == "cpu" and drive.dtype == torch.bfloat16 and drive.shape[1] <= MOST_CHANNELS and available()
    )


def available() -> bool:
    """Whether there is a kernel on this machine."""
    return library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None without such a processor, the right to use it, or a compiler ($CXX, else g++)."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    if flags is None or not set(flags.group(1).split()) >= PROCESSOR:
        return None
    try:
        kernel = ctypes.CDLL(str(compiled_file(flags.group(1))))
    except (OSError, subprocess.CalledProcessError):
        return None
    for function in (kernel.liquid_kernel_permitted, kernel.liquid_kernel_forward, kernel.liquid_kernel_backward):
        function.restype = ctypes.c_bool
    return kernel if kernel.liquid_kernel_permitted() else None


def compiled_file(processor: str) -> Path:
    """The shared library of this source for this processor, compiled unless it is in the cache folder.

    Raises OSError or subprocess.CalledProcessError where that fails.
    """
    compiler = os.environ.get("CXX", "g++")
    key = "\n".join([SOURCE.read_text(encoding="utf-8"), compiler, *FLAGS, processor])
    folder = Path(torch.hub.get_dir()).parent / "liquid_kernel"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / path.name
            command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603  # the user's own compiler
            built.replace(path)  # whole or not there, also where several processes compile it
    return path


def integrate(h: Tensor | None, drive: Tensor, share: Tensor, weight: Tensor, num_steps: int) -> Tensor:
    """The state after `num_steps` steps h <- h + share (silu(W_rec * h + drive) - h), from h; None is zeros.

    h, drive, share: (B, C, H, W), bf16. weight: W_rec, (C, C, 3, 3). Products are in bf16, sums in fp32.
    """
    return torch.ops.liquid.integrate(h, drive, share, weight, num_steps)


@torch.library.custom_op("liquid::integrate", mutates_args=(), device_types="cpu")
def _integrate(h: Tensor | None, drive: Tensor, share: Tensor, weight: Tensor, num_steps: int) -> Tensor:
    read, weight, output = [_pixels(x) for x in (h, drive, share)], weight.float().contiguous(), _like(drive)
    _run("forward", *drive.shape, num_steps, *_where_and_stride(read), _where(weight), _where(output))
    return output


@_integrate.register_fake
def _(h, drive, share, weight, num_steps):
    return _like(drive)


@torch.library.custom_op("liquid::integrate_backward", mutates_args=(), device_types="cpu")
def _integrate_backward(
    gradient: Tensor, h: Tensor | None, drive: Tensor, share: Tensor, weight: Tensor, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of h (empty if it is None), drive, share and weight."""
    read, weight = [_pixels(x) for x in (gradient, h, drive, share)], weight.float().contiguous()
    of_h, *others = _gradients(h, drive, share, weight)
    written = [None if h is None else of_h, *others]
    _run("backward", *drive.shape, num_steps, *_where_and_stride(read), _where(weight), *map(_where, written))
    return of_h, *others


@_integrate_backward.register_fake
def _(gradient, h, drive, share, weight, num_steps):
    return _gradients(h, drive, share, weight)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.num_steps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient: Tensor) -> tuple:
    h, drive, share, weight = ctx.saved_tensors
    gradients = torch.ops.liquid.integrate_backward(gradient, h, drive, share, weight, ctx.num_steps)
    of_h, of_drive, of_share, of_weight = gradients
    return None if h is None else of_h.to(h.dtype), of_drive, of_share, of_weight.to(weight.dtype), None


_integrate.register_autograd(_backward, setup_context=_keep)


def _like(x: Tensor) -> Tensor:
    """An empty bf16 tensor of the shape of x, channels last."""
    return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device, memory_format=torch.channels_last)


def _gradients(h: Tensor | None, drive: Tensor, share: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_h = drive.new_empty(0) if h is None else _like(h)
    return of_h, _like(drive), _like(share), torch.empty(weight.shape, device=weight.device)


def _pixels(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x in bf16 and channels last, and how many values there are from pixel to pixel.

    As many as channels, or more where x is a part of the channels of another tensor, which is not copied.
    """
    if x is None:
        return None, 0
    _, channels, height, width = x.shape
    batch, channel, row, pixel = x.stride()
    if x.dtype == torch.bfloat16 and channel == 1 and row == width * pixel and batch == height * row:
        return x, pixel
    return x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last), channels


def _where(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _where_and_stride(pixels: list[tuple[Tensor | None, int]]) -> list[ctypes.c_void_p | ctypes.c_int64]:
    return [argument for x, stride in pixels for argument in (_where(x), ctypes.c_int64(stride))]


def _run(name: str, *arguments: int | ctypes.c_void_p | ctypes.c_int64) -> None:
    """Call a function of the kernel. Raises MemoryError."""
    if not getattr(library(), f"liquid_kernel_{name}")(*arguments):
        raise MemoryError("out of memory in the liquid kernel")
