"""Our C++ kernels against torch on a CPU in fp32: the liquid cells, their inputs, and the plain 3x3 convolutions.

    found = cells(side=32, batches=(8, 64), seconds=0.1, compile=True)  # each cell of the default true model
    errors = largest_errors(side=32)                                    # of its output and its gradients
    found = layers(["inspired"], side=32, batch_size=64, seconds=0.1)   # what else our kernels compute in a model

Every time is the median over rounds, in seconds per call, of the passes PASSES. In "forward" no gradient is wanted;
"training" is a forward and a backward pass. All tensors have the memory layout that they have in a model.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from choices import ARMS
from kernels import liquid_kernel
from kernels.compilation import compiled
from kernels.convolution import pays
from kernels.native import plain_torch
from lab.benchmark.convolutions import Convolution, convolutions, passes
from lab.speed import in_turn
from liquid_diffusion import STEP_FRACTION, InputConv, RealLiquidCell, TrueLiquidDiffusionModel
from models import build_model

CPU = torch.device("cpu")
PASSES = ("forward", "training")
SAME_SIZE = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)  # a convolution's stride, padding, dilation, ..., groups

Calls = Mapping[str, Callable[[], object]]  # by the pass


class Steps(nn.Module):
    """The steps of a cell by torch, from zeros: forward(features (B, 2C, H, W), offset (B, 2C)) -> state."""

    def __init__(self, cell: RealLiquidCell):
        super().__init__()
        self.cell = cell

    def forward(self, features: Tensor, offset: Tensor) -> Tensor:
        cell = self.cell
        drive, tau = cell._drive_and_tau(features, offset)
        fraction = STEP_FRACTION[cell.solver](cell.horizon / cell.num_steps / tau)
        state = fraction * F.silu(drive)
        for _ in range(cell.num_steps - 1):  # the cell's own layer would be our convolution
            f = F.silu(F.conv2d(state, cell.recurrent.weight, padding=1) + drive)
            state = torch.lerp(state, f, fraction)
        return state


class KernelSteps(Steps):
    """The same steps by our kernel."""

    def forward(self, features: Tensor, offset: Tensor) -> Tensor:
        cell = self.cell
        weight, dt, tau_range = cell.recurrent.weight, cell.horizon / cell.num_steps, (cell.tau_min, cell.tau_max)
        return liquid_kernel.integrate(None, features, offset, weight, cell.num_steps, cell.solver, dt, tau_range)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """A block in which torch and our kernels use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def true_model() -> TrueLiquidDiffusionModel:
    """The default model, untrained and always the same, with its weights channels last as in training."""
    torch.manual_seed(0)
    return TrueLiquidDiffusionModel().to(memory_format=torch.channels_last)


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Random tensors; those of four dimensions are channels last."""
    tensors = [torch.randn(shape) for shape in shapes]
    return [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in tensors]


def input_shapes(model: TrueLiquidDiffusionModel, side: int) -> dict[str, tuple[int, int, int]]:
    """The shape (C, H, W) of what each cell reads when the model sees images of that side."""
    shapes, cells = {}, model.processor.cells

    def keep(cell: nn.Module, inputs: tuple) -> None:
        shapes[cell] = tuple(inputs[0].shape[1:])

    hooks = [cell.register_forward_pre_hook(keep) for cell in cells.values()]
    with torch.no_grad():
        model(torch.zeros(1, model.stem.in_channels, side, side), torch.zeros(1, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return {name: shapes[cell] for name, cell in cells.items()}


def both_passes(
    function: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor], gradient: Tensor
) -> dict[str, Callable[[], Any]]:
    """function(*inputs), and the gradients of all inputs and weights; `gradient` is that of its result."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    return {
        "forward": forward,
        "training": lambda: torch.autograd.grad(function(*leaves), [*leaves, *weights], gradient),
    }


def convolution_passes(c: Convolution, times: int = 1) -> dict[str, Calls]:
    """{"torch", "ours"}: a convolution as often as `times`, on the same random values."""
    torch_passes = passes(c, CPU, "fp32", "channels_last")
    x, weight, gradient = randoms(c.input, c.weight, c.output)
    bias = torch.zeros(c.weight[0]) if c.bias else None

    def backward() -> None:
        torch.ops.liquid.convolution_backward(gradient, x, weight, c.input_gradient)
        if c.bias:
            gradient.sum((0, 2, 3))

    our_passes = {"forward": lambda: torch.ops.liquid.convolution(x, weight, bias), "backward": backward}

    def repeated(parts: Calls, *names: str) -> Callable[[], None]:
        def call() -> None:
            for name in names:
                for _ in range(times):
                    parts[name]()

        return call

    return {
        name: {"forward": repeated(parts, "forward"), "training": repeated(parts, "forward", "backward")}
        for name, parts in (("torch", torch_passes), ("ours", our_passes))
    }


def timed(calls: dict[str, Calls], seconds: float) -> dict[str, dict[str, float]]:
    """{pass: {name: the median}} of calls {name: {pass: call}}, all in turn."""
    flat = {(part, name): call for name, parts in calls.items() for part, call in parts.items()}
    medians = {key: statistics.median(rounds) for key, rounds in in_turn(flat, CPU, seconds).items()}
    return {part: {name: medians[part, name] for name in calls} for part in PASSES}


def cells(side: int, batches: Sequence[int], seconds: float, compile: bool) -> list[dict]:
    """Each cell's steps and the convolutions among them, for each batch size, with one thread and with all.

    seconds: the length of a timing round of one call. compile: also time the compiled steps.
    """
    model, rows = true_model(), []
    shapes = input_shapes(model, side)
    for name, cell in reversed(model.processor.cells.items()):
        for batch in batches:
            for number in sorted({1, torch.get_num_threads()}):
                with threads(number):
                    about = {"cell": name, "side": shapes[name][1], "steps": cell.num_steps}
                    about |= {"channels": cell.recurrent.out_channels, "batch_size": batch, "threads": number}
                    calls = cell_calls(model, name, shapes[name], batch, compile)
                    rows.append(about | timed(calls, seconds))
    return rows


def cell_calls(
    model: TrueLiquidDiffusionModel, name: str, shape: tuple[int, int, int], batch: int, compile: bool
) -> dict[str, Calls]:
    """What `cells` times of one cell, which reads features of this shape."""
    cell = model.processor.cells[name]
    weight, sides = cell.recurrent.weight, shape[1:]
    features, offset, gradient = randoms(
        (batch, 2 * len(weight), *sides), (batch, 2 * len(weight)), (batch, len(weight), *sides)
    )
    functions: dict[str, Callable[..., Tensor]] = {"torch": Steps(cell), "ours": KernelSteps(cell)}
    if compile:
        torch._dynamo.reset()  # compile every size by itself
        functions["compiled"] = compiled(Steps(cell))
    calls = {who: both_passes(steps, [features, offset], [weight], gradient) for who, steps in functions.items()}
    same = {"bias": False, "options": SAME_SIZE, "input_gradient": True}
    recurrent = Convolution(tuple(gradient.shape), tuple(weight.shape), tuple(gradient.shape), **same)
    alone = convolution_passes(recurrent, cell.num_steps - 1)  # the first step from zeros has none
    return calls | {f"convolutions, {who}": parts for who, parts in alone.items()}


def largest_errors(side: int, batch: int = 8) -> dict[str, dict[str, dict[str, float]]]:
    """{cell: {"ours", "torch": {"output", and whose gradient: the largest error}}} against torch in double precision.

    Each is relative to the largest value.
    """
    model, found = true_model(), {}
    for name, shape in input_shapes(model, side).items():
        cell = model.processor.cells[name]
        channels = cell.recurrent.out_channels
        inputs = randoms((batch, 2 * channels, *shape[1:]), (batch, 2 * channels), (batch, channels, *shape[1:]))

        def outcome(steps: Steps, features: Tensor, offset: Tensor, gradient: Tensor) -> dict[str, Tensor]:
            calls = both_passes(steps, [features, offset], [steps.cell.recurrent.weight], gradient)
            names = ("output", "features", "offset", "weight")
            return dict(zip(names, (calls["forward"](), *calls["training"]()), strict=True))

        exact = outcome(Steps(copy.deepcopy(cell).double()), *(x.double() for x in inputs))
        found[name] = {
            who: {
                what: ((value.double() - exact[what]).abs().max() / exact[what].abs().max()).item()
                for what, value in outcome(steps, *inputs).items()
            }
            for who, steps in (("ours", KernelSteps(cell)), ("torch", Steps(cell)))
        }
    return found


def our_convolutions(arm: str, side: int, batch_size: int) -> dict[Convolution, int]:
    """The convolutions of an arm that our kernel computes, and how often a forward pass calls each."""
    counts = convolutions(build_model(ARMS[arm][0], **ARMS[arm][1]), (3, side, side), batch_size)
    return {
        c: count
        for c, count in counts.items()
        if (c.weight[2:], c.options) == ((3, 3), SAME_SIZE)
        and pays(nn.Conv2d(c.weight[1], c.weight[0], 3), torch.empty(c.input))
    }


def layers(arms: Sequence[str], side: int, batch_size: int, seconds: float) -> dict[str, dict]:
    """{arm: {"layers": what our kernels compute of it besides cells' steps, "sum": all calls of a training step}}.

    Of the true model these are the cells' inputs, of the other arms the 3x3 convolutions.
    """
    model, rows = true_model(), []
    for name, shape in reversed(input_shapes(model, side).items()):
        layer: InputConv = model.processor.cells[name].input
        x, gradient = randoms((batch_size, *shape), (batch_size, layer.pointwise.out_channels, *shape[1:]))
        ours = both_passes(layer, [x], list(layer.parameters()), gradient)
        row = {"layer": f"{name} cell's input", "inputs": shape[0], "outputs": gradient.shape[1], "side": shape[1]}
        plain = {part: plain_torch()(call) for part, call in ours.items()}
        rows.append(row | {"calls_a_step": 1} | timed({"torch": plain, "ours": ours}, seconds))
    found = {"true": rows}
    for arm in arms:
        found[arm] = [
            {"layer": "3x3 convolution", "inputs": c.input[1], "outputs": c.output[1], "side": c.input[2]}
            | {"calls_a_step": count}
            | timed(convolution_passes(c), seconds)
            for c, count in our_convolutions(arm, side, batch_size).items()
        ]
    return {arm: {"layers": rows, "sum": sum_over(rows)} for arm, rows in found.items()}


def sum_over(rows: list[dict]) -> dict[str, Any]:
    """{"calls_a_step", pass: {"torch", "ours": seconds}} of all layers together."""
    total: dict[str, Any] = {"calls_a_step": sum(row["calls_a_step"] for row in rows)}
    for part in PASSES:
        total[part] = {who: sum(row["calls_a_step"] * row[part][who] for row in rows) for who in ("torch", "ours")}
    return total
