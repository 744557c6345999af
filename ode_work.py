"""Quality against ODE work: the same weights, their ODE solved with other solvers and steps than in training.

    points = ode_work(model, scheduler, bank)
    save_ode_work(points, path)

The computation of a liquid model can be chosen after training; how well it takes that is measured here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import atomic_path
from diffusion import DDPMScheduler
from errors import UserError
from image_data import Batch
from liquid_diffusion import ODEINT_SOLVERS, STEP_SHARE, TrueLiquidDiffusionModel, scaled_steps
from validation import held_out_loss

SHARES = (0.5, 1, 2, 4)  # of the trained numbers of steps; a share of a step is rounded up
ADAPTIVE = "dopri5"  # chooses its own steps


def require_ode(model: nn.Module, name: str) -> None:
    """Raises UserError, with the model's name, if it has no ODE that could be solved otherwise."""
    if not isinstance(model, TrueLiquidDiffusionModel):
        raise UserError(f"--ode-work: only a true liquid model has an ODE, this one is {name}")
    own = next(iter(model.processor.cells.values())).solver
    model.set_solver(ADAPTIVE)
    model.set_solver(own)


def ways(steps: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Every solver with each share of the trained steps; one that chooses its own steps stands once."""
    return [
        (solver, scaled_steps(steps, share))
        for solver in (*STEP_SHARE, *ODEINT_SOLVERS)
        for share in ((1,) if solver == ADAPTIVE else SHARES)
    ]


def ode_work(
    model: TrueLiquidDiffusionModel,
    scheduler: DDPMScheduler,
    bank: Batch,
    on_images: Callable[[int], object] = lambda count: None,
) -> list[dict]:
    """For every solver and share of the steps: what the network calls cost, and the held-out eps-MSE.

    Multiply-adds are counted while the bank is measured, since an adaptive solver's depend on the images; they are of
    one image, the earlier calls of a model that carries its state among them. on_images(count) is called with the
    images measured since. The model's own solver and steps are set again at the end.
    """
    cells = list(model.processor.cells.values())
    solver, steps = cells[0].solver, [cell.num_steps for cell in cells]
    points = []
    try:
        for name, chosen in ways(steps):
            model.set_solver(name, chosen)
            with FlopCounterMode(display=False) as counter:
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
    """Draw held-out eps-MSE against multiply-adds, a line a solver, as PNG; the trained way is marked."""
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
        axes.set_ylim(0.97 * own, 1.3 * own)  # what is far off lies above
    axes.set(xlabel="multiply-adds of a network call, millions", ylabel="held-out eps-MSE", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
