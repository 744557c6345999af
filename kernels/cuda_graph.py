"""Parts of a training step as CUDA graphs: hundreds of small kernels then cost one launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

WARM_UPS = 3  # runs before the capture, in which compilers compile and libraries choose kernels and allocate
MOST_PLACES = 16  # a function whose arguments lie in more places than this is not recorded: they move at every call


@contextmanager
def recording(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """A block whose kernels the graph records, with a cuBLAS workspace of the graph's own.

    By itself torch gives the first graph's workspace to all later ones, which then read freed memory once the first
    graph is gone (github.com/pytorch/pytorch/issues/193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class CapturedGradient:
    """`gradient(batch)` recorded at its first call and replayed from then on; on CUDA, in one process.

    gradient: leaves the gradient in the weights of `model` and returns the loss, (). It may not wait for the GPU. From
    call to call only two things may change: the values of the batch, a dataclass of tensors that keep their shapes, and
    the numbers of ODE steps, each of which has a graph of its own.
    """

    def __init__(self, gradient: Callable[[Any], Tensor], model: nn.Module):
        self.gradient, self.model = gradient, model
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Any, Tensor, list[Tensor | None]]] = {}

    def __call__(self, batch: Any) -> Tensor:
        """The loss; the next call overwrites it and the gradients."""
        ode_steps = getattr(self.model, "current_steps", tuple)()
        if ode_steps not in self.graphs:
            self.graphs[ode_steps] = self._capture(batch)
        graph, inputs, loss, gradients = self.graphs[ode_steps]
        for name, value in vars(batch).items():
            getattr(inputs, name).copy_(value)
        graph.replay()
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _capture(self, batch: Any):
        inputs = replace(batch, **{name: value.clone() for name, value in vars(batch).items()})
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.gradient(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with recording(graph):
            loss = self.gradient(inputs)
        return graph, inputs, loss, [parameter.grad for parameter in self.model.parameters()]


class RecordedFunction:
    """`function(*lists of tensors) -> list of tensors`, recorded on CUDA once its arguments lie at a known place again.

    From step to step a caller's tensors tend to return to the same few places in memory. Each set of places that
    returns gets a graph of its own; the first time, and on other devices, the function runs as written. It may change
    its arguments in place, but may not wait for the GPU. The next replay of a graph overwrites its results.
    """

    def __init__(self, function: Callable[..., list[Tensor]]):
        self.function = function
        self.seen: set[tuple[int, ...]] = set()
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def __call__(self, *arguments: list[Tensor]) -> list[Tensor]:
        if not all(tensor.is_cuda for tensors in arguments for tensor in tensors):
            return self.function(*arguments)
        places = tuple(tensor.data_ptr() for tensors in arguments for tensor in tensors)
        if places not in self.seen:
            if len(self.seen) < MOST_PLACES:
                self.seen.add(places)
            return self.function(*arguments)
        if places not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with recording(graph):
                results = self.function(*arguments)
            self.graphs[places] = graph, results
        graph, results = self.graphs[places]
        graph.replay()
        return results
