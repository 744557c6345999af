"""What tests of the diffusion process share: a network that says what it is told, and the scheduler of diffusers."""

import math

import torch

from diffusion.scheduler import DDPMScheduler


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
