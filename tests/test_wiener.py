"""The closed-form denoiser against least squares and against Gaussian data, whose best denoiser it is."""

import numpy as np
import pytest
import torch

from diffusion.scheduler import DDPMScheduler
from images.batches import held_out_bank, to_float
from images.datasets import ImageData, load_images
from lab.comparison.wiener import WienerDenoiser, fit_wiener
from training.validation import held_out_loss


def test_for_gaussian_data_it_is_the_conditional_mean():
    """E[eps | x_t] by the formula for jointly Gaussian vectors, from their covariance."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(12, 12)) / 4
    mean, covariance = random.normal(size=12) / 3, mix @ mix.T
    scheduler = DDPMScheduler(50, "cosine", "eps")
    model = WienerDenoiser(torch.from_numpy(mean), torch.from_numpy(covariance), scheduler)
    x_t = random.normal(size=(3, 12))
    times = [0, 20, 49]
    eps = model(torch.from_numpy(x_t).view(3, 3, 2, 2), torch.tensor(times)).flatten(1)
    for i, t in enumerate(times):
        alpha, sigma = scheduler.level(t)
        of_x_t = alpha**2 * covariance + sigma**2 * np.eye(12)
        expected = sigma * np.linalg.solve(of_x_t, x_t[i] - alpha * mean)  # cov(eps, x_t) = sigma I
        assert eps[i].numpy() == pytest.approx(expected, abs=1e-8)


def test_no_linear_map_that_least_squares_finds_is_better():
    data = load_images("digits", "unused")
    model, scheduler = fit_wiener(data, DDPMScheduler(10, "linear", "edm"))
    assert scheduler.prediction_type == "eps"
    x_0 = to_float(data.train).double().repeat(20, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    for t in (0, 4, 9):
        eps = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
        times = torch.full((len(x_0),), t)
        x_t = scheduler.add_noise(x_0, times, eps)
        inputs = torch.cat([x_t.flatten(1), torch.ones(len(x_t), 1, dtype=torch.float64)], dim=1)
        fitted = inputs @ torch.linalg.lstsq(inputs, eps.flatten(1)).solution
        best = (fitted - eps.flatten(1)).square().mean()
        ours = (model(x_t, times) - eps).square().mean()
        assert best <= ours < 1.01 * best  # least squares fits this very noise


def test_mirror_images_count_and_it_is_measured_as_any_model():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 1, 4, 4), generator=random, dtype=torch.uint8)
    labels = torch.zeros(40, dtype=torch.long)
    data = ImageData("x", images, labels, images[:5], labels[:5], ("a",), mirror=True)
    both = ImageData("x", torch.cat([images, images.flip(3)]), labels, images[:5], labels[:5], ("a",), mirror=False)
    scheduler = DDPMScheduler(10)
    bank = held_out_bank(data, 10)
    first, second = (held_out_loss(*fit_wiener(d, scheduler, chunk=7), bank) for d in (data, both))
    assert first == pytest.approx(second, rel=1e-6)
    assert first < held_out_loss(*fit_wiener(load_square(), scheduler), bank)


def load_square() -> ImageData:
    """Images of another kind: one value throughout."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 4, 4).contiguous()
    labels = torch.zeros(40, dtype=torch.long)
    return ImageData("x", images, labels, images[:5], labels[:5], ("a",), mirror=False)
