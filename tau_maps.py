"""Where a liquid model takes its time: the time constants of its three cells while an image is drawn, as heat maps.

save_tau_maps(record(model, scheduler, shape, num_images=3, steps=50), path)
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import atomic_path
from diffusion import DDPMScheduler, sample_images
from liquid_diffusion import RealLiquidCell, TrueLiquidDiffusionModel
from pictures import grid_image

COLUMNS = 8  # denoising steps shown


@dataclass(frozen=True)
class TauMaps:
    """What `record` saw: a list entry for each denoising step, noisiest first."""

    noise: list[float]  # sigma of the network's input, 1 is noise alone
    x_0: list[Tensor]  # the image as it is predicted, (N, C, H, W) in [-1, 1]
    tau: dict[str, list[Tensor]]  # of each cell, mean over channels, (N, h, w) in horizons of the ODE


def record(
    model: TrueLiquidDiffusionModel,
    scheduler: DDPMScheduler,
    shape: Sequence[int],
    num_images: int,
    *,
    steps: int,
    labels: Tensor | None = None,
    **sampling,
) -> TauMaps:
    """Draw the first `num_images` images again and keep each step's time constants.

    steps, labels and the other keyword arguments as in `sample_images`. Under guidance the maps are those of the call
    with the class.
    """
    cells: dict[str, RealLiquidCell] = dict(model.processor.cells.items())
    tau: dict[str, list[Tensor]] = {name: [] for name in cells}
    x_0: list[Tensor] = []

    def keeper(name: str):
        def keep(cell: RealLiquidCell, inputs: tuple, _: Tensor) -> None:
            found = cell.drive_and_tau(*inputs[:2])[1][:num_images]
            tau[name].append(found.float().mean(1).cpu() / cell.horizon)

        return keep

    with ExitStack() as hooks:
        for name, cell in cells.items():
            hooks.enter_context(cell.register_forward_hook(keeper(name)))
        labels = None if labels is None else labels[:num_images]
        options = sampling | {"labels": labels, "steps": steps, "batch_size": num_images}
        sample_images(model, scheduler, shape, num_images, on_step=lambda _, x: x_0.append(x.cpu()), **options)
    noise = [scheduler.level(t)[1] for t in scheduler.timesteps(steps)[:-1]]
    return TauMaps(noise, x_0, tau)


def save_tau_maps(maps: TauMaps, path: Path) -> None:
    """Write the maps as PNG: a column for each of COLUMNS steps; for each image its x_0 and a row for each cell."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    chosen = np.unique(np.linspace(0, len(maps.x_0) - 1, COLUMNS).round().astype(int))
    names = {name: f"{name} cell\n{each[0].shape[-2]}x{each[0].shape[-1]}" for name, each in maps.tau.items()}
    count, rows = len(maps.x_0[0]), 1 + len(names)
    shown = torch.cat([each[step].flatten() for each in maps.tau.values() for step in chosen])
    colours = {"cmap": "inferno", "vmin": shown.min().item(), "vmax": shown.max().item()}  # one scale for all
    figure = Figure(figsize=(1.1 * len(chosen) + 2.2, 1.08 * rows * count + 0.9), layout="constrained")
    axes = figure.subplots(rows * count, len(chosen), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for column, step in enumerate(chosen):
        axes[0, column].set_title(f"step {step + 1}\n{100 * maps.noise[step]:.0f} % noise", fontsize=9)
        for image in range(count):
            top = rows * image
            axes[top, column].imshow(grid_image(maps.x_0[step][image : image + 1]))
            for below, name in enumerate(names, start=1):
                heat = axes[top + below, column].imshow(maps.tau[name][step][image].numpy(), **colours)
    for row in range(rows * count):
        label = "image so far" if row % rows == 0 else list(names.values())[row % rows - 1]
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    bar = figure.colorbar(heat, ax=axes, shrink=0.6, aspect=40)
    bar.set_label("time constant tau: dark reacts fast, bright slowly (1: the time that a cell runs for)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
