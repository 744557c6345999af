"""A state carried from one denoising step to the next: handed along when sampling, learned without a leak."""

import pytest
import torch

from baselines import MemoryLiquid
from diffusion.sampling import sample_images
from diffusion.scheduler import DDPMScheduler
from images.batches import held_out_bank, memory_noise
from images.datasets import load_images
from lab.evaluation.measures import eps_mse
from liquid_diffusion import TrueLiquidDiffusionModel
from models import build_model
from training.checkpoint import load_model
from training.config import TrainConfig
from training.loop import train
from training.validation import held_out_loss


class Recorder(torch.nn.Module):
    """A model whose state counts its calls, and that keeps what it was given."""

    num_classes, carries_state = 0, True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, x, t, state=None, *, return_state=False):
        self.calls.append((x.clone(), int(t[0]), state))
        state = 1 if state is None else state + 1
        return (torch.zeros_like(x), state) if return_state else torch.zeros_like(x)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_a_sampler_hands_the_state_from_each_step_to_the_next(sampler):
    model = Recorder()
    sample_images(model, DDPMScheduler(40), (1, 4, 4), 4, sampler=sampler, steps=5, batch_size=2)
    assert [state for _, _, state in model.calls] == [None, 1, 2, 3, 4] * 2  # each batch starts anew


def test_what_is_remembered_comes_from_noisier_images_the_noisiest_first():
    scheduler, model = DDPMScheduler(400, prediction_type="eps"), Recorder()
    x_t, t = torch.randn(2, 1, 4, 4), torch.tensor([100, 100])
    assert scheduler.remember(model, x_t, t, torch.randn(0, *x_t.shape)) is None
    assert scheduler.remember(model, x_t, t, torch.randn(2, *x_t.shape)) == 2
    assert [time for _, time, _ in model.calls] == [116, 108]  # 50 steps of 400 are 8 apart


def test_the_noisier_images_have_the_forward_process_s_own_distribution_and_tell_nothing_new():
    """x_s = alpha_s x_0 + sigma_s noise, and given x_t what is left of x_s is independent of eps: no leak."""
    scheduler, model = DDPMScheduler(400, prediction_type="eps"), Recorder()
    torch.manual_seed(0)
    x_0, eps = torch.full((200_000, 1, 1, 1), 0.7), torch.randn(200_000, 1, 1, 1)
    t = torch.full((200_000,), 150)
    x_t = scheduler.add_noise(x_0, t, eps)
    scheduler.remember(model, x_t, t, torch.randn(2, *x_t.shape))
    for x_s, s, _ in model.calls:
        (alpha, sigma), (alpha_t, _) = scheduler.level(s), scheduler.level(150)
        assert x_s.mean().item() == pytest.approx(0.7 * alpha, abs=0.01)
        assert x_s.std().item() == pytest.approx(sigma, rel=0.01)
        left = x_s - alpha / alpha_t * x_t
        correlation = torch.corrcoef(torch.stack([left.flatten(), eps.flatten()]))[0, 1]
        assert abs(correlation) < 0.01
        assert left.std() > 0.05


def test_at_the_last_timestep_nothing_is_noisier():
    scheduler, model = DDPMScheduler(400), Recorder()
    x_t = torch.randn(1, 1, 4, 4)
    scheduler.remember(model, x_t, torch.tensor([399]), torch.randn(1, *x_t.shape))
    ((seen, time, _),) = model.calls
    assert time == 399 and torch.allclose(seen, scheduler.at("input_scale", torch.tensor([399]), x_t) * x_t)


def test_memory_noise_is_a_function_of_seed_and_number_and_its_shares_are_the_whole():
    draws = [memory_noise((1, 2, 2), seed=0, number=n, batch_size=6) for n in range(300)]
    counts = torch.tensor([len(noise) for noise in draws]).bincount()
    assert len(counts) == 3 and counts.min() > 70  # none, one or two, equally often
    number = next(n for n, noise in enumerate(draws) if len(noise) == 2)
    shares = [memory_noise((1, 2, 2), seed=0, number=number, batch_size=6, rank=r, world_size=3) for r in range(3)]
    assert torch.equal(torch.cat(shares, dim=1), draws[number])


def test_a_state_of_zeros_and_none_are_the_same_and_another_is_not():
    model, plain = MemoryLiquid(channels=(8, 8, 8)), TrueLiquidDiffusionModel(channels=(8, 8, 8))
    plain.load_state_dict(model.state_dict())
    torch.nn.init.normal_(model.head.weight)
    plain.head.load_state_dict(model.head.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 9])
    zeros = tuple(torch.zeros(2, 8, side, side) for side in (4, 8, 16))
    assert torch.allclose(model(x, t), model(x, t, zeros), atol=1e-6)
    assert torch.equal(model(x, t), plain(x, t))
    scheduler = DDPMScheduler(400)
    state = scheduler.remember(model, x, t, torch.randn(1, *x.shape))
    assert (model(x, t) - model(x, t, state)).abs().max() > 1e-3
    assert scheduler.remember(plain, x, t, torch.randn(1, *x.shape)) is None


def stop_half_way(progress: float) -> None:
    if progress > 0.6:
        raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_with_memory_trains_resumes_and_is_measured_with_and_without(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out_bank, "__defaults__", (100,))

    def config(folder, steps):
        return TrainConfig(
            model="true:memory", model_config={"channels": (8, 8, 8)}, dataset="digits", epochs=None, steps=steps,
            batch_size=8, timesteps=50, lr=0.01, precision=precision, device="cpu", output_dir=str(folder),
            log_every=1, save_every=4, sample_every=8, draw_grids=False,
        )  # fmt: skip

    whole = train(config(tmp_path / "whole", 8))
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "part", 8), on_progress=stop_half_way)
    (part,) = (tmp_path / "part").iterdir()
    assert train(config(tmp_path / "part", 8), resume=part) == part
    assert (whole / "model.safetensors").read_bytes() == (part / "model.safetensors").read_bytes()
    model, scheduler, _ = load_model(whole)
    bank = held_out_bank(load_images("digits", "unused"), 50, size=200)
    on, off = held_out_loss(model, scheduler, bank), held_out_loss(model, scheduler, bank, memory=False)
    assert on != off and abs(on - off) < 0.5 * off
    report = eps_mse(model, scheduler, bank)
    assert (report["value"], report["memory_off"]) == (on, off)


def test_a_model_without_memory_is_not_measured_without_it():
    bank = held_out_bank(load_images("digits", "unused"), 50, size=20)
    assert "memory_off" not in eps_mse(build_model("true", in_channels=1), DDPMScheduler(50), bank)
