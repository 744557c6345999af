"""What the flags of the commands offer, by name; only here is it listed.

Nothing here imports torch, whose import takes seconds: `--help` and a mistyped flag are answered before it.
"""

from typing import Any

DEVICES = ("auto", "cpu", "cuda", "mps")
DATASETS = ("cifar10", "fashion-mnist", "mnist", "digits", "folder")

# how a run computes and learns
PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")
OPTIMIZERS = ("adamw", "muon")

# the diffusion process
SCHEDULES = ("linear", "cosine")
PREDICTION_TYPES = ("eps", "v", "edm")
SAMPLERS = ("ddpm", "ddim", "dpmpp")

# How images are drawn unless a flag says otherwise: the least FD of the published model (LOG.md). Guidance acts in this
# share of the timesteps, from the clean end; every predicted eps is divided by EPS_SCALE.
GUIDANCE, GUIDED_SHARE, EPS_SCALE = 4.0, 0.6, 1.01

# the liquid model's ODE
STEP_SOLVERS = ("euler", "semi-implicit", "exponential")
ODEINT_SOLVERS = ("midpoint", "rk4", "dopri5")  # torchdiffeq's solvers on the same cell, meant for sampling
SOLVERS = (*STEP_SOLVERS, *ODEINT_SOLVERS)

# the networks
MODELS = ("true", "inspired", "unet")

# The shape of each U-Net that the liquid is compared with. From 600k up it is DDPM's own (Ho et al. 2020, appendix B)
# with fewer channels: c, 2c, 2c, 2c, two residual blocks per level, attention on the second level and in the middle.
# Below 600k it is the best of those that were tried (LOG.md).
DDPM_SHAPE = {"layers_per_block": 2, "mid_block": True, "attention_level": 1}
LADDER = {
    "38k": {},
    "38k-flat": {"channels": (16,), "layers_per_block": 2, "time_embedding_dim": 32},
    "75k-flat": {"channels": (24,), "layers_per_block": 2, "time_embedding_dim": 32},
    "150k": {"channels": (24, 24), "mid_block": True},
    "150k-flat": {"channels": (32,), "layers_per_block": 2, "time_embedding_dim": 64},
    "300k": {"channels": (24, 42), "mid_block": True},
    "600k": {"channels": (16, 32, 32, 36), **DDPM_SHAPE},
    "2.4m": {"channels": (32, 64, 64, 72), **DDPM_SHAPE},
    "4m": {"channels": (44, 88, 88, 88), **DDPM_SHAPE},
    "35.7m": {"channels": (128, 256, 256, 256), **DDPM_SHAPE},
}
# the liquid with one thing changed
ABLATIONS = ("pooled", "tau=fixed", "untied", "memory")

# these have no ODE whose steps could be chosen: the steps of the last are layers with weights of their own
WITHOUT_ODE = ("inspired", "unet", "true:untied")

# the arms that compare.py knows: name -> (model, its config)
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "true": ("true", {}),
    "inspired": ("inspired", {}),
    **{f"unet:{rung}": ("unet", shape) for rung, shape in LADDER.items()},
    "true:steps=1": ("true", {"ode_steps": (1, 1, 1)}),
    "true:steps=random": ("true", {"random_steps": True}),
    "true:coarse-first": ("true", {}),
    "true:solver=exponential": ("true", {"solver": "exponential"}),
    **{f"true:{name}": (f"true:{name}", {}) for name in ABLATIONS},
}
# the arms that differ in how they are trained: name -> values of TrainConfig
ARM_TRAINING: dict[str, dict[str, Any]] = {"true:coarse-first": {"coarse_first": 0.6}}

SHOWN = 16  # samples that evaluate.py shows with their nearest training images, and the fewest that it draws

# what benchmark.py measures
SECTIONS = ("train", "sampling", "peers", "convolutions", "kernels", "growth", "memory", "processes", "start")
NEED_TRAIN = {"convolutions", "growth", "processes"}  # they use the fastest variants that `train` has found
