"""The variational bound against Gaussian data, where every term and the model's own likelihood have a closed form."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from diffusion.scheduler import DDPMScheduler
from lab.evaluation.likelihood import decoder_nll, decoder_std, timestep_strata, variational_bound

T, S = 50, 0.2  # timesteps, and the standard deviation of the data


class Linear(nn.Module):
    """E[eps | x_t] for values that are independently N(0, s^2): the exact denoiser of such data, in closed form."""

    num_classes = 0

    def __init__(self, scheduler: DDPMScheduler, s: float):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s, dtype=torch.float64))
        self.scheduler = scheduler

    def forward(self, x, t, state=None):
        alpha, sigma = self.scheduler.at("alpha", t, x), self.scheduler.at("sigma", t, x)
        return sigma / (alpha**2 * self.s**2 + sigma**2) * x


def levels(timesteps: int = T) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma of the linear schedule, from the paper's numbers."""
    betas = np.linspace(1e-4, 0.02, timesteps) * 1000 / timesteps
    alphas_cumprod = np.cumprod(1 - betas)
    return np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)


def posterior(t: int, timesteps: int = T) -> tuple[float, float, float]:
    """(a, b, variance) of q(x_s | x_t, x_0) = N(a x_0 + b x_t, variance), s = t - 1, by conditioning the joint."""
    alpha, sigma = levels(timesteps)
    covariance = alpha[t] / alpha[t - 1] * sigma[t - 1] ** 2  # of x_s and x_t, given x_0
    b = covariance / sigma[t] ** 2
    return alpha[t - 1] - b * alpha[t], b, sigma[t - 1] ** 2 - b * covariance


def gain(t: int, s: float, timesteps: int = T) -> float:
    """E[x_0 | x_t] = gain x_t for data N(0, s^2)."""
    alpha, sigma = levels(timesteps)
    return alpha[t] * s**2 / (alpha[t] ** 2 * s**2 + sigma[t] ** 2)


def error(t: int) -> float:
    """Var(x_0 | x_t): the mean squared error of the exact denoiser."""
    alpha, sigma = levels()
    return S**2 * sigma[t] ** 2 / (alpha[t] ** 2 * S**2 + sigma[t] ** 2)


def analytic_terms() -> tuple[float, float, float]:
    """(prior, KLs, decoder) in bits a value, expected over N(0, S^2) data."""
    alpha, sigma = levels()
    prior = stats.norm.entropy(scale=sigma[-1])  # KL(q || p) = cross-entropy - entropy
    prior = (math.log(2 * math.pi) + alpha[-1] ** 2 * S**2 + sigma[-1] ** 2) / 2 - prior
    kl = sum(a**2 * error(t) / (2 * variance) for t in range(1, T) for a, _, variance in [posterior(t)])
    std = math.sqrt(posterior(1)[2])

    def integrand(u: float) -> float:  # x_0 less the decoder's mean is N(0, error(0))
        chance = stats.norm.cdf((u + 1 / 255) / std) - stats.norm.cdf((u - 1 / 255) / std)
        return -math.log(chance) * stats.norm.pdf(u, scale=math.sqrt(error(0)))

    reach = 7 * math.sqrt(error(0))
    return prior / math.log(2), kl / math.log(2), integrate.quad(integrand, -reach, reach)[0] / math.log(2)


def gaussian_images(count: int, seed: int = 0) -> torch.Tensor:
    return S * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler(T, "linear", "eps")


def close(values: torch.Tensor, truth: float) -> bool:
    """The mean is within four standard errors of the truth."""
    return abs(values.mean().item() - truth) < 4 * values.std().item() / len(values) ** 0.5


@pytest.mark.parametrize("num_strata", [5, T - 1])
def test_gaussian_data_with_the_exact_denoiser_gives_the_analytic_bound(num_strata, scheduler):
    bound = variational_bound(Linear(scheduler, S), scheduler, gaussian_images(4000), num_strata=num_strata)
    prior, kl, decoder = analytic_terms()
    assert close(bound.prior, prior) and close(bound.kl.sum(1), kl) and close(bound.decoder, decoder)
    assert close(bound.total, prior + kl + decoder)
    # the prior is 2e-7 bits here, too little to be missed above
    assert torch.allclose(bound.total - bound.kl.sum(1) - bound.decoder, bound.prior, rtol=1e-3, atol=0)
    # and the check is sharp: a tenth of a bit would be seen
    assert 4 * bound.total.std().item() / 4000**0.5 < 0.1 < min(kl, decoder)


def test_every_single_kl_is_the_analytic_one(scheduler):
    bound = variational_bound(Linear(scheduler, S), scheduler, gaussian_images(4000), num_strata=T)
    assert bound.strata == [(t, t) for t in range(1, T)]
    for (t, _), values in zip(bound.strata, bound.kl.T, strict=True):
        a, _, variance = posterior(t)
        truth = a**2 * error(t) / (2 * variance) / math.log(2)
        assert values.mean().item() == pytest.approx(truth, rel=0.03)  # 64,000 squares: 3 % is five deviations


def exact_nll(x_0: torch.Tensor, s: float, timesteps: int) -> torch.Tensor:
    """-log2 of what the model of denoiser Linear(s) gives 8-bit images, a value: (N,), and no bound.

    Of a linear denoiser the whole reverse chain is linear and Gaussian; its variance is carried down from x_{T-1}.
    """
    variance = 1.0
    for t in range(timesteps - 1, 0, -1):
        a, b, noise = posterior(t, timesteps)
        variance = (a * gain(t, s, timesteps) + b) ** 2 * variance + noise
    std = math.sqrt(gain(0, s, timesteps) ** 2 * variance + posterior(1, timesteps)[2])
    size = x_0.abs().numpy()  # in the upper tail, where sf does not round to 1
    beyond = np.where(size > 0.999, 0, stats.norm.sf((size + 1 / 255) / std))
    return -torch.from_numpy(np.log2(stats.norm.sf((size - 1 / 255) / std) - beyond)).flatten(1).mean(1)


@pytest.mark.parametrize("s, timesteps, widest", [(S, T, 2), (0.1, T, 2), (0.4, T, 3), (S, 2000, 0.8)])
def test_the_bound_lies_above_the_exact_likelihood_of_the_same_model(s, timesteps, widest):
    """And comes down towards it as the steps grow finer."""
    scheduler = DDPMScheduler(timesteps, "linear", "eps")
    x_0 = ((gaussian_images(2000).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    gap = variational_bound(Linear(scheduler, s), scheduler, x_0).total - exact_nll(x_0, s, timesteps)
    assert 4 * gap.std() / len(gap) ** 0.5 < gap.mean() < widest


def test_a_worse_denoiser_has_a_higher_bound(scheduler):
    x_0 = gaussian_images(500)
    bounds = [variational_bound(Linear(scheduler, s), scheduler, x_0).total.mean() for s in (S, 0.14, 0.1)]
    assert bounds == sorted(bounds)


def test_the_standard_error_is_the_spread_of_repetitions(scheduler):
    """Images of unequal contrast and few strata, so that images and drawn steps both add to the spread."""
    model, means, errors = Linear(scheduler, S), [], []
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        contrast = torch.rand(30, 1, 1, 1, generator=random, dtype=torch.float64) * 1.5
        x_0 = contrast * gaussian_images(30, seed)
        total = variational_bound(model, scheduler, x_0, num_strata=2, seed=1000 * seed).total
        means.append(total.mean().item())
        errors.append(total.std().item() / 30**0.5)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.2)  # 200 repetitions: 5 % is one deviation


def test_predictions_are_clipped_to_the_range_of_images_as_the_sampler_does(scheduler):
    """With images that are all white, a denoiser that overshoots is exact: no error is left."""

    class Overshoots(Linear):
        def forward(self, x, t, state=None):
            alpha, sigma = self.scheduler.at("alpha", t, x), self.scheduler.at("sigma", t, x)
            return (x - alpha * 1.5) / sigma  # x_0 = 1.5

    bound = variational_bound(Overshoots(scheduler, S), scheduler, torch.ones(4, 1, 4, 4, dtype=torch.float64))
    assert bound.kl.abs().max() == 0
    chance = stats.norm.sf(-1 / 255, scale=math.sqrt(posterior(1)[2]))
    assert bound.decoder.numpy() == pytest.approx(-math.log2(chance))


@pytest.mark.parametrize("prediction_type, dtype", [("v", torch.float32), ("edm", torch.float64)])
def test_the_bound_is_that_of_the_model_whatever_its_prediction_type_and_precision(prediction_type, dtype, scheduler):
    other = DDPMScheduler(T, "linear", prediction_type)

    class Converted(Linear):
        def forward(self, x, t, state=None):
            x_t = x / self.scheduler.at("input_scale", t, x)
            alpha, sigma = self.scheduler.at("alpha", t, x), self.scheduler.at("sigma", t, x)
            eps = super().forward(x_t, t)
            return self.scheduler.at("p", t, x) * (x_t - sigma * eps) / alpha + self.scheduler.at("q", t, x) * eps

    x_0 = gaussian_images(20)
    expected = variational_bound(Linear(scheduler, S), scheduler, x_0)
    found = variational_bound(Converted(other, S), other, x_0.to(dtype))
    assert found.total.dtype == torch.float64
    assert torch.allclose(found.total, expected.total, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_an_image_has_its_own_noise_whatever_the_batch_and_the_number_of_images(scheduler):
    model, x_0, calls = Linear(scheduler, S), gaussian_images(23), []
    whole = variational_bound(model, scheduler, x_0, num_strata=4)
    parts = variational_bound(model, scheduler, x_0, num_strata=4, batch_size=5, on_batch=calls.append)
    few = variational_bound(model, scheduler, x_0[:7], num_strata=4)
    assert torch.allclose(whole.kl, parts.kl) and torch.allclose(whole.decoder, parts.decoder)
    assert torch.allclose(whole.total[:7], few.total)
    assert sum(calls) == 23 * 5
    other = variational_bound(model, scheduler, x_0, num_strata=4, seed=100)
    assert (other.kl - whole.kl).abs().min() > 0


def test_strata_cover_every_step_once():
    for timesteps in (2, 3, 8, 50, 400, 1000):
        for count in (1, 2, 5, 16, 400, 5000):
            strata = timestep_strata(timesteps, count)
            assert [t for first, last in strata for t in range(first, last + 1)] == list(range(1, timesteps))
            assert len(strata) == min(count, timesteps - 1)


@pytest.mark.parametrize("std", [0.002, 0.0122, 0.3])
@pytest.mark.parametrize("mean", [-1.0, -0.37, 0.0, 0.9995])
def test_the_decoder_is_the_gaussian_of_each_bin_and_sums_to_one(mean, std):
    x_0 = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float()  # as images come
    nll = decoder_nll(x_0, torch.full((256,), mean, dtype=torch.float64), std)
    assert nll.dtype == torch.float64
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-4)  # float32 levels move the edges by 1e-8
    middles = np.arange(1, 255) / 127.5 - 1
    chance = stats.norm.cdf(middles + 1 / 255, mean, std) - stats.norm.cdf(middles - 1 / 255, mean, std)
    likely = chance > 1e-6
    assert np.allclose(np.exp(-nll.numpy()[1:255][likely]), chance[likely], rtol=1e-3)
    assert nll[0].item() == pytest.approx(-stats.norm.logcdf(-1 + 1 / 255, mean, std), rel=1e-4)
    assert nll[255].item() == pytest.approx(-stats.norm.logsf(1 - 1 / 255, mean, std), rel=1e-4)


@pytest.mark.parametrize("level", [40, 215])
def test_an_unlikely_bin_costs_what_it_should_in_either_tail(level):
    """67 deviations off: any floor below the probability, or a difference of values that round to 1, would show."""
    x_0, std = torch.tensor([level / 127.5 - 1], dtype=torch.float64), 0.01
    near, far = (abs(x_0.item()) - 1 / 255) / std, (abs(x_0.item()) + 1 / 255) / std
    mass, _ = integrate.quad(lambda z: math.exp((near**2 - z**2) / 2), near, far)
    truth = near**2 / 2 + math.log(2 * math.pi) / 2 - math.log(mass)
    assert decoder_nll(x_0, torch.zeros(1), std).item() == pytest.approx(truth, rel=1e-9)


def test_the_decoder_has_the_posterior_variance_of_the_step_before(scheduler):
    assert decoder_std(scheduler) == pytest.approx(math.sqrt(posterior(1)[2]))


def test_a_class_is_told_to_a_model_that_has_classes(scheduler):
    class Conditional(Linear):
        num_classes = 2

        def forward(self, x, t, state=None, labels=None):
            return super().forward(x, t) * (1 + labels.view(-1, 1, 1, 1))

    model, x_0 = Conditional(scheduler, S), gaussian_images(6)
    plain = variational_bound(Linear(scheduler, S), scheduler, x_0).total
    labels = torch.tensor([0, 1, 0, 0, 1, 0])
    told = variational_bound(model, scheduler, x_0, labels, batch_size=4).total
    assert torch.allclose(told[labels == 0], plain[labels == 0])
    assert (told[labels == 1] > plain[labels == 1] + 0.1).all()
    with pytest.raises(ValueError, match="labels"):
        variational_bound(model, scheduler, x_0)
    with pytest.raises(ValueError, match="at least 2"):
        variational_bound(model, scheduler, x_0[:1], labels[:1])
