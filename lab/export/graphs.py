"""The parts of a model as modules that can be exported, and their export by `torch.onnx`.

A true liquid model has its parts, so that a caller can choose the ODE's steps and solver after the export:

    features:  x_t, t, labels -> fine, medium, coarse, conditioning    what the three cells read
    global:    coarse, conditioning -> drive, tau, recurrent              what drives a cell, its tau, and its W_rec
    local:     medium, conditioning, slower (h of global) -> the same
    detail:    fine, conditioning, slower (h of local) -> the same
    step:      h, drive, fraction, recurrent -> h + fraction (f(W_rec * h + drive) - h)    one ODE step of any cell
    head:      x_t, t, fine, h (of detail) -> x_0

Every model has `denoiser`: x_t, t, labels -> x_0, with the ODE steps and the solver of its training. `labels` are there
for a model with classes. x_0 is what the scheduler makes of the network's output, not clipped.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from choices import STEP_SOLVERS
from diffusion.scheduler import DDPMScheduler, Denoiser, carries_state
from kernels.native import plain_torch
from liquid_diffusion import STEP_FRACTION, RealLiquidCell, TrueLiquidDiffusionModel, beside

OPSET = 18


class Features(nn.Module):
    """What the three cells read, at their resolutions, and the embedding of time and class."""

    input_scale: Tensor

    def __init__(self, model: TrueLiquidDiffusionModel, scheduler: DDPMScheduler):
        super().__init__()
        self.model = model
        self.register_buffer("input_scale", scheduler.input_scale.float())

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        fine = self.model.stem(self.input_scale[t].view(-1, 1, 1, 1) * x_t)
        return fine, *self.model.processor.scales(fine), self.model.embedding(t, labels)


class Drive(nn.Module):
    """What drives a cell, its tau, and the weight of its recurrence: all that integrating its equation needs."""

    def __init__(self, cell: RealLiquidCell):
        super().__init__()
        self.cell = cell

    def forward(self, features: Tensor, embedding: Tensor, slower: Tensor | None = None) -> tuple[Tensor, ...]:
        x = features if slower is None else beside(features, slower)
        return *self.cell.drive_and_tau(x, embedding), self.cell.recurrent.weight.clone()


class Step(nn.Module):
    """One ODE step by the fraction g(dt / tau); it is the same for all cells, which differ in `recurrent`."""

    def __init__(self, cell: RealLiquidCell):
        super().__init__()
        self.activation = cell.activation

    def forward(self, h: Tensor, drive: Tensor, fraction: Tensor, recurrent: Tensor) -> Tensor:
        # not torch.lerp, which ONNX spells out in six operations
        return h + fraction * (self.activation(F.conv2d(h, recurrent, padding=1) + drive) - h)


class Prediction(nn.Module):
    """x_0 from a network's output at x_t, as `DDPMScheduler.predict` has it: linear in both."""

    of_image: Tensor
    of_output: Tensor

    def __init__(self, scheduler: DDPMScheduler):
        super().__init__()
        determinant = scheduler.alpha * scheduler.q - scheduler.sigma * scheduler.p
        self.register_buffer("of_image", (scheduler.q / determinant).float())
        self.register_buffer("of_output", (-scheduler.sigma / determinant).float())

    def forward(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return self.of_image[t].view(-1, 1, 1, 1) * x_t + self.of_output[t].view(-1, 1, 1, 1) * output


class Head(nn.Module):
    """x_0 from the detail cell's state."""

    def __init__(self, model: TrueLiquidDiffusionModel, scheduler: DDPMScheduler):
        super().__init__()
        self.head = model.head
        self.prediction = Prediction(scheduler)

    def forward(self, x_t: Tensor, t: Tensor, fine: Tensor, h: Tensor) -> Tensor:
        return self.prediction(x_t, t, self.head(fine + h))


class WholeLiquid(nn.Module):
    """The parts of a liquid model put together, with the ODE steps and the solver of its training."""

    def __init__(self, model: TrueLiquidDiffusionModel, scheduler: DDPMScheduler):
        super().__init__()
        self.cells = model.processor.cells  # a plain dict: the modules below hold their weights
        self.features = Features(model, scheduler)
        self.drives = nn.ModuleList(Drive(cell) for cell in self.cells.values())
        self.step = Step(model.processor.detail_cell)
        self.head = Head(model, scheduler)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        fine, medium, coarse, embedding = self.features(x_t, t, labels)
        h = None
        for cell, part, features in zip(self.cells.values(), self.drives, (coarse, medium, fine), strict=True):
            drive, tau, recurrent = part(features, embedding, h)
            fraction = STEP_FRACTION[cell.solver](cell.horizon / cell.num_steps / tau)
            h = fraction * cell.activation(drive)  # the first step from zeros needs no convolution
            for _ in range(cell.num_steps - 1):
                h = self.step(h, drive, fraction, recurrent)
        return self.head(x_t, t, fine, h)


class Whole(nn.Module):
    """Any other network and what the scheduler makes of its output."""

    input_scale: Tensor

    def __init__(self, model: Denoiser, scheduler: DDPMScheduler):
        super().__init__()
        self.model = model
        self.register_buffer("input_scale", scheduler.input_scale.float())
        self.prediction = Prediction(scheduler)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        output = self.model(self.input_scale[t].view(-1, 1, 1, 1) * x_t, t, labels=labels)
        return self.prediction(x_t, t, output)


def has_parts(model: Denoiser) -> TypeGuard[TrueLiquidDiffusionModel]:
    """Whether it is a liquid model whose cells follow the equation that `Step` steps through; some ablations do not."""
    return type(model) is TrueLiquidDiffusionModel


def check_exportable(model: Denoiser) -> None:
    """Raise ValueError for a model that carries its state, and for a solver that needs torchdiffeq."""
    if carries_state(model):
        raise ValueError("a model that carries its state from call to call cannot be exported")
    if isinstance(model, TrueLiquidDiffusionModel) and model.processor.detail_cell.solver not in STEP_SOLVERS:
        raise ValueError(f"the solver must be one of {', '.join(STEP_SOLVERS)} to be exported")


@torch.no_grad()
def graphs(model: Denoiser, scheduler: DDPMScheduler, shape: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Yields (name, ONNX graph as an `onnx.ModelProto`) for each part of the model, on images of shape (C, H, W).

    The first dimension of every input but `recurrent` is free, and all dimensions of `step`.
    """
    model = model.cpu().eval().to(memory_format=torch.contiguous_format)
    x_t, t = torch.zeros(2, *shape), torch.tensor([0, 1])  # no two inputs may be one tensor, nor a dimension be 1
    inputs = {"x_t": x_t, "t": t, **({"labels": torch.tensor([0, 1])} if model.num_classes else {})}
    if not has_parts(model):
        yield "denoiser", exported(Whole(model, scheduler), inputs, ["x_0"])
        return
    yield "denoiser", exported(WholeLiquid(model, scheduler), inputs, ["x_0"])
    names = ["fine", "medium", "coarse", "conditioning"]
    features = Features(model, scheduler)
    yield "features", exported(features, inputs, names)
    fine, medium, coarse, conditioning = features(*inputs.values())
    slower: dict[str, Tensor] = {}
    for (name, cell), scale in zip(model.processor.cells.items(), (coarse, medium, fine), strict=True):
        inputs = {"features": scale, "conditioning": conditioning, **slower}
        yield name, exported(Drive(cell), inputs, ["drive", "tau", "recurrent"])
        slower = {"slower": torch.zeros(2, cell.recurrent.weight.shape[0], *scale.shape[2:])}
    h = slower["slower"]
    step = {"h": h, "drive": h.clone(), "fraction": h.clone(), "recurrent": cell.recurrent.weight.clone()}
    yield "step", exported(Step(cell), step, ["next"], any_shape=True)
    yield "head", exported(Head(model, scheduler), {"x_t": x_t, "t": t, "fine": fine, "h": h}, ["x_0"])


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which the exporter does not tell what it thinks of free dimensions and of weights that are outputs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def exported(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], *, any_shape: bool = False) -> Any:
    """The module as an `onnx.ModelProto` without anything of the Python files that it came from."""
    import onnx

    def free(name: str, value: Tensor) -> dict[int, object]:
        if not any_shape:
            return {0: torch.export.Dim("batch")}
        axes = ("channels", "channels") if name == "recurrent" else ("batch", "channels", "height", "width")
        return {i: torch.export.Dim(axis) for i, axis in enumerate(axes)}

    with plain_torch(), quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            opset_version=OPSET,
            dynamic_shapes=tuple(free(name, value) for name, value in inputs.items()),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    graph.producer_name, graph.producer_version, graph.doc_string = "liquid-diffusion", "", ""
    for node in graph.graph.node:  # where each operation stood in the exporting machine's files
        node.doc_string = ""
        del node.metadata_props[:]
    del graph.graph.metadata_props[:]
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info, *graph.graph.initializer):
        del value.metadata_props[:]
    onnx.checker.check_model(graph, full_check=True)
    return graph
