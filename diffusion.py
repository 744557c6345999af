"""The diffusion process: noise schedules, what the network predicts, the loss, and the samplers.

    scheduler = DDPMScheduler(num_timesteps=400)
    t = scheduler.draw_timesteps(torch.rand(8))
    loss = scheduler.training_loss(model, x_0, t, eps)            # (8,); training minimises the mean
    images = sample_images(model, scheduler, (3, 32, 32), 16)     # (16, 3, 32, 32) in [-1, 1]

Notation of Ho et al. 2020 (DDPM): x_t = alpha_t x_0 + sigma_t eps, with alpha_t^2 = alphas_cumprod[t] and
sigma_t^2 = 1 - alpha_t^2. Timesteps count from 0 (nearly clean) to T - 1 (nearly noise); -1 is the clean image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from choices import GUIDANCE, GUIDED_SHARE, PREDICTION_TYPES, SAMPLERS, SCHEDULES

SIGMA_DATA = 0.5  # the standard deviation of the data that EDM assumes (Karras et al. 2022, table 1)

# (x_t, t, state) -> (x_0, eps, state): what a sampler calls
Denoise = Callable[[Tensor, int, object], tuple[Tensor, Tensor, object]]


class Denoiser(nn.Module):
    """A network that a scheduler can use: model(x, t, state=None, labels=None, return_state=False).

    x: (B, C, H, W), t: (B,), labels: (B,) or None -> F, shaped like x; with `return_state`, (F, state).
    """

    num_classes: int = 0  # 0: unconditional; else label `num_classes` means "no class"

    def draw_steps(self, generator: torch.Generator, *, coarse: bool = False) -> None:
        """Called before each training step, for networks that integrate an ODE; coarse: with half of its steps."""


def carries_state(model: Denoiser) -> bool:
    """Whether the model starts each denoising step from the state in which the step before it ended."""
    return getattr(model, "carries_state", False)


def linear_betas(num_timesteps: int) -> Tensor:
    """Ho et al. 2020, section 4: 1e-4 to 0.02 at T = 1000, scaled by 1000 / T so that every T ends in noise."""
    scale = 1000 / num_timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(num_timesteps: int) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, with their s = 0.008 and no beta above 0.999."""
    time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


class DDPMScheduler:
    """The forward process q(x_t | x_0) and the meaning of a network's output F. All tables are float64.

    F predicts `p_t x_0 + q_t eps`, where the prediction type decides p and q:

    - `eps`: p = 0, q = 1 (Ho et al. 2020, eq. 14).
    - `v`: p = -sigma, q = alpha (Salimans & Ho 2022, section 4).
    - `edm`: the preconditioning of Karras et al. 2022, eq. 7 and table 1, rewritten for the variance-preserving
      process: with s^2 = sigma^2 + alpha^2 sigma_data^2, the network sees x_t / s, which has unit variance, and
      p = sigma / (s sigma_data), q = -alpha sigma_data / s, so that F has unit variance at every t, too.

    Together with x_t = alpha x_0 + sigma eps this is a 2x2 system, which `predict` solves.

    Raises ValueError for fewer than 2 timesteps, an unknown schedule or an unknown prediction type.
    """

    def __init__(self, num_timesteps: int = 400, schedule: str = "linear", prediction_type: str = "edm"):
        if num_timesteps < 2:
            raise ValueError(f"timesteps: must be at least 2, got {num_timesteps}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction type: must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        self.num_timesteps = num_timesteps
        self.schedule = schedule
        self.prediction_type = prediction_type
        betas = linear_betas(num_timesteps) if schedule == "linear" else cosine_betas(num_timesteps)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # (T,)
        self.alpha = self.alphas_cumprod.sqrt()
        self.sigma = (1 - self.alphas_cumprod).sqrt()
        # Training importance-samples t in proportion to the gradient's norm, which gives the mean gradient the least
        # variance, and draws nearly clean images more often still. It is the best of ten densities (LOG.md).
        density = self.alpha.sqrt() / (0.1 + self.sigma)
        self.density = density / density.mean()
        self.cumulative = (density / density.sum()).cumsum(0)
        self.input_scale = torch.ones_like(self.alpha)
        if prediction_type == "eps":
            self.p, self.q = torch.zeros_like(self.alpha), torch.ones_like(self.alpha)
        elif prediction_type == "v":
            self.p, self.q = -self.sigma, self.alpha
        else:
            s = (self.sigma**2 + (self.alpha * SIGMA_DATA) ** 2).sqrt()
            self.p, self.q = self.sigma / (s * SIGMA_DATA), -self.alpha * SIGMA_DATA / s
            self.input_scale = 1 / s
        self._tables: dict[tuple, Tensor] = {}  # copies that never move, since CUDA graphs read them in place

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = name, device, dtype
        if key not in self._tables:
            self._tables[key] = getattr(self, name).to(dtype).to(device)
        return self._tables[key]

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The table `name` at timesteps t (B,), in the dtype of `like` (B, C, H, W): (B, 1, 1, 1)."""
        return self._table(name, like.device, like.dtype)[t].view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t for x_0 and eps of shape (B, C, H, W) and t of shape (B,) (Ho et al. 2020, eq. 4)."""
        return self.at("alpha", t, x_0) * x_0 + self.at("sigma", t, x_0) * eps

    def network_output(self, model: Denoiser, x_t: Tensor, t: Tensor, **condition) -> Tensor:
        """F of shape (B, C, H, W), in the dtype of x_t even if autocast changed it inside the network."""
        return model(self.at("input_scale", t, x_t) * x_t, t, **condition).to(x_t.dtype)

    def network_step(self, model: Denoiser, x_t: Tensor, t: Tensor, state: object, **condition):
        """(F, the state for the next, cleaner step); a model that carries no state ignores it and returns None."""
        if not carries_state(model):
            return self.network_output(model, x_t, t, **condition), None
        output, state = model(self.at("input_scale", t, x_t) * x_t, t, state, return_state=True, **condition)
        return output.to(x_t.dtype), state

    @torch.no_grad()
    def remember(self, model: Denoiser, x_t: Tensor, t: Tensor, noise: Tensor, **condition) -> object:
        """The state in which a sampler of 50 steps would arrive at x_t (B, C, H, W), to train or measure one step.

        noise: (K, B, C, H, W), standard normal, for K noisier images of the same trajectory. The model sees these one
        by one, the noisiest first. Each comes from the forward kernel q(x_s | x_t), s > t, with fresh noise: from two
        noisings of one x_0 with the same eps the network could solve for x_0.
        """
        stride = max(1, self.num_timesteps // 50)
        images, times = [x_t], [t]
        for fresh in noise:
            s = (times[-1] + stride).clamp(max=self.num_timesteps - 1)
            ratio = self.at("alpha", s, x_t) / self.at("alpha", times[-1], x_t)
            images.append(ratio * images[-1] + (1 - ratio**2).sqrt() * fresh)
            times.append(s)
        state = None
        for x_s, s in zip(images[:0:-1], times[:0:-1], strict=True):
            _, state = self.network_step(model, x_s, s, state, **condition)
        return state

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps), each (B, C, H, W), from the network's output F at x_t."""
        alpha, sigma = self.at("alpha", t, x_t), self.at("sigma", t, x_t)
        p, q = self.at("p", t, x_t), self.at("q", t, x_t)
        determinant = alpha * q - sigma * p
        return (q * x_t - sigma * output) / determinant, (alpha * output - p * x_t) / determinant

    def loss(self, model: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor, **condition) -> Tensor:
        """Squared error of the predicted eps, averaged over an image's values: (B,) (Ho et al. 2020, eq. 14).

        It is the same for every prediction type, which changes what is easy to learn and not what is measured.
        """
        x_t = self.add_noise(x_0, t, eps)
        _, predicted = self.predict(self.network_output(model, x_t, t, **condition), x_t, t)
        return (predicted - eps).square().flatten(1).mean(1)

    def draw_timesteps(self, uniform: Tensor) -> Tensor:
        """Timesteps (B,) to train on, from uniform numbers (B,) in [0, 1); t has probability `density[t] / T`."""
        t = torch.searchsorted(self._table("cumulative", uniform.device, uniform.dtype), uniform, right=True)
        return t.clamp(max=self.num_timesteps - 1)

    def training_loss(self, model: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor, **condition) -> Tensor:
        """The loss (B,) at timesteps drawn by `draw_timesteps`; its expectation is the mean of `loss` over all t.

        It is L_t / (T p_t), the importance sampling of Nichol & Dhariwal 2021, eq. 18.
        """
        loss = self.loss(model, x_0, t, eps, **condition)
        return loss / self.at("density", t, loss)

    def level(self, t: int) -> tuple[float, float]:
        """(alpha_t, sigma_t) of one timestep, in double precision; (1, 0) for t = -1, the clean image."""
        return (1.0, 0.0) if t < 0 else (self.alpha[t].item(), self.sigma[t].item())

    def timesteps(self, num_steps: int) -> list[int]:
        """num_steps + 1 timesteps, evenly spaced from T - 1 down to -1.

        Raises ValueError unless 1 <= num_steps <= T.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"steps: must be from 1 to the model's {self.num_timesteps} timesteps, got {num_steps}")
        return [round(self.num_timesteps * (1 - i / num_steps)) - 1 for i in range(num_steps + 1)]


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
            x_0 = (x - sigma * eps) / alpha
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
