"""What moves the weights along their gradient: AdamW, or Muon for the matrices among them and AdamW for the rest."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cuda_graph import RecordedFunction
from errors import UserError

OPTIMIZERS = ("adamw", "muon")
BETAS = (0.9, 0.99)  # of AdamW
MOMENTUM = 0.95  # of Muon
WEIGHT_DECAY = 0.01
SMALLEST_SIDE = 8  # a weight with fewer rows or columns has no directions to even out
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5 (Jordan et al. 2024): steep at zero, rough near one
NEWTON_SCHULZ_STEPS = 5
CUDA_SHORT = 10  # bits of a length up to which a GPU takes all matrices in one stack


def make_optimizer(name: str, model: nn.Module, lr: float) -> "torch.optim.Optimizer | MuonAndAdamW":
    """The optimizer of the weights of `model`. Raises UserError for an unknown name."""
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer: must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if name == "muon":
        return MuonAndAdamW(model, lr)
    return adamw(model.parameters(), lr)


def adamw(weights: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) as both choices have it."""
    return torch.optim.AdamW(weights, lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)


class MuonAndAdamW:
    """Muon for linear layers and convolutions, AdamW for biases and what is smaller, one learning rate for both.

    It has the methods of a torch optimizer that a training uses.
    """

    def __init__(self, model: nn.Module, lr: float):
        weights, rest = [], []
        for parameter in model.parameters():
            large = parameter.ndim in (2, 4) and min(parameter.flatten(1).shape) >= SMALLEST_SIDE
            (weights if large else rest).append(parameter)
        self.parts = {"muon": Muon(weights, lr), "adamw": adamw(rest, lr)}

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad()

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): a step equally long in all directions of a matrix, along its Nesterov momentum.

    `torch.optim.Muon` takes one matrix after the other, in bf16; for the many small ones of these models that lasts
    three to five times as long. A convolution is the matrix of its output channels by all that each of them sees. Steps
    are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), so that learning
    rates for AdamW serve here, too.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float):
        super().__init__(weights, {"lr": lr})
        self.directions = RecordedFunction(directions)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_mul_(weights, 1 - group["lr"] * WEIGHT_DECAY)
            steps = self.directions([weight.grad for weight in weights], momenta)
            torch._foreach_add_(weights, steps, alpha=-group["lr"])


def directions(gradients: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
    """Moves the momenta towards the gradients; the step along each that a learning rate of one would take."""
    torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
    ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
    results = []
    for gradient, direction in zip(gradients, orthogonalized([a.flatten(1) for a in ahead]), strict=True):
        size = 0.2 * max(direction.shape) ** 0.5
        results.append(torch.empty_like(gradient).copy_((direction * size).view(gradient.shape)))
    return results


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """U V^T of each matrix U S V^T, about: singular values end between 0.7 and 1.2, if they are not nearly zero.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Rows and columns of zeros stay zeros,
    so that matrices of several sizes, padded with them, are one stack.
    """
    stacks = defaultdict(list)
    for i, matrix in enumerate(matrices):
        # none is padded to more than twice its length, save on a GPU, where a launch costs more than some zeros
        stacks[max(max(matrix.shape).bit_length(), CUDA_SHORT if matrix.is_cuda else 0)].append(i)
    results = {}
    for chosen in stacks.values():
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].T for i in chosen]
        rows, columns = (max(sizes) for sizes in zip(*(matrix.shape for matrix in wide), strict=True))
        stack = torch.stack([pad(m, (0, columns - m.shape[1], 0, rows - m.shape[0])) for m in wide])
        for i, matrix, x in zip(chosen, wide, newton_schulz(stack), strict=True):
            x = x[: matrix.shape[0], : matrix.shape[1]]
            results[i] = x if x.shape == matrices[i].shape else x.T
    return [results[i] for i in range(len(matrices))]


def newton_schulz(x: Tensor) -> Tensor:
    """Singular values near one for each matrix of a stack (N, rows, columns); quickest if rows are the shorter side."""
    a, b, c = NEWTON_SCHULZ
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # singular values of at most one
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
