"""What a run is judged by while it trains: its held-out loss, and a grid of samples to look at."""

import torch
from torch import Tensor

from choices import EPS_SCALE
from diffusion.sampling import Guidance, sample_images
from diffusion.scheduler import DDPMScheduler, Denoiser, carries_state
from images.batches import Batch
from images.datasets import ImageData
from images.pictures import class_columns

GRID_ROWS = 8


@torch.no_grad()
def held_out_loss(
    model: Denoiser, scheduler: DDPMScheduler, bank: Batch, chunk: int = 250, *, memory: bool = True
) -> float:
    """Held-out eps-MSE in float32, averaged over the frozen bank; a model with classes is given each image's class.

    memory: whether a model that carries its state first sees two noisier images of each trajectory, or starts from
    zeros.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(0)
    losses = []
    for part in zip(*(values.split(chunk) for values in vars(bank).values()), strict=True):
        x_0, t, eps, labels = (values.to(device) for values in part)
        condition = {"labels": labels} if model.num_classes else {}
        if memory and carries_state(model):
            noise = torch.randn(2, *x_0.shape, generator=random).to(device)
            condition["state"] = scheduler.remember(model, scheduler.add_noise(x_0, t, eps), t, noise, **condition)
        losses.append(scheduler.loss(model, x_0, t, eps, **condition))
    return torch.cat(losses).double().mean().item()


def sample_grid(model: Denoiser, scheduler: DDPMScheduler, data: ImageData) -> tuple[Tensor, list[str]]:
    """(images to look at during training, always from the same noise, the names of their grid's columns).

    The classes take turns. They are drawn as `sample.py` draws.
    """
    columns = class_columns(data.classes) if model.num_classes else []
    count = GRID_ROWS * (len(columns) or GRID_ROWS)
    labels = torch.arange(count) % model.num_classes if model.num_classes else None
    how = {"steps": min(50, scheduler.num_timesteps), "guidance": Guidance.usual(model), "eps_scale": EPS_SCALE}
    images = sample_images(model, scheduler, data.shape, count, labels=labels, **how)
    return images, columns
