"""The optimizers: AdamW for all weights, or Muon for the matrices among them and AdamW for the rest."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

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
# What the calls for one stack more cost, in multiply-adds that take as long. That is 0.2 to 0.3 ms on two cores of an
# EPYC, where half or twice the number is as good. On a GPU all matrices of up to 600k parameters then share one stack.
STACK_COST = {"cpu": 1e7, "cuda": 3e9}


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

    `torch.optim.Muon` takes one matrix after the other, in bf16, and so needs several times as long for the many small
    matrices of these models. A convolution counts as a matrix of output channels by (input channels x kernel). Steps
    are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), so that learning
    rates for AdamW suit Muon, too.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float):
        super().__init__(weights, {"lr": lr})
        self.stacks = PaddedStacks(weights)
        self.directions = RecordedFunction(self._directions)

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient."""
        (group,) = self.param_groups
        weights = [weight for weight in group["params"] if weight.grad is not None]
        slots = [s for weight, s in zip(group["params"], self.stacks.slots, strict=True) if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        steps = self.directions([weight.grad for weight in weights], momenta, slots)
        # a tensor, because on a CPU a number is made one anew for each weight
        kept = torch.full((), 1 - group["lr"] * WEIGHT_DECAY, device=weights[0].device)
        torch._foreach_mul_(weights, kept)
        torch._foreach_add_(weights, steps, alpha=-group["lr"])

    def _directions(self, gradients: list[Tensor], momenta: list[Tensor], slots: list[Tensor]) -> list[Tensor]:
        """Update the momenta in place, and return the step of each weight for a learning rate of 1.

        slots: those of the weights in `self.stacks`.
        """
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = list(torch._foreach_lerp(gradients, momenta, MOMENTUM))
        self.stacks.clear()
        torch._foreach_copy_(slots, ahead)
        self.stacks.orthogonalize()
        # back into the memory format of the weights, in which a GPU adds all steps to them in one kernel
        torch._foreach_copy_(ahead, slots)
        return ahead


class PaddedStacks:
    """Many matrices in a few tensors, so that a product of all of them takes a few calls.

    stacks: tensors (N, rows, columns) with rows <= columns; a matrix lies in the corner of its own, amid zeros, on its
    side if it is tall. slots: for each weight the view of its place, of the weight's shape. factors: (N, 1, 1) each.
    """

    def __init__(self, weights: Sequence[Tensor]):
        shapes = [(len(weight), weight[0].numel()) for weight in weights]
        like = {"dtype": weights[0].dtype, "device": weights[0].device}
        groups = grouped(shapes, STACK_COST.get(weights[0].device.type, STACK_COST["cpu"]))
        self.stacks = [torch.zeros(len(group.members), group.rows, group.columns, **like) for group in groups]
        self.factors = []
        slots = {}
        for group, stack in zip(groups, self.stacks, strict=True):
            for i, matrix in zip(group.members, stack, strict=True):
                rows, columns = shapes[i]
                place = matrix[:rows, :columns] if rows <= columns else matrix[:columns, :rows].T
                slots[i] = place.unflatten(1, weights[i].shape[1:])
            factors = [0.2 * max(shapes[i]) ** 0.5 for i in group.members]
            self.factors.append(torch.tensor(factors, **like)[:, None, None])
        self.slots = [slots[i] for i in range(len(weights))]

    def clear(self) -> None:
        """Fill the slots, and what is between them, with zeros."""
        for stack in self.stacks:
            stack.zero_()

    def orthogonalize(self) -> None:
        """Replace each matrix U S V^T with about U V^T, as long as a step of AdamW for a learning rate of 1.

        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Singular values end between 0.7
        and 1.2 times the factor unless they are nearly zero. Rows and columns of zeros stay zeros.
        """
        for stack, factor in zip(self.stacks, self.factors, strict=True):
            torch.mul(newton_schulz(stack), factor, out=stack)


class Group(NamedTuple):
    """The numbers of the matrices that share a stack, and how many rows and columns the stack has."""

    rows: int
    columns: int
    members: list[int]

    @property
    def multiply_adds(self) -> int:
        """Of `newton_schulz`."""
        return NEWTON_SCHULZ_STEPS * len(self.members) * self.rows**2 * (2 * self.columns + self.rows)


def grouped(shapes: Sequence[tuple[int, int]], stack_cost: float) -> list[Group]:
    """Which matrices share a stack: from a stack for each shape on, two are merged as long as that saves time.

    stack_cost: of the calls for one stack more, in multiply-adds that take as long.
    """
    by_shape: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        by_shape[min(shape), max(shape)].append(i)
    groups = [Group(rows, columns, members) for (rows, columns), members in by_shape.items()]

    def merged(a: Group, b: Group) -> Group:
        return Group(max(a.rows, b.rows), max(a.columns, b.columns), a.members + b.members)

    def price(pair: tuple[Group, Group]) -> int:
        """The multiply-adds with zeros that merging the pair adds."""
        return merged(*pair).multiply_adds - sum(group.multiply_adds for group in pair)

    while len(groups) > 1:
        cheapest = min(combinations(groups, 2), key=price)
        if price(cheapest) > stack_cost:
            break
        groups = [group for group in groups if group not in cheapest] + [merged(*cheapest)]
    return groups


def newton_schulz(x: Tensor) -> Tensor:
    """Bring the singular values of each matrix of a stack (N, rows, columns) near 1; fastest if rows <= columns."""
    a, b, c = NEWTON_SCHULZ
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # singular values are now at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)  # with fewer calls than x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
