"""Quality against ODE work: the same weights, with the ODE solved by other solvers and steps than in training.

    points = ode_work(model, scheduler, bank)
    save_ode_work(points, path)

How much a liquid model computes can be chosen after training; this measures what the choice costs in quality.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from choices import SOLVERS
from diffusion.scheduler import DDPMScheduler
from images.batches import Batch
from kernels.native import plain_torch
from liquid_diffusion import TrueLiquidDiffusionModel, scaled_steps
from runtime.files import save_figure
from training.validation import held_out_loss

MULTIPLES = (0.5, 1, 2, 4)  # of the trained numbers of steps, rounded up to whole steps
ADAPTIVE = "dopri5"  # chooses its own steps


def with_ode(model: nn.Module, name: str) -> TrueLiquidDiffusionModel:
    """The model itself. Raises ValueError, with its name, if it has no ODE that could be solved differently.

    Raises ImportError if torchdiffeq, which has some of the solvers, is not installed.
    """
    if not isinstance(model, TrueLiquidDiffusionModel):
        raise ValueError(f"only a true liquid model has an ODE, and this model is {name}")
    own = model.processor.detail_cell.solver
    model.set_solver(ADAPTIVE)
    model.set_solver(own)
    return model


def ways(steps: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Every solver with every multiple of the trained steps; the adaptive one, which chooses its own, only once."""
    return [
        (solver, scaled_steps(steps, multiple))
        for solver in SOLVERS
        for multiple in ((1,) if solver == ADAPTIVE else MULTIPLES)
    ]


def ode_work(
    model: TrueLiquidDiffusionModel,
    scheduler: DDPMScheduler,
    bank: Batch,
    on_images: Callable[[int], object] = lambda count: None,
) -> list[dict]:
    """For every solver and multiple of the steps: multiply-adds per image, and the held-out eps-MSE.

    Multiply-adds are counted while the bank is measured, since those of an adaptive solver depend on the images. For a
    model that carries its state they include the calls on the noisier images. on_images(count) is called with the
    number of images measured since its last call. At the end the model has its own solver and steps again.
    """
    cells = list(model.processor.cells.values())
    solver, steps = cells[0].solver, [cell.num_steps for cell in cells]
    points = []
    try:
        for name, chosen in ways(steps):
            model.set_solver(name, chosen)
            with plain_torch(), FlopCounterMode(display=False) as counter:
                loss = held_out_loss(model, scheduler, bank)
            points.append(
                {
                    "solver": name,
                    "ode_steps": None if name == ADAPTIVE else chosen,
                    "as_trained": (name, chosen) == (solver, steps),
                    "multiply_adds": counter.get_total_flops() // 2 // len(bank.t),
                    "value": loss,
                }
            )
            on_images(len(bank.t))
    finally:
        model.set_solver(solver, steps)
    return points


def num_points() -> int:
    """How many times `ode_work` measures the bank."""
    return len(ways((1, 1, 1)))


def save_ode_work(points: Sequence[dict], path: Path) -> None:
    """Plot held-out eps-MSE against multiply-adds as PNG, one line per solver; the trained setting is marked."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for solver in dict.fromkeys(point["solver"] for point in points):
        line = [(p["multiply_adds"] / 1e6, p["value"]) for p in points if p["solver"] == solver]
        axes.plot(*zip(*line, strict=True), "o-", label=solver, linewidth=1, markersize=4)
    trained = next((p for p in points if p["as_trained"]), None)
    if trained is not None:
        own = trained["value"]
        axes.plot(trained["multiply_adds"] / 1e6, own, "*", color="black", markersize=12, label="as trained")
        axes.axhspan(0.99 * own, 1.01 * own, color="black", alpha=0.1, label="within 1 %", linewidth=0)
        axes.set_ylim(0.97 * own, 1.3 * own)  # much larger losses are outside the plot
    axes.set(xlabel="multiply-adds per network call, millions", ylabel="held-out eps-MSE", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save_figure(path, figure, dpi=120)
