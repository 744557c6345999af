"""The time constants of a liquid model's three cells while it samples an image, as heat maps.

save_tau_maps(record(model, scheduler, shape, num_images=3, steps=50), path)
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.sampling import sample_images
from diffusion.scheduler import DDPMScheduler
from images.pictures import grid_image
from liquid_diffusion import RealLiquidCell, TrueLiquidDiffusionModel
from runtime.files import save_figure

COLUMNS = 8  # denoising steps shown


@dataclass(frozen=True)
class TauMaps:
    """What `record` recorded: each list has one entry per denoising step, noisiest first."""

    noise: list[float]  # sigma of the network's input; 1 is pure noise
    x_0: list[Tensor]  # the predicted images, (N, C, H, W) in [-1, 1]
    tau: dict[str, list[Tensor]]  # of each cell, averaged over channels, (N, h, w), in horizons of the ODE


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
    """Sample the first `num_images` images again and record the time constants of each step.

    steps, labels and the other keyword arguments are those of `sample_images`. With guidance the maps are those of the
    class-conditional half of each call.
    """
    cells = model.processor.cells
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
    """Write the maps as PNG: one column for each of COLUMNS steps; per image, a row with x_0 and a row per cell."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    chosen = np.unique(np.linspace(0, len(maps.x_0) - 1, COLUMNS).round().astype(int))
    names = {name: f"{name} cell\n{each[0].shape[-2]}x{each[0].shape[-1]}" for name, each in maps.tau.items()}
    count, rows = len(maps.x_0[0]), 1 + len(names)
    shown = torch.cat([each[step].flatten() for each in maps.tau.values() for step in chosen])
    colours = {"cmap": "inferno", "vmin": shown.min().item(), "vmax": shown.max().item()}  # one scale for all maps
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
    save_figure(path, figure, dpi=110, bbox_inches="tight")
