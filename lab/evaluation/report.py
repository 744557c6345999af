"""What a report of figures is made of: its entries, a check of its values, and a choice of images."""

import math
from typing import Any

import torch
from torch import Tensor

from runtime.errors import RunFailed

Report = dict[str, Any]


def not_measured(reason: str) -> Report:
    """The entry of the report for a figure that could not be measured."""
    return {"value": None, "reason": reason}


def finite(value: float, what: str) -> float:
    """Return the value. Raises RunFailed if it is not finite."""
    if not math.isfinite(value):
        raise RunFailed(f"{what} is {value}: the model's weights or the images are broken; nothing was written")
    return value


def choice(size: int, count: int, seed: int) -> Tensor:
    """The indices of `count` of `size` images, drawn without replacement; of all, in random order, if fewer."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
