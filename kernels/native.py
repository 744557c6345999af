"""Our C++ sources as libraries: compiled for this machine's processor at their first use, and called with tensors.

    if ready(FP32, x):
        call(FP32, "convolution", *numbers, x, weight, None, result)

A library is compiled in some seconds and kept in torch's cache folder. Where that fails, and inside `plain_torch()`,
nothing is ready, and torch computes everything.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.hardware import cpu_flags

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC")
FLAGS += ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")  # NaN and infinity stay what they are


@dataclass(frozen=True)
class Library:
    """Sources beside this file that become one library."""

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()  # instruction sets of the processor
    flags: tuple[str, ...] = FLAGS


FP32 = Library("fp32", ("products.cpp", "cell.cpp", "convolution.cpp", "input.cpp"), ("vectors.h", "winograd.h"))
AMX = Library(
    "amx", ("amx_cell.cpp",), needs=frozenset({"amx_tile", "amx_bf16", "avx512bw", "avx512dq", "avx512_bf16"})
)

OPERATORS = torch.library.Library("liquid", "DEF")

# what a command says where FP32 is not available
NOT_COMPILED = "without C++ kernels, at half the speed: no C++ compiler (g++) works here"

_by_torch = False


@contextmanager
def plain_torch() -> Iterator[None]:
    """A block in which torch computes what our libraries would: to count, to export or to compare."""
    global _by_torch
    before, _by_torch = _by_torch, True
    try:
        yield
    finally:
        _by_torch = before


def ready(library: Library, x: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the library may compute with this tensor, of this dtype, here and now."""
    possible = x.device.type == "cpu" and x.dtype == dtype and not _by_torch
    return possible and not torch.compiler.is_exporting() and available(library)


def available(library: Library) -> bool:
    """Whether the library works on this machine."""
    return loaded(library) is not None


@cache
def loaded(library: Library) -> ctypes.CDLL | None:
    """The compiled library; None without such a processor, the permission to use it, or a compiler ($CXX, else g++)."""
    if not cpu_flags() >= library.needs:
        return None
    try:
        found = ctypes.CDLL(str(compiled_file(library, " ".join(sorted(cpu_flags())))))
    except (OSError, subprocess.CalledProcessError):
        return None
    return found if library is not AMX or found.amx_permitted() else None


@cache
def lanes() -> int:
    """How many floats a vector of the library FP32 has; it stores pixels in whole vectors."""
    return loaded(FP32).vector_lanes()  # pyright: ignore[reportOptionalMemberAccess]


def compiled_file(library: Library, processor: str) -> Path:
    """The library's file, compiled for this processor unless it is in the cache folder already.

    processor: the names of its instruction sets. Raises OSError or subprocess.CalledProcessError if compiling fails.
    """
    here = Path(__file__).parent
    compiler = os.environ.get("CXX", "g++")
    texts = [(here / name).read_text(encoding="utf-8") for name in (*library.sources, *library.headers)]
    key = "\n".join([*texts, compiler, *library.flags, processor])
    folder = Path(torch.hub.get_dir()).parent / "liquid_kernel"
    path = folder / f"{library.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        if shutil.which(compiler.split()[0]) is None:
            raise FileNotFoundError(compiler)
        print("compiling the C++ kernels for this processor, once", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [*compiler.split(), *library.flags]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            objects = {str(Path(temporary) / f"{name}.o"): str(here / name) for name in library.sources}
            with ThreadPoolExecutor() as threads:  # the sources beside each other
                list(threads.map(lambda pair: _run([*command, "-c", pair[1], "-o", pair[0]]), objects.items()))
            built = Path(temporary) / path.name
            _run([*command, "-shared", *objects, "-o", str(built)])
            built.replace(path)  # whole or not at all, even if several processes compile it
    return path


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603  # the user's own compiler


def call(library: Library, function: str, *arguments: int | float | Tensor | Sequence[Tensor | None] | None) -> None:
    """Call a function of the library. A tensor becomes its address, a list of tensors the address of their addresses.

    The first argument of each function, the number of threads, is torch's and left out here. Raises MemoryError.
    """
    called = getattr(loaded(library), function)
    called.restype = ctypes.c_bool
    if not called(torch.get_num_threads(), *map(_argument, arguments)):
        raise MemoryError(f"out of memory in {function} of our C++ library")


def _argument(value: int | float | Tensor | Sequence[Tensor | None] | None):
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, list):
        return (ctypes.c_void_p * len(value))(*(None if x is None else x.data_ptr() for x in value))
    return ctypes.c_float(value) if isinstance(value, float) else value


class Operator:
    """A function of CPU tensors as an operator of torch, torch.ops.liquid.NAME, which torch.compile leaves whole.

    schema: "NAME(Tensor x, ...) -> Tensor". fake: returns results of the same shapes and formats, with nothing in them.
    Outside of torch.compile the function is called directly, which saves a cell's two passes 0.2 to 0.3 ms. Unlike
    `torch.library.custom_op` this does not import the compiler, which takes seconds.
    """

    def __init__(self, schema: str, fake: Callable, function: Callable):
        self.name, self.function = schema.split("(")[0], function
        self.gradient: type[torch.autograd.Function] | None = None
        OPERATORS.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        OPERATORS.impl(self.name, function, "CPU")
        torch.library.register_fake(f"liquid::{self.name}", fake, lib=OPERATORS)

    def differentiate(self, keep: Callable, backward: Callable) -> None:
        """Give it a gradient: keep(ctx, inputs, output) and backward(ctx, *gradients), as torch.library has them."""
        torch.library.register_autograd(f"liquid::{self.name}", backward, setup_context=keep, lib=OPERATORS)
        parts = {"forward": self.function, "setup_context": keep, "backward": backward}
        members = {name: staticmethod(part) for name, part in parts.items()}
        self.gradient = type(self.name, (torch.autograd.Function,), members)

    def __call__(self, *arguments):
        if torch.compiler.is_compiling():
            return getattr(torch.ops.liquid, self.name)(*arguments)
        if self.gradient is None or not torch.is_grad_enabled():
            return self.function(*arguments)
        return self.gradient.apply(*arguments)


def operator(schema: str, fake: Callable) -> Callable[[Callable], Operator]:
    """A decorator that makes a function an `Operator`."""
    return lambda function: Operator(schema, fake, function)


def pixels(x: Tensor) -> Tensor:
    """x (B, C, H, W) with the channels of a pixel beside each other in memory; not a copy if they are already."""
    return x.contiguous(memory_format=torch.channels_last)


def laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of `like` in its memory format and dtype, as processes that share gradients want it."""
    if (gradient.stride(), gradient.dtype) == (like.stride(), like.dtype):
        return gradient
    return torch.empty_like(like).copy_(gradient)


def empty_pixels(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """An empty tensor (B, C, H, W) in that format, of the dtype and on the device of `like`."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
