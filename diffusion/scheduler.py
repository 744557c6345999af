"""The diffusion process: noise schedules, what the network predicts, and the loss.

    scheduler = DDPMScheduler(num_timesteps=400)
    t = scheduler.draw_timesteps(torch.rand(8))
    loss = scheduler.training_loss(model, x_0, t, eps)            # (8,); training minimises the mean

Notation of Ho et al. 2020 (DDPM): x_t = alpha_t x_0 + sigma_t eps, with alpha_t^2 = alphas_cumprod[t] and
sigma_t^2 = 1 - alpha_t^2. Timesteps count from 0 (nearly clean) to T - 1 (nearly noise); -1 is the clean image.
"""

import math

import torch
from torch import Tensor, nn

from choices import PREDICTION_TYPES, SCHEDULES

SIGMA_DATA = 0.5  # the standard deviation of the data that EDM assumes (Karras et al. 2022, table 1)


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
