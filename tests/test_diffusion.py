"""The scheduler against diffusers' formulas in float64, and the samplers against exact solutions on Gaussian data."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers import DDPMScheduler as DiffusersDDPMScheduler

from choices import GUIDANCE, PREDICTION_TYPES
from diffusion import (
    ByNoise,
    DDPMScheduler,
    Denoiser,
    Guidance,
    ddim,
    ddpm,
    denoiser,
    dpmpp,
    image_noise,
    sample_images,
)
from images.batches import to_float
from images.datasets import load_images
from training.checkpoint import load_model


def diffusers_scheduler(kind, ours: DDPMScheduler, *, clip: bool):
    """Diffusers' scheduler with the same betas, its float32 tables replaced by float64 ones."""
    scale = 1000 / ours.num_timesteps
    if ours.schedule == "linear":
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, ours.num_timesteps, dtype=torch.float64)
        theirs = kind(ours.num_timesteps, trained_betas=betas.tolist(), clip_sample=clip)
    else:
        theirs = kind(ours.num_timesteps, beta_schedule="squaredcos_cap_v2", clip_sample=clip)
        steps = torch.arange(ours.num_timesteps + 1, dtype=torch.float64) / ours.num_timesteps
        bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        assert (betas - theirs.betas).abs().max() < 1e-5
    theirs.betas, theirs.alphas = betas, 1 - betas
    theirs.alphas_cumprod = torch.cumprod(1 - betas, 0)
    theirs.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(theirs, "final_alpha_cumprod"):
        theirs.final_alpha_cumprod = theirs.one
    return theirs


class Recorded(torch.nn.Module):
    """A network whose output is fixed."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, t):
        return self.output


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noising_is_diffusers(schedule, values):
    ours = DDPMScheduler(400, schedule)
    theirs = diffusers_scheduler(DiffusersDDPMScheduler, ours, clip=False)
    x_0, eps, _ = values
    for step in range(400):
        t = torch.tensor([step, 399 - step])
        assert (ours.add_noise(x_0, t, eps) - theirs.add_noise(x_0, eps, t)).abs().max() < 1e-12


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


MEAN, STD = 0.3, 0.4


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
