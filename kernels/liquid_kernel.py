"""A liquid cell's ODE steps as one call of compiled C++, on CPUs with a matrix unit for bf16 (Intel AMX, Linux).

    if fits(features):
        h = integrate(h, features, offset, weight, num_steps, "euler", dt, tau_range)

`RealLiquidCell` does the same in torch, for every device and precision. Here an image's state stays in the cache from
the first step to the last (liquid_kernel.cpp), while torch writes and reads it several times per step. The kernel is
compiled at its first use, in a second or two, and kept in torch's cache folder.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.hardware import cpu_flags

SOURCE = Path(__file__).with_name("liquid_kernel.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
PROCESSOR = {"amx_tile", "amx_bf16", "avx512bw", "avx512dq", "avx512_bf16"}  # the instruction sets that it needs
MOST_CHANNELS = 32  # the kernel has room for no more
SOLVERS = ("euler", "semi-implicit", "exponential")  # in the order of the kernel's schemes
TENSORS = "Tensor? h, Tensor features, Tensor offset, Tensor weight"  # the arguments of both operators
CELL = "int num_steps, str solver, float dt, float tau_min, float tau_max"


def fits(features: Tensor) -> bool:
    """Whether the kernel can integrate a cell with these features (B, 2C, H, W) here."""
    possible = features.device.type == "cpu" and features.dtype == torch.bfloat16
    return possible and features.shape[1] <= 2 * MOST_CHANNELS and available()


def available() -> bool:
    """Whether there is a kernel on this machine."""
    return library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None without such a processor, the permission to use it, or a compiler ($CXX, else g++)."""
    if not cpu_flags() >= PROCESSOR:
        return None
    try:
        kernel = ctypes.CDLL(str(compiled_file(" ".join(sorted(cpu_flags())))))
    except (OSError, subprocess.CalledProcessError):
        return None
    for function in (kernel.liquid_kernel_permitted, kernel.liquid_kernel_forward, kernel.liquid_kernel_backward):
        function.restype = ctypes.c_bool
    return kernel if kernel.liquid_kernel_permitted() else None


def compiled_file(processor: str) -> Path:
    """The shared library of this source, compiled for this processor unless it is in the cache folder already.

    processor: the names of its instruction sets. Raises OSError or subprocess.CalledProcessError if compiling fails.
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
            built.replace(path)  # whole or not at all, even if several processes compile it
    return path


def integrate(
    h: Tensor | None,
    features: Tensor,
    offset: Tensor,
    weight: Tensor,
    num_steps: int,
    solver: str,
    dt: float,
    tau_range: tuple[float, float],
) -> Tensor:
    """The state after `num_steps` steps h <- h + g(dt / tau) (silu(W_rec * h + drive) - h) from h; None means zeros.

    g belongs to the solver (liquid_diffusion.STEP_FRACTION). h (B, C, H, W) and the result are bf16. features
    (B, 2C, H, W), bf16, plus offset (B, 2C), bf16, give the drive and the logit of
    tau = tau_min + (tau_max - tau_min) sigmoid(logit). weight is W_rec, (C, C, 3, 3). Products are computed in bf16,
    sums in fp32.
    """
    return torch.ops.liquid.integrate(h, features, offset, weight, num_steps, solver, dt, *tau_range)


@torch.library.custom_op(
    "liquid::integrate", mutates_args=(), device_types="cpu", schema=f"({TENSORS}, {CELL}) -> Tensor"
)
def _integrate(h, features, offset, weight, *cell):
    output = _like(features, halved=True)
    _run("forward", output.shape, cell, [*_read(h, features, offset, weight), output])
    return output


@_integrate.register_fake
def _(h, features, *_):
    return _like(features, halved=True)


@torch.library.custom_op(
    "liquid::integrate_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor gradient, {TENSORS}, {CELL}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _integrate_backward(gradient, h, features, offset, weight, *cell):
    """The gradients of h (empty if h is None), features, offset and weight."""
    of_h, *others = gradients = _gradients(h, features, offset, weight)
    read = [_pixels(gradient), *_read(h, features, offset, weight)]
    _run("backward", gradient.shape, cell, [*read, None if h is None else of_h, *others])
    return gradients


@_integrate_backward.register_fake
def _(gradient, h, features, offset, weight, *_):
    return _gradients(h, features, offset, weight)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    tensors, ctx.cell = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    gradients = torch.ops.liquid.integrate_backward(gradient, *tensors, *ctx.cell)
    of_tensors = [None if x is None else g.to(x.dtype) for x, g in zip(tensors, gradients, strict=True)]
    return *of_tensors, *(None for _ in ctx.cell)


_integrate.register_autograd(_backward, setup_context=_keep)


def _like(x: Tensor, *, halved: bool = False) -> Tensor:
    """An empty bf16 tensor with the shape of x, or with half of its channels; channels last."""
    batch, channels, *sides = x.shape
    shape = (batch, channels // 2 if halved else channels, *sides)
    return torch.empty(shape, dtype=torch.bfloat16, device=x.device, memory_format=torch.channels_last)


def _gradients(
    h: Tensor | None, features: Tensor, offset: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_h = features.new_empty(0) if h is None else _like(h)
    of_offset = torch.empty(offset.shape, dtype=torch.bfloat16, device=offset.device)
    return of_h, _like(features), of_offset, torch.empty(weight.shape, device=weight.device)


def _read(h: Tensor | None, features: Tensor, offset: Tensor, weight: Tensor) -> list[Tensor | None]:
    """The four tensors in the formats that the kernel reads."""
    offset, weight = offset.to(torch.bfloat16).contiguous(), weight.float().contiguous()
    return [None if h is None else _pixels(h), _pixels(features), offset, weight]


def _pixels(x: Tensor) -> Tensor:
    """x in bf16 and channels last; not a copy if it is so already."""
    return x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def _run(name: str, shape: torch.Size, cell: tuple, tensors: list[Tensor | None]) -> None:
    """Call a function of the kernel. cell: steps, solver, dt, tau_min, tau_max. Raises MemoryError."""
    num_steps, solver, *others = cell
    numbers = [*shape, num_steps, SOLVERS.index(solver), *map(ctypes.c_float, others)]
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    if not getattr(library(), f"liquid_kernel_{name}")(*numbers, *pointers):
        raise MemoryError("out of memory in the liquid kernel")
