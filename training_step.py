"""One step of training: take a batch, noise it, predict, and move the weights along the gradient of the loss.

`training.py` repeats it, `speed.py` times it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cuda_graph import CapturedGradient
from diffusion import DDPMScheduler, carries_state
from hardware import Processes, compiled
from image_data import Batch, ImageData, memory_noise, random_generator, training_batch
from liquid_diffusion import ODE_STEP_SHARES, scaled_steps
from train_config import TrainConfig
from train_state import TrainState

WARM_UP_STEPS = 200
FINAL_LR_SHARE = 0.02  # of the peak, where the cosine ends
GRADIENT_NORM = 1.0


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, times a cosine from 1 to FINAL_LR_SHARE over the run's progress 0..1."""
    cosine = FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * progress)) / 2
    return peak * min(1, (step + 1) / WARM_UP_STEPS) * cosine


def ode_step_share(seed: int, number: int) -> float:
    """Which of ODE_STEP_SHARES batch `number` is trained with, the same in every process."""
    chances = torch.tensor(list(ODE_STEP_SHARES.values()))
    drawn = torch.multinomial(chances, 1, generator=random_generator("cpu", seed, number, stream=3))
    return list(ODE_STEP_SHARES)[int(drawn)]


def gradient_function(
    state: TrainState, scheduler: DDPMScheduler, config: TrainConfig, here: Processes
) -> Callable[..., Tensor]:
    """A function of a batch, or of this process's share of one, and of noise for the memory of a model that has one.

    It leaves the clipped gradient of the batch's mean loss in the weights of `state.model`, as the config's precision
    and compilation have it, and returns the summed loss over the batch's size, (). On a GPU that one process has for
    itself, "on" means a CUDA graph, too.
    """
    network = compiled(state.model) if config.compile == "on" else state.model
    if here.world_size > 1:
        network = DistributedDataParallel(network)
    scale = here.world_size / config.batch_size  # the parallel network averages over the processes

    def gradient(batch: Batch, memory: Tensor | None = None) -> Tensor:
        state.optimizer.zero_grad()
        loss = backward(network, scheduler, batch, config, scale, memory)
        nn.utils.clip_grad_norm_(state.model.parameters(), GRADIENT_NORM)
        return loss

    alone_on_cuda = here.device.type == "cuda" and here.world_size == 1
    if config.compile == "on" and alone_on_cuda and not carries_state(state.model):
        return CapturedGradient(gradient, state.model)
    return gradient


def take_step(
    gradient: Callable[..., Tensor],
    state: TrainState,
    scheduler: DDPMScheduler,
    data: ImageData,
    config: TrainConfig,
    here: Processes,
    progress: float,
) -> float:
    """Train `state` on batch number `state.step`, or on this process's share of it; returns the learning rate.

    gradient: the state's `gradient_function`. progress: the share of the run that is done, 0 to 1. Nothing here waits
    for a GPU, so that it computes one step while the next one is prepared.
    """
    share = {"seed": config.seed, "number": state.step, "batch_size": config.batch_size}
    share |= {"rank": here.rank, "world_size": here.world_size}
    batch = training_batch(data, scheduler.draw_timesteps, device=here.device, **share)
    memory = [memory_noise(data.shape, **share).to(here.device)] if carries_state(state.model) else []
    if getattr(state.model, "random_steps", False):
        share_of_steps = ode_step_share(config.seed, state.step)
        state.model.set_solver(ode_steps=scaled_steps(state.model.ode_steps, share_of_steps))
    loss = gradient(batch, *memory)
    lr = learning_rate(config.lr, state.step, progress)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.average()
    state.loss_sum += loss / here.world_size
    state.loss_steps += 1
    state.step += 1
    return lr


def backward(
    network: nn.Module,
    scheduler: DDPMScheduler,
    batch: Batch,
    config: TrainConfig,
    scale: float,
    memory: Tensor | None = None,
) -> Tensor:
    """Add the gradient of the batch's summed loss times `scale`; returns that loss.

    memory: noise for what a model that carries its state has seen before (`DDPMScheduler.remember`).
    """
    condition = {"labels": batch.labels} if config.class_conditional else {}
    with torch.autocast(batch.x_0.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        if memory is not None:
            x_t = scheduler.add_noise(batch.x_0, batch.t, batch.eps)
            condition["state"] = scheduler.remember(network, x_t, batch.t, memory, **condition)
        loss = scheduler.training_loss(network, batch.x_0, batch.t, batch.eps, **condition).sum() * scale
    loss.backward()
    return loss.detach()
