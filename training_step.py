"""One step of training: take a batch, noise it, predict, and move the weights along the gradient of the loss.

`training.py` repeats it, `speed.py` times it.
"""

import math

import torch
from torch import Tensor, nn

from diffusion import DDPMScheduler
from hardware import Processes
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


def take_step(
    network: nn.Module,
    state: TrainState,
    scheduler: DDPMScheduler,
    data: ImageData,
    config: TrainConfig,
    here: Processes,
    progress: float,
) -> float:
    """Train `state` on batch number `state.step`, or on this process's share of it; returns the learning rate.

    network: the state's model, compiled or made parallel. progress: the share of the run that is done, 0 to 1.
    """
    share = {"seed": config.seed, "number": state.step, "batch_size": config.batch_size}
    share |= {"rank": here.rank, "world_size": here.world_size}
    batch = training_batch(data, num_timesteps=config.timesteps, device=here.device, **share)
    memory = None
    if getattr(state.model, "carries_state", False):
        memory = memory_noise(data.shape, **share).to(here.device)
    if getattr(state.model, "random_steps", False):
        share_of_steps = ode_step_share(config.seed, state.step)
        state.model.set_solver(ode_steps=scaled_steps(state.model.ode_steps, share_of_steps))
    # DistributedDataParallel averages over the processes: scaled so, the average is the global batch's mean
    loss = backward(network, scheduler, batch, config, here.world_size / config.batch_size, memory)
    nn.utils.clip_grad_norm_(state.model.parameters(), GRADIENT_NORM)
    lr = learning_rate(config.lr, state.step, progress)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update_parameters(state.model)
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
        loss = scheduler.loss(network, batch.x_0, batch.t, batch.eps, **condition).sum() * scale
    loss.backward()
    return loss.detach()
