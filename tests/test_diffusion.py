"""The scheduler against diffusers' formulas in float64, Karras et al. 2022, and its own definitions."""

import math
from pathlib import Path

import pytest
import torch
from denoising import Recorded, diffusers_scheduler
from diffusers import DDIMScheduler
from diffusers import DDPMScheduler as DiffusersDDPMScheduler

from choices import PREDICTION_TYPES
from diffusion.scheduler import DDPMScheduler
from images.batches import to_float
from images.datasets import load_images
from training.checkpoint import load_model


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noising_is_diffusers(schedule, values):
    ours = DDPMScheduler(400, schedule)
    theirs = diffusers_scheduler(DiffusersDDPMScheduler, ours, clip=False)
    x_0, eps, _ = values
    for step in range(400):
        t = torch.tensor([step, 399 - step])
        assert (ours.add_noise(x_0, t, eps) - theirs.add_noise(x_0, eps, t)).abs().max() < 1e-12


@pytest.mark.parametrize("prediction_type, theirs", [("eps", "epsilon"), ("v", "v_prediction")])
def test_predictions_are_diffusers(prediction_type, theirs, values):
    ours = DDPMScheduler(400, "linear", prediction_type)
    reference = diffusers_scheduler(DDIMScheduler, ours, clip=False)
    reference.register_to_config(prediction_type=theirs)
    reference.set_timesteps(400)
    x, output, _ = values
    for t in range(400):
        x_0, _ = ours.predict(output, x, torch.tensor([t, t]))
        expected = reference.step(output, t, x).pred_original_sample
        assert (x_0 - expected).abs().max() < 1e-6 * max(1, expected.abs().max())


def test_edm_is_karras_preconditioning(values):
    scheduler = DDPMScheduler(400, "linear", "edm")
    x, output, _ = values
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, t):
            seen.append(x)
            return output

    for t in (0, 57, 399):
        times = torch.tensor([t, t])
        alpha, sigma = scheduler.level(t)
        noise_level, noisy = sigma / alpha, x / alpha  # the variance-exploding sigma and x of Karras et al.
        c_skip = 0.5**2 / (noise_level**2 + 0.5**2)
        c_out = noise_level * 0.5 / math.sqrt(noise_level**2 + 0.5**2)
        c_in = 1 / math.sqrt(noise_level**2 + 0.5**2)
        x_0, eps = scheduler.predict(scheduler.network_output(Network(), x, times), x, times)
        assert (seen[-1] - c_in * noisy).abs().max() < 1e-12
        assert (x_0 - (c_skip * noisy + c_out * output)).abs().max() < 1e-12
        assert (alpha * x_0 + sigma * eps - x).abs().max() < 1e-12


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_is_the_error_of_eps_whatever_the_prediction(prediction_type, values):
    scheduler = DDPMScheduler(400, "linear", prediction_type)
    x_0, eps, _ = values
    t = torch.tensor([5, 300])
    x_t = scheduler.add_noise(x_0, t, eps)
    alpha, sigma = (v.view(2, 1, 1, 1) for v in (scheduler.alpha[t], scheduler.sigma[t]))
    guess = 0.9 * x_0  # any denoiser; its error of eps is that of x_0 times alpha / sigma
    p, q = (v.view(2, 1, 1, 1) for v in (scheduler.p[t], scheduler.q[t]))
    output = p * guess + q * (x_t - alpha * guess) / sigma
    expected = ((alpha / sigma * (guess - x_0)) ** 2).flatten(1).mean(1)
    assert (scheduler.loss(Recorded(output), x_0, t, eps) - expected).abs().max() < 1e-10


def test_noising_stays_in_float32_under_autocast(values):
    scheduler = DDPMScheduler(400)
    x_0, eps, _ = (v.float() for v in values)
    t = torch.tensor([0, 399])
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    wrapped = Recorded(None)
    wrapped.forward = lambda x, t: network(x)
    with torch.autocast("cpu", torch.bfloat16):
        noisy, loss = scheduler.add_noise(x_0, t, eps), scheduler.loss(wrapped, x_0, t, eps)
        assert network(x_0).dtype == torch.bfloat16
    assert noisy.dtype == loss.dtype == torch.float32
    assert torch.equal(noisy, scheduler.add_noise(x_0, t, eps))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [2, 400])
def test_a_training_s_mean_loss_is_that_over_all_timesteps_evenly(num_timesteps, schedule, values):
    scheduler = DDPMScheduler(num_timesteps, schedule)
    draws = 1_000_000
    t = scheduler.draw_timesteps((torch.arange(draws) + 0.5) / draws)
    drawn = t.bincount(minlength=num_timesteps) / draws  # how often each comes
    assert drawn.min() > 0 and drawn[0] > 2 * drawn[-1]
    x_0, eps, output = (v[:1].expand(num_timesteps, -1, -1, -1) for v in values)
    everything = x_0, torch.arange(num_timesteps), eps
    trained = (drawn * scheduler.training_loss(Recorded(output), *everything)).sum()
    assert trained.item() == pytest.approx(scheduler.loss(Recorded(output), *everything).mean().item(), rel=1e-3)
    ends = scheduler.draw_timesteps(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [0, num_timesteps - 1]


def test_drawing_timesteps_so_lowers_the_variance_of_the_gradient():
    data = load_images("digits", "unused", 16)
    model, scheduler, _ = load_model(Path(__file__).parents[1] / "pretrained/true-digits.safetensors")
    random = torch.Generator().manual_seed(0)
    evenly, drawn = 0.0, 0.0
    for t in torch.arange(5, 400, 10).repeat(2):
        x_0 = to_float(data.train[torch.randint(len(data.train), (1,), generator=random)])
        model.zero_grad()
        loss = scheduler.loss(model, x_0, t[None], torch.randn(x_0.shape, generator=random))
        loss.sum().backward()
        squared = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
        evenly += squared
        drawn += squared / scheduler.density[t].item()  # (1 / density)^2, density times as often
    assert drawn < 0.7 * evenly


@pytest.mark.parametrize("num_timesteps", [50, 400, 1000])
def test_scaled_linear_schedule_ends_in_noise_for_any_length(num_timesteps):
    assert DDPMScheduler(num_timesteps).level(num_timesteps - 1)[0] < 0.01
    assert DDPMScheduler(num_timesteps).alphas_cumprod.dtype == torch.float64


def test_timesteps_run_from_the_last_to_the_clean_image():
    scheduler = DDPMScheduler(400)
    assert scheduler.timesteps(400) == list(range(399, -2, -1))
    assert scheduler.timesteps(4) == [399, 299, 199, 99, -1]
    for bad in (0, 401):
        with pytest.raises(ValueError, match=str(bad)):
            scheduler.timesteps(bad)


def test_a_scheduler_s_tables_stay_where_they_are_whatever_others_do():
    names = ("alpha", "sigma", "input_scale", "p", "q", "density", "cumulative")
    schedulers = [DDPMScheduler() for _ in range(8)]
    first, again = (
        [scheduler._table(name, torch.device("cpu"), torch.float16) for scheduler in schedulers for name in names]
        for _ in range(2)
    )
    assert all(a is b for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"num_timesteps": 1}, "1"),
        ({"schedule": "sqrt"}, "sqrt"),
        ({"prediction_type": "x"}, "'x'"),
    ],
)
def test_bad_settings_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        DDPMScheduler(**options)
