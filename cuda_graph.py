"""Parts of a training step as CUDA graphs: hundreds of small kernels cost one launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from image_data import Batch

WARM_UPS = 3  # runs before the capture, in which compilers compile and libraries choose kernels and allocate
MOST_PLACES = 16  # that a function's arguments are in by turns; with more, they are somewhere else each time


@contextmanager
def recording(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """A block whose kernels the graph records, with a cuBLAS workspace that is the graph's own.

    By itself torch gives the first graph's to all that are recorded later, and these read freed memory once that graph
    is gone (github.com/pytorch/pytorch/issues/193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may do as they please
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class CapturedGradient:
    """`gradient(batch)` recorded at its first call and replayed from then on; on CUDA, in one process.

    gradient: leaves the gradient in the weights of `model` and returns the loss, (). It may not wait for the GPU, nor
    do anything else than the time before, save for other values in the batch, which always has the same shapes, and
    other numbers of ODE steps: each has a graph of its own.
    """

    def __init__(self, gradient: Callable[[Batch], Tensor], model: nn.Module):
        self.gradient, self.model = gradient, model
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Batch, Tensor, list[Tensor | None]]] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """The loss; it and the gradients are overwritten by the next call."""
        ode_steps = self.model.current_steps() if hasattr(self.model, "current_steps") else ()
        if ode_steps not in self.graphs:
            self.graphs[ode_steps] = self._capture(batch)
        graph, inputs, loss, gradients = self.graphs[ode_steps]
        for name, value in vars(batch).items():
            getattr(inputs, name).copy_(value)
        graph.replay()
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _capture(self, batch: Batch):
        inputs = Batch(**{name: value.clone() for name, value in vars(batch).items()})
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
    """`function(*lists of tensors)` that gives tensors, recorded on CUDA where its arguments are where they once were.

    The memory that a caller's tensors are in tends to recur from step to step. What recurs has a graph of its own; the
    first time, and on other devices, the function runs as written. It may change its arguments in place, and may not
    wait for the GPU. A graph's results are overwritten by its next replay.
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
