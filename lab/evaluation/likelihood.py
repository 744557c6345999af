"""The variational bound on the likelihood of images, in bits per dimension.

    bound = variational_bound(model, scheduler, to_float(images), labels)
    mean, standard_error = bound.total.mean(), bound.total.std() / len(bound.total) ** 0.5

It is the bound of the model that the `ddpm` sampler samples from with all T steps: x_0 is clipped to [-1, 1] before the
posterior mean is computed, and the variance is the posterior's own. It has every term of Ho et al. 2020, eq. 5:

- L_T, the distance of the last timestep from pure noise, in closed form and without the network;
- L_1 to L_{T-1}, one KL divergence per step, which are estimated: the T - 1 steps are divided into contiguous strata,
  one step per stratum is drawn uniformly for each image, and its KL is multiplied by the number of steps in the
  stratum. This is unbiased for every image. The images are independent, so the standard error over images covers the
  variance of the images and that of the drawn steps. If there are as many strata as steps, only the noise is random;
- L_0, the decoder of eq. 13: the probability of each value's own bin among 256.

All sums are float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diffusion.sampling import image_noise
from diffusion.scheduler import DDPMScheduler, Denoiser

# One step from each of 16 strata costs a 24th of all 399 steps. The KLs fall a little faster than 1 / t, so strata that
# get wider with t contribute about equally. On 200 CIFAR-10 images and the published model, the standard errors with
# 16, 32 and 64 strata differ by less than 1 %, since images differ by far more than the drawn steps do.
NUM_STRATA = 16


@dataclass(frozen=True)
class VariationalBound:
    """Bits per dimension of N images, term by term; `total` is the figure by which models are compared."""

    prior: Tensor  # (N,) L_T
    kl: Tensor  # (N, K) the KL of the step drawn from each stratum, times the stratum's number of steps
    decoder: Tensor  # (N,) L_0
    strata: list[tuple[int, int]]  # the first and last timestep of each of the K strata

    @property
    def total(self) -> Tensor:
        """(N,) an unbiased estimate of each image's bound."""
        return self.prior + self.kl.sum(1) + self.decoder


def timestep_strata(num_timesteps: int, count: int) -> list[tuple[int, int]]:
    """Timesteps 1 to T - 1 in `count` contiguous strata (first, last), whose widths grow geometrically.

    Each stratum has at least one step, so `count` is reduced to the number of steps if it is larger.
    """
    count = min(count, num_timesteps - 1)
    edges = [1]
    for i in range(1, count + 1):
        edges.append(max(edges[-1] + 1, round(num_timesteps ** (i / count))))
    return [(first, after - 1) for first, after in pairwise(edges)]


def prior_kl(scheduler: DDPMScheduler, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in nats, summed over the values of each image: (N,) float64."""
    alpha, sigma = scheduler.level(scheduler.num_timesteps - 1)
    kl = ((alpha * x_0.double()) ** 2 + sigma**2 - 1) / 2 - math.log(sigma)
    return kl.flatten(1).sum(1)


def kl_weight(scheduler: DDPMScheduler) -> Tensor:
    """The factor from the squared error of x_0 at timestep t to the KL in nats: (T,) float64; entry 0 is nan.

    Both Gaussians have the variance of the posterior (Ho et al. 2020, eq. 7), so their KL is the squared distance of
    their means divided by twice that variance. This equals (SNR(t - 1) - SNR(t)) / 2 times the squared error of x_0,
    with SNR = alpha^2 / sigma^2 (Kingma et al. 2021, eq. 14). Timestep 0 belongs to the decoder.
    """
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return torch.cat([snr.new_full((1,), math.nan), (snr[:-1] - snr[1:]) / 2])


def decoder_std(scheduler: DDPMScheduler) -> float:
    """The decoder's standard deviation.

    The variance of the posterior is 0 at t = 0; that at t = 1 is used instead, as in DDPM's published code.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scheduler.level(1), scheduler.level(0)
    return math.sqrt(1 - (alpha_t / alpha_s) ** 2) * sigma_s / sigma_t


def decoder_nll(x_0: Tensor, mean: Tensor, std: float) -> Tensor:
    """-log of the probability that N(mean, std^2) gives each value's own bin, in nats: float64, shaped like x_0.

    x_0: values k / 127.5 - 1 of 8-bit levels k. Bins are 2/255 wide; the first and last extend to infinity (Ho et al.
    2020, eq. 13). The probability has no lower limit, which would make the bound of a bad model look better than it is.
    """
    x_0, mean = x_0.double(), mean.double()
    low = torch.where(x_0 < -0.999, -torch.inf, (x_0 - 1 / 255 - mean) / std)
    high = torch.where(x_0 > 0.999, torch.inf, (x_0 + 1 / 255 - mean) / std)
    # take the difference of the two distribution functions in the lower tail, where neither rounds to 1
    mirrored = low > -high
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log(-torch.expm1(log_low - log_high)))


@torch.no_grad()
def variational_bound(
    model: Denoiser,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    labels: Tensor | None = None,
    *,
    num_strata: int = NUM_STRATA,
    seed: int = 0,
    batch_size: int = 128,
    on_batch: Callable[[int], object] | None = None,
) -> VariationalBound:
    """The bound of each image (Ho et al. 2020, eq. 5 and 13), by min(num_strata, T - 1) + 1 network calls per image.

    x_0: (N, C, H, W), 8-bit images in [-1, 1] as `images.batches.to_float` returns them. labels: (N,), for a model with
    classes. The noise of image i depends on seed + i, and its steps do not depend on the model, so that two models can
    be compared image by image. on_batch(calls) is called after each batch of network calls.
    Raises ValueError for fewer than 2 images, which have no standard error, and for missing labels.
    """
    if len(x_0) < 2:
        raise ValueError(f"the variational bound needs at least 2 images, got {len(x_0)}")
    if model.num_classes and labels is None:
        raise ValueError("the variational bound of a model with classes needs the images' labels")
    device = next(model.parameters()).device
    strata = timestep_strata(scheduler.num_timesteps, num_strata)
    first, last = torch.tensor(strata).T  # (K,) each
    where = torch.from_numpy(np.random.default_rng([seed, 1]).random((len(x_0), len(strata))))
    steps = first + (where * (last - first + 1)).long()  # (N, K)
    weight = kl_weight(scheduler)[steps] * (last - first + 1)
    std = decoder_std(scheduler)

    decoder, errors = [], []
    for start in range(0, len(x_0), batch_size):
        part = slice(start, start + batch_size)
        clean = x_0[part].to(device)
        condition = {"labels": labels[part].to(device)} if model.num_classes and labels is not None else {}
        noise = image_noise(range(seed + start, seed + start + len(clean)), clean.shape[1:], device)
        predictions = []
        for t in (torch.zeros(len(clean), dtype=torch.long), *steps[part].T):
            eps = noise().to(clean.dtype)
            x_t = scheduler.add_noise(clean, t.to(device), eps)
            output = scheduler.network_output(model, x_t, t.to(device), **condition)
            predictions.append(scheduler.predict(output, x_t, t.to(device))[0].clamp(-1, 1).cpu())
            if on_batch is not None:
                on_batch(len(clean))
        clean = clean.cpu().double()
        decoder.append(decoder_nll(clean, predictions[0], std).flatten(1).sum(1))
        squares = [(clean - prediction).square().flatten(1).sum(1) for prediction in predictions[1:]]
        errors.append(torch.stack(squares, dim=1))  # (b, K)

    bits = 1 / (math.log(2) * x_0[0].numel())  # bits/dim per nat of a whole image
    return VariationalBound(
        prior=prior_kl(scheduler, x_0) * bits,
        kl=torch.cat(errors) * weight * bits,
        decoder=torch.cat(decoder) * bits,
        strata=strata,
    )
