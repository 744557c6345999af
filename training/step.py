"""One step of training: take a batch, noise it, predict, and move the weights along the gradient of the loss.

`training.loop` repeats it; `lab.speed` times it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.scheduler import DDPMScheduler, carries_state
from images.batches import Batch, memory_noise, random_generator, training_batch
from images.datasets import ImageData
from kernels.compilation import compiled
from kernels.cuda_graph import CapturedGradient
from runtime.processes import Processes
from training.config import TrainConfig
from training.state import TrainState

WARM_UP_STEPS = 200
FINAL_LR_FRACTION = 0.02  # of the peak, where the cosine ends
GRADIENT_NORM = 1.0


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, times a cosine from 1 to FINAL_LR_FRACTION over the run's progress 0..1."""
    cosine = FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * (1 + math.cos(math.pi * progress)) / 2
    return peak * min(1, (step + 1) / WARM_UP_STEPS) * cosine


class TrainStep:
    """`lr = step(progress)` trains `state` on its next batch, or on this process's part of the batch.

    Precision and compilation are those of the config. On a GPU that no other process of the run shares, compiling also
    records the gradient as a CUDA graph. Nothing here waits for a GPU, so it computes one step while the CPU prepares
    the next.
    """

    def __init__(
        self, config: TrainConfig, data: ImageData, scheduler: DDPMScheduler, state: TrainState, processes: Processes
    ):
        self.config, self.data, self.scheduler, self.state, self.processes = config, data, scheduler, state, processes
        self.remembers = carries_state(state.model)
        self.network: Any = compiled(state.model) if config.compile == "on" else state.model
        if processes.world_size > 1:
            self.network = DistributedDataParallel(self.network)
        self.gradient: Callable[..., Tensor] = self.clipped_gradient
        alone_on_cuda = processes.device.type == "cuda" and processes.world_size == 1
        if config.compile == "on" and alone_on_cuda and not self.remembers:
            self.gradient = CapturedGradient(self.clipped_gradient, state.model)

    def __call__(self, progress: float) -> float:
        """Train on batch number `state.step`; returns the learning rate. progress: of the whole run, 0 to 1."""
        config, state, device = self.config, self.state, self.processes.device
        part = {"seed": config.seed, "number": state.step, "batch_size": config.batch_size}
        part |= {"rank": self.processes.rank, "world_size": self.processes.world_size}
        batch = training_batch(self.data, self.scheduler.draw_timesteps, device=device, **part)
        memory = [memory_noise(self.data.shape, **part).to(device)] if self.remembers else []
        random = random_generator("cpu", config.seed, state.step, stream=3)
        state.model.draw_steps(random, coarse=progress < config.coarse_first)
        loss = self.gradient(batch, *memory)
        lr = learning_rate(config.lr, state.step, progress)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        state.average()
        state.loss_sum += loss / self.processes.world_size
        state.loss_steps += 1
        state.step += 1
        return lr

    def clipped_gradient(self, batch: Batch, memory: Tensor | None = None) -> Tensor:
        """Leave the clipped gradient of the batch's mean loss in the weights; return this process's part of the loss.

        memory: noise for the images that a model with memory has seen before (`DDPMScheduler.remember`). The loss, (),
        is the part's summed loss over the size of the whole batch, times the number of processes.
        """
        self.state.optimizer.zero_grad()
        scale = self.processes.world_size / self.config.batch_size  # DistributedDataParallel averages over processes
        condition: dict[str, Any] = {"labels": batch.labels} if self.config.class_conditional else {}
        with torch.autocast(batch.x_0.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            if memory is not None:
                x_t = self.scheduler.add_noise(batch.x_0, batch.t, batch.eps)
                condition["state"] = self.scheduler.remember(self.network, x_t, batch.t, memory, **condition)
            losses = self.scheduler.training_loss(self.network, batch.x_0, batch.t, batch.eps, **condition)
            loss = losses.sum() * scale
        loss.backward()
        nn.utils.clip_grad_norm_(self.state.weights, GRADIENT_NORM)
        return loss.detach()
