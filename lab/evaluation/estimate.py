"""How long the parts of an evaluation will take, from a short timing of each."""

import time
from collections.abc import Callable

import torch

from choices import SHOWN
from diffusion.scheduler import DDPMScheduler, Denoiser
from images.batches import BANK_SIZE
from images.datasets import ImageData
from lab.classifier.network import Classifier, read
from lab.evaluation.by_classifier import MOST_REFERENCES
from lab.evaluation.likelihood import NUM_STRATA, timestep_strata
from lab.evaluation.measures import HELD_OUT_QUERIES
from lab.evaluation.neighbours import nearest
from lab.evaluation.sliced_wasserstein import pyramid_levels, sliced_wasserstein
from runtime.hardware import synchronize

TIMED = 64  # images
TIMED_AMONG = 2048  # training images, among which the nearest are looked for


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long the work takes when it is done for the second time."""
    work()
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


@torch.no_grad()
def estimate(
    model: Denoiser,
    scheduler: DDPMScheduler,
    data: ImageData,
    classifier: Classifier | str,
    *,
    num_images: int,
    bound_images: int,
    calls_per_image: int,
    batch_size: int,
) -> dict[str, float]:
    """Seconds of each part of an evaluation: a batch of each is timed once, which itself takes a few seconds.

    calls_per_image: of the network, for a sample. FID and the ODE solvers are not among the parts.
    """
    device = next(model.parameters()).device
    x = torch.zeros(min(batch_size, num_images), *data.shape, device=device)
    t = torch.zeros(len(x), dtype=torch.long, device=device)
    condition = {"labels": t} if model.num_classes else {}
    call = seconds(lambda: scheduler.network_output(model, x, t, **condition), device) / len(x)
    bound_calls = min(bound_images, len(data.held_out)) * (
        1 + len(timestep_strata(scheduler.num_timesteps, NUM_STRATA))
    )
    parts = {"eps-MSE": 2 * BANK_SIZE * call, "bound": bound_calls * call}
    parts["sampling"] = num_images * calls_per_image * call

    few = data.train[:TIMED].cpu()
    if pyramid_levels(*data.shape[1:]):
        compared = min(num_images, len(data.train), len(data.held_out))
        once = seconds(lambda: sliced_wasserstein(few, [few, few]), device)
        parts["sliced Wasserstein"] = once * compared / len(few)
    some = data.train[:TIMED_AMONG]
    once = seconds(lambda: nearest(few, some, 1, mirror=data.mirror), device)
    queries = SHOWN + min(HELD_OUT_QUERIES, len(data.held_out))
    parts["neighbours"] = once * queries / len(few) * len(data.train) / len(some)
    if isinstance(classifier, Classifier):
        read_images = 2 * num_images + min(len(data.held_out), MOST_REFERENCES)
        parts["classifier"] = seconds(lambda: read(classifier, few), device) * read_images / len(few)
    return parts


def in_words(parts: dict[str, float]) -> str:
    """`about 5 min: eps-MSE 20 s, bound 10 s, ...`, without parts of less than a second."""
    total = sum(parts.values())
    each = ", ".join(f"{name} {_time(part)}" for name, part in parts.items() if part >= 1)
    return f"about {_time(total)}{f': {each}' if each else ''}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
