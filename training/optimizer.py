"""The optimizers: AdamW for all weights, or Muon for the matrices among them and AdamW for the rest."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from choices import OPTIMIZERS
from kernels.cuda_graph import RecordedFunction

BETAS = (0.9, 0.99)  # of AdamW
MOMENTUM = 0.95  # of Muon
WEIGHT_DECAY = 0.01
SMALLEST_SIDE = 8  # Muon takes no weight with fewer rows or columns: it has hardly any directions to balance
# The coefficients of x, x^3 and x^5 (Jordan et al. 2024). The large slope at zero lifts small singular values within a
# few steps; the price is that they do not settle at 1 but end between 0.7 and 1.2, which does no harm.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ONE_STACK_BITS = 10  # on a GPU all matrices whose longer side has at most this many bits share one stack


def make_optimizer(name: str, model: nn.Module, lr: float) -> "torch.optim.Optimizer | MuonAndAdamW":
    """The optimizer `name` for the weights of `model`. Raises ValueError for an unknown name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if name == "muon":
        return MuonAndAdamW(model, lr)
    return adamw(model.parameters(), lr)


def adamw(weights: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), with the settings that both choices share."""
    return torch.optim.AdamW(weights, lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)


class MuonAndAdamW:
    """Muon for linear layers and convolutions, AdamW for biases and small weights, with one learning rate for both.

    It has those methods of a torch optimizer that the training loop calls.
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
    """Muon (Jordan et al. 2024): each step is equally long in all directions of a matrix, along its Nesterov momentum.

    `torch.optim.Muon` takes one matrix after the other, in bf16, and so needs three to five times as long for the many
    small matrices of these models. A convolution counts as a matrix of output channels by (input channels x kernel).
    Steps are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), so that
    learning rates for AdamW suit Muon, too.
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
    """Update the momenta in place, and return the step of each matrix for a learning rate of 1."""
    torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
    ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
    results = []
    for gradient, direction in zip(gradients, orthogonalized([a.flatten(1) for a in ahead]), strict=True):
        size = 0.2 * max(direction.shape) ** 0.5
        results.append(torch.empty_like(gradient).copy_((direction * size).view(gradient.shape)))
    return results


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Approximately U V^T for each matrix U S V^T: singular values end between 0.7 and 1.2 unless they are nearly zero.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Rows and columns of zeros stay zeros,
    so matrices of several sizes are padded with zeros and computed as one stack.
    """
    stacks = defaultdict(list)
    for i, matrix in enumerate(matrices):
        # no matrix is padded to more than twice its length, except on a GPU, where a launch costs more than zeros do
        stacks[max(max(matrix.shape).bit_length(), ONE_STACK_BITS if matrix.is_cuda else 0)].append(i)
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
    """Bring the singular values of each matrix of a stack (N, rows, columns) near 1; fastest if rows <= columns."""
    a, b, c = NEWTON_SCHULZ
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # singular values are now at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
