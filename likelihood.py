"""The variational bound on the likelihood of images, in bits per dimension.

    bound = variational_bound(model, scheduler, to_float(images), labels)
    mean, standard_error = bound.total.mean(), bound.total.std() / len(bound.total) ** 0.5

It is a bound for the model that the `ddpm` sampler draws from when it takes all T steps: x_0 clipped to [-1, 1] before
the posterior mean, and the posterior's own variance. Every term of Ho et al. 2020, eq. 5 is there:

- L_T, how far the last timestep is from pure noise: closed form, no network;
- L_1 to L_{T-1}, a KL divergence for each step. Estimated: the T - 1 steps are cut into contiguous strata, for each
  image one step is drawn uniformly from each stratum, and its KL counts as often as the stratum has steps. That is
  unbiased for every image, and images are independent, so the standard error over images covers both what the images
  and what the drawn steps add. With as many strata as steps nothing is left to the draw but the noise;
- L_0, the decoder of eq. 13: the probability of each pixel's own bin among 256.

All sums are float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import DDPMScheduler, image_noise
from errors import UserError

# One step drawn from each of 16 strata instead of all 399 costs a 24th. The KLs fall a little faster than 1 / t, so
# widths that grow with t make the strata weigh about the same. Measured on 200 CIFAR-10 images and the published model:
# 16, 32 and 64 strata give standard errors within 1 % of each other, since images differ by far more than the draws.
NUM_STRATA = 16


@dataclass(frozen=True)
class VariationalBound:
    """Bits per dimension of N images, each term by itself; what a model is compared by is `total`."""

    prior: Tensor  # (N,) L_T
    kl: Tensor  # (N, K) the KL drawn from each stratum, times its number of steps
    decoder: Tensor  # (N,) L_0
    strata: list[tuple[int, int]]  # the first and last timestep of each of the K strata

    @property
    def total(self) -> Tensor:
        """(N,) an unbiased estimate of each image's bound."""
        return self.prior + self.kl.sum(1) + self.decoder


def timestep_strata(num_timesteps: int, count: int) -> list[tuple[int, int]]:
    """Timesteps 1 to T - 1 in `count` contiguous strata, (first, last) each, their widths growing geometrically.

    There is at least one step in each, so more strata than steps become as many as there are steps.
    """
    count = min(count, num_timesteps - 1)
    edges = [1]
    for i in range(1, count + 1):
        edges.append(max(edges[-1] + 1, round(num_timesteps ** (i / count))))
    return [(first, after - 1) for first, after in pairwise(edges)]


def prior_kl(scheduler: DDPMScheduler, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in nats, summed over an image's values: (N,) float64."""
    alpha, sigma = scheduler.level(scheduler.num_timesteps - 1)
    kl = ((alpha * x_0.double()) ** 2 + sigma**2 - 1) / 2 - math.log(sigma)
    return kl.flatten(1).sum(1)


def kl_weight(scheduler: DDPMScheduler) -> Tensor:
    """What a squared error of x_0 at timestep t costs in nats: (T,) float64; entry 0, the decoder's step, is nan.

    Both Gaussians have the posterior's variance (Ho et al. 2020, eq. 7), so their KL is the squared distance of the
    means over twice that variance, which is (SNR(t - 1) - SNR(t)) / 2 times the squared error of x_0, with
    SNR = alpha^2 / sigma^2 (Kingma et al. 2021, eq. 14).
    """
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return torch.cat([snr.new_full((1,), math.nan), (snr[:-1] - snr[1:]) / 2])


def decoder_std(scheduler: DDPMScheduler) -> float:
    """The decoder's standard deviation.

    The posterior's variance is 0 at the last step; the next step's takes its place, as in DDPM's published code.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scheduler.level(1), scheduler.level(0)
    return math.sqrt(1 - (alpha_t / alpha_s) ** 2) * sigma_s / sigma_t


def decoder_nll(x_0: Tensor, mean: Tensor, std: float) -> Tensor:
    """-log of the probability that N(mean, std^2) gives each value's own bin, in nats, float64, shaped like x_0.

    x_0: values k / 127.5 - 1 of 8-bit levels k. Bins are 2/255 wide; the first and last reach to infinity (Ho et al.
    2020, eq. 13). No floor below the probability: it would make a bad model's bound better than it is.
    """
    x_0, mean = x_0.double(), mean.double()
    low = torch.where(x_0 < -0.999, -torch.inf, (x_0 - 1 / 255 - mean) / std)
    high = torch.where(x_0 > 0.999, torch.inf, (x_0 + 1 / 255 - mean) / std)
    # the difference of two distribution functions, taken in the lower tail, where neither rounds to 1
    mirrored = low > -high
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log(-torch.expm1(log_low - log_high)))


@torch.no_grad()
def variational_bound(
    model: nn.Module,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    labels: Tensor | None = None,
    *,
    num_strata: int = NUM_STRATA,
    seed: int = 0,
    batch_size: int = 128,
    on_batch: Callable[[int], None] | None = None,
) -> VariationalBound:
    """The bound of each image (Ho et al. 2020, eq. 5 and 13), min(num_strata, T - 1) + 1 network calls an image.

    x_0: (N, C, H, W), 8-bit images in [-1, 1] as `image_data.to_float` gives them; labels: (N,), which a model with
    classes is told. Image i's noise follows from seed + i, and its steps do not depend on the model, so that two models
    can be compared image by image. on_batch(calls) is called after each batch of network calls.
    Raises UserError for fewer than 2 images, which have no standard error, and for missing labels.
    """
    if len(x_0) < 2:
        raise UserError(f"the variational bound needs at least 2 images, got {len(x_0)}")
    if model.num_classes and labels is None:
        raise UserError("the variational bound of a model with classes needs the images' labels")
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
        condition = {"labels": labels[part].to(device)} if model.num_classes else {}
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

    bits = 1 / (math.log(2) * x_0[0].numel())  # per nat of a whole image
    return VariationalBound(
        prior=prior_kl(scheduler, x_0) * bits,
        kl=torch.cat(errors) * weight * bits,
        decoder=torch.cat(decoder) * bits,
        strata=strata,
    )
