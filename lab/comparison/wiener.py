"""The best linear denoiser, in closed form: a network must beat it to have learned more than the covariance."""

import torch
from torch import Tensor, nn

from diffusion.scheduler import DDPMScheduler, Denoiser
from images.batches import to_float
from images.datasets import ImageData


class WienerDenoiser(Denoiser):
    """The exact denoiser of Gaussian data x_0 ~ N(mean, covariance) (Wiener 1949), which is the best linear denoiser.

    With covariance = V diag(s) V^T,
    E[eps | x_t] = V diag(sigma_t / (alpha_t^2 s + sigma_t^2)) V^T (x_t - alpha_t mean).
    It predicts eps, so it needs a scheduler of that prediction type. Nothing in it is trained.

    forward(x_t (B, C, H, W), t (B,)) -> eps (B, C, H, W).
    """

    num_classes = 0

    def __init__(self, mean: Tensor, covariance: Tensor, scheduler: DDPMScheduler):
        """mean: (D,), covariance: (D, D), both of x_0 in [-1, 1], D = C * H * W, in double precision."""
        super().__init__()
        variances, basis = torch.linalg.eigh(covariance)
        self.mean = nn.Buffer(mean)
        self.variances = nn.Buffer(variances.clamp(min=0))
        self.basis = nn.Buffer(basis)
        self.alpha, self.sigma = nn.Buffer(scheduler.alpha), nn.Buffer(scheduler.sigma)
        self.unused = nn.Parameter(torch.zeros(()), requires_grad=False)  # callers read the device from it

    def forward(self, x_t: Tensor, t: Tensor, state: None = None) -> Tensor:
        alpha, sigma = self.alpha[t, None], self.sigma[t, None]
        centred = (x_t.flatten(1).to(self.basis.dtype) - alpha * self.mean) @ self.basis
        eps = (sigma / (alpha**2 * self.variances + sigma**2) * centred) @ self.basis.T
        return eps.view_as(x_t).to(x_t.dtype)


def fit_wiener(data: ImageData, schedule: DDPMScheduler, chunk: int = 5000) -> tuple[WienerDenoiser, DDPMScheduler]:
    """(denoiser, its scheduler), from mean and covariance of the training images and, if used, their mirror images."""
    size = data.train[0].numel()
    total, square, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64), 0
    for images in data.train.cpu().split(chunk):
        x_0 = to_float(images)
        for flat in [x_0.flatten(1).double()] + ([x_0.flip(3).flatten(1).double()] if data.mirror else []):
            total += flat.sum(0)
            square.addmm_(flat.T, flat)
            count += len(flat)
    mean = total / count
    covariance = square / count - torch.outer(mean, mean)
    scheduler = DDPMScheduler(schedule.num_timesteps, schedule.schedule, "eps")
    return WienerDenoiser(mean, covariance, scheduler), scheduler
