"""What decides a run: `TrainConfig`, which `config.json` keeps."""

import math
from dataclasses import dataclass, field

BEFORE_THE_FLAG = {"optimizer": "adamw"}  # of a record that names no optimizer


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. The defaults are the mission's; `train.py --help` says what each one means."""

    model: str = "true"
    model_config: dict = field(default_factory=dict)  # further arguments of the architecture
    class_conditional: bool = False
    dataset: str = "cifar10"
    data_dir: str = "data"
    image_size: int | None = None
    epochs: float | None = 3  # one of epochs, steps and minutes is not None
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    optimizer: str = "muon"
    lr: float = 8e-3
    ema_decay: float = 0.999
    timesteps: int = 400
    schedule: str = "linear"
    prediction_type: str = "edm"
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"  # "auto", "on" or "off"
    output_dir: str = "runs"
    log_every: int = 100
    sample_every: int = 5000
    save_every: int = 1000
    tensorboard: bool = False
    skip_bad_images: bool = False
    draw_grids: bool = True  # no flag: a comparison measures the held-out loss alone

    def total_steps(self, num_images: int) -> int | None:
        """Optimizer steps of the run over `num_images`; None if it is bounded by minutes."""
        if self.minutes is not None:
            return None
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * num_images / self.batch_size))
