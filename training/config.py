"""Everything that decides a run: `TrainConfig`, which is saved in `config.json`."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from choices import WITHOUT_ODE

MOST_CLASSES = 100  # that a run learns unless it is told otherwise; each has a vector of its own
# what older records, which lack these values, were trained with
BEFORE_THE_FLAG = {"optimizer": "adamw", "coarse_first": 0}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; `train.py --help` explains each value. The defaults are those of `train.py`."""

    model: str = "true"
    model_config: dict = field(default_factory=dict)  # further arguments of the network
    coarse_first: float = 0  # the share of the run with half of the ODE steps; always 0 for a model without an ODE
    class_conditional: bool | None = None  # None: if the set has from 2 to MOST_CLASSES classes
    mirror: bool = True  # half of the images, in sets where left and right may be exchanged
    dataset: str = "cifar10"
    data_dir: str | Path = "data"
    image_size: int | str | None = None  # a side in pixels, or "HEIGHTxWIDTH"
    epochs: float | None = 3  # exactly one of epochs, steps and minutes is not None
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
    output_dir: str | Path = "runs"
    log_every: int = 100
    sample_every: int = 5000
    save_every: int = 1000
    tensorboard: bool = False
    skip_bad_images: bool = False
    init: str | Path | None = None  # the run or file whose weights the run starts from
    draw_grids: bool = True  # no flag: a comparison measures only the held-out loss

    def __post_init__(self) -> None:
        for name in ("data_dir", "output_dir", "init"):  # a Path is kept as text, as in config.json
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        if self.model in WITHOUT_ODE:
            object.__setattr__(self, "coarse_first", 0)

    def total_steps(self, num_images: int) -> int | None:
        """Optimizer steps of the run on a set of `num_images`; None if the run is bounded by minutes."""
        if self.minutes is not None:
            return None
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 0) * num_images / self.batch_size))

    def for_classes(self, count: int) -> "TrainConfig":
        """This config, decided on whether to learn the classes of a set that has `count` of them."""
        if self.class_conditional is not None:
            return self
        return replace(self, class_conditional=2 <= count <= MOST_CLASSES)

    def progress(self, step: int, seconds: float, num_images: int) -> float:
        """The fraction of the run that is done after so many steps and seconds of training; 1 at its end."""
        total = self.total_steps(num_images)
        return seconds / (60 * self.minutes) if total is None and self.minutes else step / (total or 1)
