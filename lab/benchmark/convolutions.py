"""A measure to compare a training step with: its convolutions alone, each a call of torch in its fastest form.

    counts = convolutions(model, (3, 32, 32), batch_size=64)     # each distinct convolution, and how often it is called
    seconds, table = seconds_alone(counts, torch.device("cpu"), seconds=0.1)

Each convolution is timed at its real shape, forward and backward, and counted as often as a training step calls it:
once per step of an ODE. Everything else (activations, normalisation, optimizer, batches) is left out. This is no lower
limit: a kernel that computes all steps of a cell at once, and with fewer products, can take less time.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.native import plain_torch
from lab.speed import in_turn
from runtime.hardware import has_bf16

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Convolution:
    """One call of `aten.convolution`: the shapes, and the arguments from the stride on."""

    input: tuple[int, ...]  # (B, C_in, H, W)
    weight: tuple[int, ...]  # (C_out, C_in / groups, kH, kW)
    output: tuple[int, ...]  # (B, C_out, H', W')
    bias: bool
    options: tuple  # stride, padding, dilation, transposed, output padding, groups
    input_gradient: bool  # False for a convolution of the images themselves

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the forward pass over the batch."""
        return torch.Size(self.output).numel() * torch.Size(self.weight[1:]).numel()

    @property
    def training_multiply_adds(self) -> int:
        """Multiply-adds of the forward pass, the gradient of the weight and, if there is one, that of the input."""
        return (3 if self.input_gradient else 2) * self.multiply_adds

    def training_bytes(self, precision: str) -> int:
        """Bytes read and written if each pass moves each of its tensors once."""
        x, w, y = (torch.Size(shape).numel() for shape in (self.input, self.weight, self.output))
        values = (x + w + y) + (x + y + w) + (y + w + x if self.input_gradient else 0)
        return values * PRECISIONS[precision].itemsize


class _Recorder(TorchDispatchMode):
    """Counts every convolution, whichever module or function calls it."""

    def __init__(self, image: Tensor):
        super().__init__()
        self.image, self.found = image, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, weight, bias, *options = args
            options = tuple(tuple(value) if isinstance(value, list) else value for value in options)
            shapes = tuple(x.shape), tuple(weight.shape), tuple(output.shape)
            self.found[Convolution(*shapes, bias is not None, options, x.data_ptr() != self.image.data_ptr())] += 1
        return output


@torch.no_grad()
def convolutions(model: nn.Module, shape: tuple[int, int, int], batch_size: int) -> Counter[Convolution]:
    """How often one forward pass over images (batch_size, *shape) calls each distinct convolution.

    model: on the CPU. It is called on one image, since a batch changes only the first dimension.
    """
    image = torch.zeros(1, *shape)
    with plain_torch(), _Recorder(image) as recorder:
        model(image, torch.zeros(1, dtype=torch.long))
    return Counter(
        {
            replace(c, input=(batch_size, *c.input[1:]), output=(batch_size, *c.output[1:])): count
            for c, count in recorder.found.items()
        }
    )


def passes(c: Convolution, device: torch.device, precision: str, layout: str) -> dict[str, Callable[[], None]]:
    """{"forward", "backward"}: functions that run these passes of a convolution on random values."""

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device).to(PRECISIONS[precision]).contiguous(memory_format=LAYOUTS[layout])

    x, w, gradient = random(c.input), random(c.weight), random(c.output)
    bias = torch.zeros(c.weight[0], device=device, dtype=x.dtype) if c.bias else None
    mask = [c.input_gradient, True, c.bias]
    sizes = [c.weight[0]] if c.bias else None
    return {
        "forward": lambda: torch.ops.aten.convolution(x, w, bias, *c.options),
        "backward": lambda: torch.ops.aten.convolution_backward(gradient, x, w, sizes, *c.options, mask),
    }


@contextmanager
def any_algorithm() -> Iterator[None]:
    """Allow algorithms in the block that do not give the same bytes each time; torch's fastest form may use them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def seconds_alone(counts: Counter[Convolution], device: torch.device, seconds: float) -> tuple[float, list[dict]]:
    """(seconds that the convolutions of a training step take, a table with each one's time in all forms).

    A form is a precision and a memory layout. As in a model, both passes of a convolution have the same form: that with
    the smallest sum. seconds: the length of a timing round of one pass.
    """
    total, table = 0.0, []
    forms = [f for f in itertools.product(PRECISIONS, LAYOUTS) if f[0] == "fp32" or has_bf16(device)]
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), any_algorithm():
        for c, count in counts.items():
            calls = {(*form, part): call for form in forms for part, call in passes(c, device, *form).items()}
            medians = {name: statistics.median(rounds) for name, rounds in in_turn(calls, device, seconds).items()}
            times = {form: medians[(*form, "forward")] + medians[(*form, "backward")] for form in forms}
            best = min(times, key=lambda form: times[form])
            total += count * times[best]
            table.append(
                {
                    "input": c.input,
                    "weight": c.weight,
                    "groups": c.options[-1],
                    "input_gradient": c.input_gradient,
                    "calls_a_step": count,
                    "best": " ".join(best),
                    "seconds": {" ".join(name): value for name, value in medians.items()},
                }
            )
    return total, table


def matrix_rate(device: torch.device, precision: str, seconds: float) -> float:
    """Multiply-adds per second of a large square matrix product, the fastest thing that the machine computes."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=PRECISIONS[precision]) for _ in range(2))
    return side**3 / _median_seconds(lambda: torch.mm(a, b), device, seconds)


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes read and written per second by a copy that is too large for any cache."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device, seconds)


def _median_seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    return statistics.median(in_turn({"": work}, device, seconds)[""])
