"""From noise to images: what a prediction is led by, and the samplers.

    images = sample_images(model, scheduler, (3, 32, 32), 16, labels=torch.arange(16) % 10, guidance=Guidance(4))

    # (16, 3, 32, 32) in [-1, 1]; without labels and guidance for a model without classes

Notation and timesteps are those of `diffusion.scheduler`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from choices import GUIDANCE, GUIDED_SHARE, SAMPLERS
from diffusion.scheduler import DDPMScheduler, Denoiser

# (x_t, t, state) -> (x_0, eps, state): what a sampler calls
Denoise = Callable[[Tensor, int, object], tuple[Tensor, Tensor, object]]


class ByNoise(Denoiser):
    """One denoiser at timesteps from `start` up and another below, for a sampler, whose images share their timestep.

    At high noise there is little to see, so that a cheaper one, such as the same liquid with fewer ODE steps, may do.
    """

    def __init__(self, noisy: Denoiser, clean: Denoiser, start: int):
        super().__init__()
        self.noisy, self.clean, self.start = noisy, clean, start
        self.num_classes = clean.num_classes

    def at(self, t: int) -> Denoiser:
        """The one that answers at timestep t."""
        return self.noisy if t >= self.start else self.clean

    def forward(self, x: Tensor, t: Tensor, state: object = None, **condition):
        return self.at(int(t[0]))(x, t, state, **condition)


@dataclass(frozen=True)
class Guidance:
    """Leads each prediction away from a worse one: F_worse + weight (F - F_worse); a weight of 1 changes nothing.

    The worse prediction is that of `guide`, or else of the model itself, and is not told the class: classifier-free
    guidance (Ho & Salimans 2022, eq. 6, where weight = 1 + w). A guide is a worse version of the model, as in Karras et
    al. 2024 ("Guiding a diffusion model with a bad version of itself", eq. 3); without classes it is needed.
    between: the fractions of the T timesteps, from clean to noise, between which it acts (Kynkaanniemi et al. 2024).
    """

    weight: float = 1.0
    guide: Denoiser | None = None
    between: tuple[float, float] = (0.0, 1.0)

    def acts(self, t: int, num_timesteps: int) -> bool:
        """Whether predictions at timestep t are led."""
        low, high = self.between
        return self.weight != 1 and low <= (t + 0.5) / num_timesteps <= high

    def calls(self, timesteps: Sequence[int], num_timesteps: int) -> int:
        """Network calls per image of a sampler that goes through these timesteps; the last one is the image."""
        return sum(2 if self.acts(t, num_timesteps) else 1 for t in timesteps[:-1])

    @classmethod
    def usual(cls, model: Denoiser) -> "Guidance":
        """With which the commands draw from a model, unless a flag says otherwise."""
        return cls(GUIDANCE, between=(0.0, GUIDED_SHARE)) if model.num_classes else cls()


def denoiser(
    model: Denoiser,
    scheduler: DDPMScheduler,
    *,
    clip: bool = True,
    labels: Tensor | None = None,
    guidance: Guidance | float = 1.0,
    eps_scale: float = 1.0,
) -> Denoise:
    """The function that a sampler calls. x_0 is clipped to [-1, 1], and eps is computed from it so that both agree.

    labels: (B,) classes, or None for a model without classes. guidance: a number is the weight of classifier-free
    guidance. eps_scale: each predicted eps is divided by it. Above 1 the sampler takes away a little less noise, which
    makes up for images that have become too smooth on the way (epsilon scaling, Ning et al. 2024, eq. 13). Raises
    ValueError for guidance without labels and without a guide.
    """
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    if guidance.weight != 1 and guidance.guide is None and labels is None:
        raise ValueError("guidance: a model without classes needs a guide")

    def denoise(x: Tensor, t: int, state: object) -> tuple[Tensor, Tensor, object]:
        times = torch.full((len(x),), t, device=x.device)
        own = {} if labels is None else {"labels": labels}
        if not guidance.acts(t, scheduler.num_timesteps):
            output, state = scheduler.network_step(model, x, times, state, **own)
        elif guidance.guide is None and labels is not None:  # both in one call, which is faster
            doubled = torch.cat([x, x]), torch.cat([times, times])
            both = torch.cat([labels, no_class(model, labels)])
            output, state = scheduler.network_step(model, *doubled, state, labels=both)
            conditional, unconditional = output.chunk(2)
            output = torch.lerp(unconditional, conditional, guidance.weight)
        else:
            output, state = scheduler.network_step(model, x, times, state, **own)
            ignorant = {} if labels is None else {"labels": no_class(model, labels)}
            worse = scheduler.network_output(guidance.guide or model, x, times, **ignorant)
            output = torch.lerp(worse, output, guidance.weight)
        x_0, eps = scheduler.predict(output, x, times)
        alpha, sigma = scheduler.level(t)
        if eps_scale != 1:
            eps = eps / eps_scale
            x_0 = x_0 / eps_scale + (1 - 1 / eps_scale) / alpha * x  # (x - sigma eps) / alpha, without cancellation
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps = (x - alpha * x_0) / sigma
        return x_0, eps, state

    return denoise


def no_class(model: Denoiser, labels: Tensor) -> Tensor:
    """As many labels as `labels` that mean "no class"."""
    return torch.full_like(labels, model.num_classes)


def ddpm(
    scheduler: DDPMScheduler, denoise: Denoise, x: Tensor, timesteps: Sequence[int], *, noise: Callable[[], Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Ancestral sampling with the posterior's own variance (Ho et al. 2020, eq. 6 and 7), from t to any s < t.

    x: (B, C, H, W) at timesteps[0]; noise() returns fresh noise of its shape. Yields (s, x_s, x_0) after each step.
    """
    state = None
    for t, s in pairwise(timesteps):
        x_0, _, state = denoise(x, t, state)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scheduler.level(t), scheduler.level(s)
        ratio = alpha_t / alpha_s
        beta = 1 - ratio**2
        x = (alpha_s * beta * x_0 + ratio * sigma_s**2 * x) / sigma_t**2
        if s >= 0:
            x = x + math.sqrt(beta) * sigma_s / sigma_t * noise()
        yield s, x, x_0


def ddim(
    scheduler: DDPMScheduler,
    denoise: Denoise,
    x: Tensor,
    timesteps: Sequence[int],
    *,
    eta: float = 0.0,
    noise: Callable[[], Tensor],
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DDIM (Song et al. 2021, eq. 12, with eta as in eq. 16). Arguments and yields as in `ddpm`."""
    state = None
    for t, s in pairwise(timesteps):
        x_0, eps, state = denoise(x, t, state)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scheduler.level(t), scheduler.level(s)
        std = eta * sigma_s / sigma_t * math.sqrt(1 - (alpha_t / alpha_s) ** 2)
        x = alpha_s * x_0 + math.sqrt(sigma_s**2 - std**2) * eps
        if std > 0:
            x = x + std * noise()
        yield s, x, x_0


def dpmpp(
    scheduler: DDPMScheduler, denoise: Denoise, x: Tensor, timesteps: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2); the step to the clean image is of first order.

    Deterministic. Arguments and yields as in `ddpm`.
    """
    state, previous, last_step = None, None, 0.0
    for t, s in pairwise(timesteps):
        x_0, _, state = denoise(x, t, state)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = scheduler.level(t), scheduler.level(s)
        step = math.inf if s < 0 else math.log(alpha_s * sigma_t / (alpha_t * sigma_s))  # lambda_s - lambda_t
        data = x_0
        if previous is not None and s >= 0:
            data = x_0 + step / (2 * last_step) * (x_0 - previous)
        x = sigma_s / sigma_t * x - alpha_s * math.expm1(-step) * data
        previous, last_step = x_0, step
        yield s, x, x_0


def image_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Callable[[], Tensor]:
    """A source of standard normal noise (len(seeds), *shape); each image has a CPU generator with its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)


@torch.no_grad()
def sample_images(
    model: Denoiser,
    scheduler: DDPMScheduler,
    shape: Sequence[int],
    num_images: int,
    *,
    sampler: str = "dpmpp",
    steps: int = 50,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    labels: Tensor | None = None,
    guidance: Guidance | float = 1.0,
    eps_scale: float = 1.0,
    on_step: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Draw images: (num_images, *shape) in [-1, 1], on the CPU. Image i depends on `seed + i`, not on the batch size.

    shape: (C, H, W). labels: (num_images,) classes or None. guidance, eps_scale: as in `denoiser`. on_step(step, x_0
    (b, C, H, W)) is called after each denoising step of each batch; steps count from 0. Raises ValueError for an
    unknown sampler or a number of steps that `DDPMScheduler.timesteps` refuses.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    timesteps = scheduler.timesteps(steps)
    device = next(model.parameters()).device
    images = []
    for first in range(0, num_images, batch_size):
        last = min(first + batch_size, num_images)
        noise = image_noise(range(seed + first, seed + last), shape, device)
        batch_labels = None if labels is None else labels[first:last].to(device)
        denoise = denoiser(model, scheduler, labels=batch_labels, guidance=guidance, eps_scale=eps_scale)
        x = noise()  # at the last timestep sigma is 1 to four digits
        if sampler == "ddpm":
            trajectory = ddpm(scheduler, denoise, x, timesteps, noise=noise)
        elif sampler == "ddim":
            trajectory = ddim(scheduler, denoise, x, timesteps, eta=eta, noise=noise)
        else:
            trajectory = dpmpp(scheduler, denoise, x, timesteps)
        for step, (_, x, x_0) in enumerate(trajectory):  # noqa: B007 - the last x is the image
            if on_step is not None:
                on_step(step, x_0)
        images.append(x.clamp(-1, 1).cpu())
    return torch.cat(images)
