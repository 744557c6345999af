"""Everything that changes during a run: `TrainState` holds it, saves it, and goes on from what was saved."""

import json
import math
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from diffusion.scheduler import DDPMScheduler, Denoiser
from images.datasets import ImageData
from models import build_model, complete_config
from runtime.errors import RunFailed, UserError, reason
from runtime.processes import Processes
from training.checkpoint import in_full, read_resume, save_run
from training.config import TrainConfig
from training.optimizer import make_optimizer
from training.run_folder import RESUME_FILE, what_is_safe


def ema_decay(longest: float, step: int) -> float:
    """The decay of the weights' moving average: small at first, so that a short run averages only trained weights."""
    return min(longest, (1 + step) / (10 + step))


class TrainState:
    """The weights, their average, the optimizer, the steps and seconds so far, and the loss since the last log line."""

    def __init__(self, model: Denoiser, about: dict, lr: float, longest_decay: float, optimizer: str):
        """about: the config from which the model can be rebuilt, and what it is trained on. optimizer: its name."""
        self.model = model
        self.about = about
        self.ema = AveragedModel(model)
        # kept, because to look for them in the modules takes longer than to average them
        self.weights: list[Tensor] = list(model.parameters())
        self.averaged_weights: list[Tensor] = list(self.ema.parameters())
        self.longest_decay = longest_decay
        self.optimizer = make_optimizer(optimizer, model, lr)
        self.step = 0
        self.seconds = 0.0
        # since the last log line; the sum stays on the device, so that adding to it does not wait for the step
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=next(model.parameters()).device)
        self.loss_steps = 0

    @property
    def averaged(self) -> Denoiser:
        """A network with the averaged weights."""
        return cast(Denoiser, self.ema.module)

    @torch.no_grad()
    def average(self) -> None:
        """Move the average towards the weights; `AveragedModel.update_parameters` would wait for the GPU."""
        decay = ema_decay(self.longest_decay, self.step) if self.step else 0.0
        torch._foreach_lerp_(self.averaged_weights, self.weights, 1 - decay)
        self.ema.n_averaged += 1

    def mean_loss(self, processes: Processes, run: Path) -> float:
        """The mean loss since the last log line. Raises RunFailed if it or a weight is not finite."""
        loss = processes.total(self.loss_sum).item() / self.loss_steps
        self.check(math.isfinite(loss), f"the loss is {loss}", run)
        finite = all(torch.isfinite(p).all() for p in self.weights)
        self.check(finite, f"the loss is {loss:.4g} but a weight is not finite", run)
        return loss

    def check(self, good: bool, otherwise: str, run: Path) -> None:
        """Raise RunFailed, with the step and what is safe on disk, unless `good`."""
        if not good:
            raise RunFailed(f"{otherwise} at step {self.step}; {what_is_safe(run)}; try a lower --lr")

    def reset_loss(self) -> None:
        """Start the mean of the next log line."""
        self.loss_sum.zero_()
        self.loss_steps = 0

    def save(self, run: Path, processes: Processes) -> None:
        """Write both files of the run, from the main process."""
        loss_sum = processes.total(self.loss_sum)  # over all processes, so that any number of processes can resume
        if not processes.is_main:
            return
        dump = {
            "about": json.dumps(self.about),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": loss_sum,
            "loss_steps": self.loss_steps,
        }
        save_run(run, self.averaged.state_dict(), self.about, dump)

    def restore(self, run: Path, processes: Processes) -> None:
        """Go on from what `save` wrote. Raises UserError, naming the file, if it is of another model or data set."""
        path = run / RESUME_FILE
        saved = read_resume(path)
        try:
            before = json.loads(saved["about"])
            before = in_full(before) if saved["format_version"] < 4 else before
            for name, now in json.loads(json.dumps(self.about)).items():
                if before[name] != now:
                    raise ValueError(f"{name} was {before[name]}, is {now}")
            for part in ("model", "ema", "optimizer"):
                getattr(self, part).load_state_dict(saved[part])
            self.step, self.seconds, self.loss_steps = int(saved["step"]), float(saved["seconds"]), saved["loss_steps"]
            if processes.is_main:
                self.loss_sum.copy_(saved["loss_sum"])
        except Exception as error:  # load_state_dict raises nearly anything for what is not a state dict
            message = f"{path}: does not fit the config.json and the data of this run ({reason(error)})"
            raise UserError(message) from error


def untrained(config: TrainConfig, data: ImageData, device: torch.device) -> tuple[DDPMScheduler, TrainState]:
    """The diffusion process of a run and its state at step 0; both are pure functions of config and data."""
    scheduler = DDPMScheduler(config.timesteps, config.schedule, config.prediction_type)
    about = model_metadata(config, data)
    torch.manual_seed(config.seed)
    model = build_model(config.model, **about["model_config"])
    model.to(device).to(memory_format=torch.channels_last)
    return scheduler, TrainState(model, about, config.lr, config.ema_decay, config.optimizer)


def model_metadata(config: TrainConfig, data: ImageData) -> dict:
    """The metadata of `model.safetensors`: how to rebuild the model, and what it was trained on."""
    return {
        "model": config.model,
        "model_config": complete_config(
            config.model,
            **{
                "in_channels": data.shape[0],
                "num_classes": len(data.classes) if config.class_conditional else 0,
                **config.model_config,
            },
        ),
        **{key: getattr(config, key) for key in ("timesteps", "schedule", "prediction_type", "dataset")},
        "shape": list(data.shape),
        "classes": list(data.classes),
        "training_images": len(data.train),
    }
