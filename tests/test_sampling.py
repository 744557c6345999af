"""The samplers against diffusers' formulas in float64 and exact solutions on Gaussian data; guidance by hand."""

import itertools
import math

import pytest
import torch
from denoising import Recorded, diffusers_scheduler
from diffusers import DDIMScheduler
from diffusers import DDPMScheduler as DiffusersDDPMScheduler

from choices import GUIDANCE
from diffusion.sampling import ByNoise, Guidance, ddim, ddpm, denoiser, dpmpp, image_noise, sample_images
from diffusion.scheduler import DDPMScheduler, Denoiser

MEAN, STD = 0.3, 0.4  # of the Gaussian data


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_step_is_diffusers_at_every_t(schedule, clip, values, monkeypatch):
    ours = DDPMScheduler(400, schedule, "eps")
    theirs = diffusers_scheduler(DiffusersDDPMScheduler, ours, clip=clip)
    theirs.set_timesteps(400)
    x, eps, z = values
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: z)
    denoise = denoiser(Recorded(eps), ours, clip=clip)
    for t in range(400):
        ((_, x_s, x_0),) = ddpm(ours, denoise, x, [t, t - 1], noise=lambda: z)
        expected = theirs.step(eps, t, x)
        tolerance = 1e-6 * max(1, expected.prev_sample.abs().max())
        assert (x_s - expected.prev_sample).abs().max() < tolerance
        assert (x_0 - expected.pred_original_sample).abs().max() < 1e-6 * max(1, x_0.abs().max())


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_step_is_diffusers_at_every_t(schedule, eta, clip, values):
    ours = DDPMScheduler(400, schedule, "eps")
    theirs = diffusers_scheduler(DDIMScheduler, ours, clip=clip)
    theirs.set_timesteps(100)  # strides of 4
    x, eps, z = values
    denoise = denoiser(Recorded(eps), ours, clip=clip)
    for t in range(400):
        ((_, x_s, _),) = ddim(ours, denoise, x, [t, max(t - 4, -1)], eta=eta, noise=lambda: z)
        expected = theirs.step(eps, t, x, eta=eta, use_clipped_model_output=clip, variance_noise=z).prev_sample
        assert (x_s - expected).abs().max() < 1e-6 * max(1, expected.abs().max())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_with_eta_1_and_all_steps_is_ddpm(schedule, values):
    scheduler = DDPMScheduler(400, schedule, "edm")
    x, output, z = values
    denoise = denoiser(Recorded(output), scheduler)
    steps = scheduler.timesteps(400)
    pairs = zip(
        ddpm(scheduler, denoise, x, steps, noise=lambda: z),
        ddim(scheduler, denoise, x, steps, eta=1.0, noise=lambda: z),
        strict=True,
    )
    for (_, a, _), (_, b, _) in pairs:
        assert (a - b).abs().max() < 1e-9


def exact(scheduler: DDPMScheduler):
    """The best denoiser for data ~ N(MEAN, STD^2): x_0 is the posterior mean."""

    def denoise(x, t, state):
        alpha, sigma = scheduler.level(t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x_0 = MEAN + gain * (x - alpha * MEAN)
        return x_0, (x - alpha * x_0) / sigma, state

    return denoise


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", [ddpm, ddim, dpmpp])
def test_samplers_recover_mean_and_variance_of_gaussian_data(sampler, schedule):
    scheduler = DDPMScheduler(400, schedule)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(50_000, generator=generator, dtype=torch.float64)

    options = {} if sampler is dpmpp else {"noise": noise}
    *_, (s, x, _) = sampler(scheduler, exact(scheduler), noise(), scheduler.timesteps(400), **options)
    assert s == -1
    assert x.mean().item() == pytest.approx(MEAN, abs=0.005)
    assert x.std().item() == pytest.approx(STD, abs=0.01)


def test_dpmpp_is_of_second_order_and_ddim_of_first():
    scheduler = DDPMScheduler(4096)
    first, last = 3500, 428  # 3072 steps apart
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def spread(t):
        alpha, sigma = scheduler.level(t)
        return math.sqrt(alpha**2 * STD**2 + sigma**2)

    # the probability-flow ODE of Gaussian data keeps each point's number of deviations from the mean
    exact_end = scheduler.level(last)[0] * MEAN + spread(last) / spread(first) * (x - scheduler.level(first)[0] * MEAN)

    def error(sampler, stride, **options):
        steps = range(first, last - 1, -stride)
        *_, (_, end, _) = sampler(scheduler, exact(scheduler), x, steps, **options)
        return (end - exact_end).square().mean().sqrt().item()

    strides = (96, 48, 24)
    second = [error(dpmpp, stride) for stride in strides]
    first_order = [error(ddim, stride, noise=None) for stride in strides]
    for coarse, fine in itertools.pairwise(second):
        assert coarse / fine == pytest.approx(4, abs=1)
    for coarse, fine in itertools.pairwise(first_order):
        assert coarse / fine == pytest.approx(2, abs=0.3)


def test_clipping_comes_before_the_posterior_mean(values):
    scheduler = DDPMScheduler(400, "linear", "eps")
    x = 5 * values[0]
    ((_, _, x_0),) = ddpm(scheduler, denoiser(Recorded(values[1]), scheduler), x, [399, 398], noise=lambda: values[2])
    assert x_0.abs().max() <= 1


def test_guidance_is_the_papers_mixture():
    """F_u + g (F_c - F_u), of a network whose output is its label."""
    scheduler = DDPMScheduler(400, "linear", "eps")

    class Labelled(torch.nn.Module):
        num_classes = 7

        def forward(self, x, t, labels):
            return labels[:, None, None, None].expand_as(x).to(x)

    x = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    denoise = denoiser(Labelled(), scheduler, clip=False, labels=torch.tensor([1, 3]), guidance=2.5)
    _, eps, _ = denoise(x, 100, None)
    assert eps[:, 0, 0, 0].tolist() == pytest.approx([7 + 2.5 * (1 - 7), 7 + 2.5 * (3 - 7)])


def test_noise_of_an_image_depends_on_its_seed_alone():
    together = image_noise(range(5, 9), (3, 4, 4), "cpu")
    alone = image_noise([7], (3, 4, 4), "cpu")
    for _ in range(3):
        assert torch.equal(together()[2], alone()[0])


def test_a_guide_is_led_away_from_where_guidance_acts_and_nowhere_else():
    """Karras et al. 2024, eq. 3, by hand; the guide is not told the class."""

    class Says(Denoiser):
        num_classes = 3

        def __init__(self, factor: float):
            super().__init__()
            self.factor = factor

        def forward(self, x, t, state=None, *, labels):
            return self.factor * x + labels[:, None, None, None]

    scheduler = DDPMScheduler(10, prediction_type="eps")
    guidance = Guidance(2.5, Says(0.5), between=(0.3, 0.7))
    x, labels = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    denoise = denoiser(Says(1.0), scheduler, clip=False, labels=labels, guidance=guidance)
    asked = labels[:, None, None, None]
    for t in range(10):
        _, eps, _ = denoise(x, t, None)
        inside = 3 <= t < 7
        assert torch.allclose(eps, 2.5 * (x + asked) - 1.5 * (0.5 * x + 3) if inside else x + asked, atol=1e-5)


def test_the_usual_guidance_acts_in_a_share_of_the_timesteps_and_its_calls_are_counted():
    model = Denoiser()
    model.num_classes = 2
    usual = Guidance.usual(model)
    assert usual.weight == GUIDANCE and usual.calls([399, 240, 239, 0, -1], 400) == 2 * 2 + 2
    assert Guidance().calls([399, 0, -1], 400) == 2
    model.num_classes = 0
    assert Guidance.usual(model) == Guidance()


@pytest.mark.parametrize("prediction_type", ["eps", "v", "edm"])
def test_a_scaled_eps_is_that_of_the_model_divided(prediction_type, values):
    """Epsilon scaling, Ning et al. 2024, eq. 13; x_0 and eps still make up x_t."""
    scheduler = DDPMScheduler(400, "linear", prediction_type)
    x, output, _ = values
    for t in (0, 100, 399):
        (_, plain, _), (x_0, eps, _) = (
            denoiser(Recorded(output), scheduler, clip=False, eps_scale=scale)(x, t, None) for scale in (1.0, 1.25)
        )
        torch.testing.assert_close(eps, plain / 1.25)
        alpha, sigma = scheduler.level(t)
        torch.testing.assert_close(alpha * x_0 + sigma * eps, x)
    clipped, _, _ = denoiser(Recorded(output), scheduler, eps_scale=1.25)(x, 399, None)
    assert clipped.abs().max() <= 1


def test_guidance_without_classes_needs_a_guide():
    with pytest.raises(ValueError, match="guide"):
        denoiser(Denoiser(), DDPMScheduler(10), guidance=2.0)


def test_one_denoiser_answers_where_noise_is_high_and_another_below():
    calls = []

    class Notes(Denoiser):
        def __init__(self, name: str):
            super().__init__()
            self.name, self.weight = name, torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, state=None):
            calls.append((self.name, t.tolist()))
            return 0 * x

    model = ByNoise(Notes("noisy"), Notes("clean"), 6)
    sample_images(model, DDPMScheduler(10), (1, 4, 4), 2, steps=10)
    assert calls == [("noisy" if t >= 6 else "clean", [t, t]) for t in range(9, -1, -1)]
