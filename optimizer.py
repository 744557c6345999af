"""What moves the weights along their gradient: AdamW, or Muon for the matrices among them and AdamW for the rest."""

import torch
from torch import Tensor, nn

from errors import UserError

OPTIMIZERS = ("adamw", "muon")
BETAS = (0.9, 0.99)  # of AdamW
WEIGHT_DECAY = 0.01
SMALLEST_SIDE = 8  # a weight with fewer rows or columns has no directions to even out


def make_optimizer(name: str, model: nn.Module, lr: float) -> "torch.optim.Optimizer | MuonAndAdamW":
    """The optimizer of the weights of `model`. Raises UserError for an unknown name or a torch without Muon."""
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer: must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if name == "muon":
        return MuonAndAdamW(model, lr)
    return torch.optim.AdamW(model.parameters(), lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight (out, in, kH, kW) or (out, in) as (out, kH kW in); of a channels last one the same memory."""
    return (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).flatten(1)


class MuonAndAdamW:
    """Muon (Jordan et al. 2024) for linear layers and convolutions, AdamW for biases and what is smaller.

    Muon makes a step equally long in all directions of a matrix: it orthogonalises the momentum by five steps of a
    Newton-Schulz iteration. Its steps are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM
    training", eq. 4), so that one learning rate serves both. A convolution is the matrix of its output channels by all
    that each of them sees.

    It has the methods of a torch optimizer that a training uses. Raises UserError before torch 2.9, which has no Muon.
    """

    def __init__(self, model: nn.Module, lr: float):
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"--optimizer: muon needs torch 2.9 or later, this is {torch.__version__}")
        self.parameters = list(model.parameters())
        weights, rest = [], []
        for parameter in self.parameters:
            large = parameter.ndim in (2, 4) and min(as_matrix(parameter).shape) >= SMALLEST_SIDE
            (weights if large else rest).append(parameter)
        self.matrices = [(weight, nn.Parameter(as_matrix(weight.detach()))) for weight in weights]
        if any(weight.data_ptr() != matrix.data_ptr() for weight, matrix in self.matrices):
            raise ValueError("the weights of the model must be channels last")
        self.parts = {
            "muon": torch.optim.Muon(
                [matrix for _, matrix in self.matrices], lr, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
            ),
            "adamw": torch.optim.AdamW(rest, lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True),
        }

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for weight, matrix in self.matrices:
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad)
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
