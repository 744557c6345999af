"""All measurements of a trained model in one labelled report, which `evaluate.py` prints and writes.

    report, picture = evaluate(model, scheduler, data, num_images=2000, sampler="dpmpp", steps=50, ...)

Every figure of the report has its unit, the number of images, the split and the seed on which it depends. A figure that
could not be measured has the value None and the reason.
"""

import importlib.metadata
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from choices import SHOWN
from diffusion.sampling import ByNoise, Guidance, sample_images
from diffusion.scheduler import DDPMScheduler, Denoiser, carries_state
from images.batches import Batch, held_out_bank, to_float, to_uint8
from images.datasets import ImageData
from lab.classifier.network import Classifier
from lab.evaluation.by_classifier import by_classifier
from lab.evaluation.inception import inception_distances
from lab.evaluation.likelihood import NUM_STRATA, timestep_strata, variational_bound
from lab.evaluation.neighbours import nearest, picture_of_neighbours
from lab.evaluation.ode_work import num_points, ode_work
from lab.evaluation.report import Report, choice, finite, not_measured
from lab.evaluation.sliced_wasserstein import DIRECTIONS, PATCH, PATCHES, num_blocks, pyramid_levels, sliced_wasserstein
from liquid_diffusion import TrueLiquidDiffusionModel
from models import count_parameters, multiply_adds
from runtime.progress import progress_bar
from training.validation import held_out_loss

BINS = 10
HOW_DRAWN = ("sampler", "steps", "seed", "classes", "guidance", "guided_share", "eps_scale")
HOW_DRAWN += ("guide_ode_steps", "noisy_ode_steps")
HELD_OUT_QUERIES = 256  # held-out images, whose distances from the training images those of samples are compared with


def evaluate(
    model: Denoiser,
    scheduler: DDPMScheduler,
    data: ImageData,
    *,
    num_images: int,
    bound_images: int,
    sampler: str,
    steps: int,
    seed: int,
    batch_size: int,
    guidance: Guidance,
    eps_scale: float,
    drawn_by: Denoiser,
    classifier: Classifier | str,
    inception: Path | str,
) -> tuple[Report, Tensor]:
    """(the report, a picture of 16 samples and their nearest training images: (256, C, H, W) in [-1, 1]).

    num_images: samples, at least 16. bound_images: held-out images for the variational bound. sampler, steps,
    batch_size, guidance and eps_scale: as in `sample_images`. drawn_by: the model, or what else draws with its weights.
    classifier: of these images, or the reason why there is none.
    inception: the weights of the Inception network, or the reason why FID is not to be measured. The same seed gives
    the same figures, except for the speed. Raises RunFailed if the model's outputs are not finite.
    """
    device = next(model.parameters()).device
    report: Report = {}
    report["eps_mse"] = eps_mse(model, scheduler, held_out_bank(data, scheduler.num_timesteps))
    report["variational_bound"] = bound(model, scheduler, data, bound_images, seed, batch_size)
    asked = torch.arange(num_images) % model.num_classes if model.num_classes else None
    samples, report["sampling"] = draw(
        drawn_by, scheduler, data, num_images, sampler, steps, seed, batch_size, asked, guidance, eps_scale
    )
    report["sliced_wasserstein"] = patch_distance(samples, data, device, seed)
    picture, report["nearest_training_images"] = neighbours(samples, data, seed)
    if isinstance(classifier, str):
        report["classifier"] = not_measured(classifier)
    else:
        report["classifier"] = by_classifier(samples, asked, data, classifier, seed)
    report["fid"], report["kid"] = fid_and_kid(samples, data, inception, device, batch_size)
    drawn = {key: report["sampling"][key] for key in HOW_DRAWN if key in report["sampling"]}
    for name in ("sliced_wasserstein", "nearest_training_images", "classifier", "fid", "kid"):
        report[name]["samples"] = drawn
    return report, picture


def subject(model: Denoiser, scheduler: DDPMScheduler, data: ImageData) -> Report:
    """A description of what is measured: network, diffusion, data, device and library versions."""
    device = next(model.parameters()).device
    return {
        "parameters": {"value": count_parameters(model), "unit": "trainable parameters"},
        "multiply_adds": {
            "value": multiply_adds(model, data.shape),
            "unit": "multiply-adds per forward pass of one image, over all ODE steps",
        },
        "diffusion": {name: getattr(scheduler, name) for name in ("num_timesteps", "schedule", "prediction_type")},
        "data": {
            "dataset": data.name,
            "shape": list(data.shape),
            "classes": len(data.classes),
            "train_images": len(data.train),
            "held_out_images": len(data.held_out),
        },
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": "fp32",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")},
        },
    }


def eps_mse(model: Denoiser, scheduler: DDPMScheduler, bank: Batch) -> Report:
    """Held-out eps-MSE on the frozen bank, overall and in ten bins of t of equal width.

    A model that carries its state from step to step is also measured with its memory off: from a state of zeros.
    """
    bins = bank.t * BINS // scheduler.num_timesteps
    parts = []
    with progress_bar(desc="eps-MSE", total=2 * len(bank.t), unit="call") as bar:
        overall = finite(held_out_loss(model, scheduler, bank), "the held-out eps-MSE")
        bar.update(len(bank.t))
        for i in range(BINS):
            inside = bins == i
            times = [t for t in range(scheduler.num_timesteps) if t * BINS // scheduler.num_timesteps == i]
            part = Batch(**{name: values[inside] for name, values in vars(bank).items()})
            value = held_out_loss(model, scheduler, part) if inside.any() else None
            parts.append({"t": [times[0], times[-1]] if times else None, "n": int(inside.sum()), "value": value})
            bar.update(int(inside.sum()))
    off = {}
    if carries_state(model):
        off = {"memory_off": finite(held_out_loss(model, scheduler, bank, memory=False), "the eps-MSE without memory")}
    return {
        "value": overall,
        **off,
        "unit": "mean squared error of the predicted eps, per value",
        "n": len(bank.t),
        "split": "held out",
        "bank": "frozen: the same images, t and eps for every model and seed",
        "bins": parts,
    }


def by_solver(model: TrueLiquidDiffusionModel, scheduler: DDPMScheduler, bank: Batch) -> Report:
    """The part of the report on the held-out eps-MSE with every ODE solver."""
    total = num_points() * len(bank.t)
    with progress_bar(desc="ODE solvers", total=total, unit="call") as bar:
        points = ode_work(model, scheduler, bank, on_images=bar.update)
    return {
        "points": points,
        "unit": "mean squared error of the predicted eps, per value; multiply-adds per image and network call",
        "n": len(bank.t),
        "split": "held out",
    }


def bound(model: Denoiser, scheduler: DDPMScheduler, data: ImageData, count: int, seed: int, batch_size: int) -> Report:
    """The variational bound in bits/dim, with all its terms, on randomly chosen held-out images."""
    index = choice(len(data.held_out), count, seed)
    if len(index) < 2:
        return not_measured("needs at least 2 held-out images")
    strata = timestep_strata(scheduler.num_timesteps, NUM_STRATA)
    with progress_bar(desc="bits/dim", total=len(index) * (1 + len(strata)), unit="call") as bar:
        terms = variational_bound(
            model,
            scheduler,
            to_float(data.held_out[index]),
            data.held_out_labels[index],
            seed=seed,
            batch_size=batch_size,
            on_batch=bar.update,
        )

    def term(values: Tensor) -> Report:
        error = values.std().item() / len(values) ** 0.5
        return {"value": finite(values.mean().item(), "the variational bound"), "standard_error": error}

    return {
        **term(terms.total),
        "unit": "bits/dim, an upper bound on the negative log-likelihood of 8-bit images",
        "n": len(index),
        "split": "held out",
        "seed": seed,
        "estimate": f"per image, one timestep from each of {len(strata)} strata; see lab/evaluation/likelihood.py",
        "reverse_variance": "posterior",
        "terms": {
            "prior": term(terms.prior),
            "kl": term(terms.kl.sum(1)),
            "decoder": term(terms.decoder),
            "kl_by_stratum": [
                {"t": [first, last], "value": value}
                for (first, last), value in zip(terms.strata, terms.kl.mean(0).tolist(), strict=True)
            ],
        },
    }


def draw(
    model: Denoiser,
    scheduler: DDPMScheduler,
    data: ImageData,
    num_images: int,
    sampler: str,
    steps: int,
    seed: int,
    batch_size: int,
    labels: Tensor | None,
    guidance: Guidance,
    eps_scale: float,
) -> tuple[Tensor, Report]:
    """(uint8 samples (N, C, H, W), how and how fast they were drawn)."""
    with progress_bar(desc="sampling", total=num_images * steps, unit="call", unit_scale=True) as bar:
        started = time.monotonic()
        images = sample_images(
            model,
            scheduler,
            data.shape,
            num_images,
            sampler=sampler,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            labels=labels,
            guidance=guidance,
            eps_scale=eps_scale,
            on_step=lambda _, x_0: bar.update(len(x_0)),
        )
        seconds = time.monotonic() - started
    finite(images.sum().item(), "the sum of the samples")
    other = {"guide_ode_steps": guidance.guide, "noisy_ode_steps": model.noisy if isinstance(model, ByNoise) else None}
    other = {name: liquid for name, liquid in other.items() if isinstance(liquid, TrueLiquidDiffusionModel)}
    return to_uint8(images), {
        "value": num_images / seconds,
        "unit": "images/s",
        "n": num_images,
        "seconds": seconds,
        "sampler": sampler,
        "steps": steps,
        "seed": seed,
        "batch_size": batch_size,
        "classes": "in turns" if model.num_classes else "unconditional",
        "guidance": guidance.weight,
        "guided_share": guidance.between[1],
        "eps_scale": eps_scale,
        **{name: list(liquid.current_steps()) for name, liquid in other.items()},
        "multiply_adds_per_image": drawing_multiply_adds(model, guidance, scheduler, steps, data.shape),
    }


def drawing_multiply_adds(
    model: Denoiser, guidance: Guidance, scheduler: DDPMScheduler, steps: int, shape: tuple[int, int, int]
) -> int:
    """Multiply-adds of drawing one image of shape (C, H, W) from noise, over all network calls and ODE steps."""
    cost: dict[int, int] = {}
    total = 0
    for t in scheduler.timesteps(steps)[:-1]:
        own = model.at(t) if isinstance(model, ByNoise) else model
        for network in [own, guidance.guide or own] if guidance.acts(t, scheduler.num_timesteps) else [own]:
            if id(network) not in cost:
                cost[id(network)] = multiply_adds(network, shape)
            total += cost[id(network)]
    return total


def patch_distance(images: Tensor, data: ImageData, device: torch.device, seed: int) -> Report:
    """Sliced Wasserstein distance of samples from held-out images; the floor is that of as many training images."""
    sides = data.shape[1:]
    if not pyramid_levels(*sides):
        return not_measured(f"patches of {PATCH}x{PATCH} need larger images than {sides[0]}x{sides[1]}")
    n = min(len(images), len(data.held_out), len(data.train))
    held_out = data.held_out[choice(len(data.held_out), n, seed)]
    train = data.train[choice(len(data.train), n, seed).to(data.train.device)]
    with progress_bar(desc="sliced Wasserstein", total=num_blocks(*sides), unit="block") as bar:
        found = sliced_wasserstein(
            held_out.to(device if device.type == "cuda" else "cpu"),  # MPS has no float64
            [images[:n], train],
            seed=seed,
            on_block=bar.update,
        )
    value, floor = ({str(level): 1000 * distance for level, distance in levels.items()} for levels in found)
    if len(value) > 1:
        value, floor = (levels | {"average": sum(levels.values()) / len(levels)} for levels in (value, floor))
    return {
        "value": value,
        "floor": floor,
        "unit": "1e-3 standard deviations of the patch values; by the shorter side of the level in pixels",
        "n": n,
        "split": "samples against held-out images",
        "floor_split": "training images against the same held-out images",
        "seed": seed,
        "patches_an_image": PATCHES,
        "directions": DIRECTIONS,
    }


def neighbours(images: Tensor, data: ImageData, seed: int) -> tuple[Tensor, Report]:
    """(picture of samples and their nearest training images, their distances and those of held-out images)."""
    shown = images[:SHOWN]
    found = nearest(shown, data.train, SHOWN - 2, mirror=data.mirror)
    others = data.held_out[choice(len(data.held_out), HELD_OUT_QUERIES, seed)]
    scale = nearest(others, data.train, 1, mirror=data.mirror).distance[:, 0]
    distances = found.distance[:, 0]
    return picture_of_neighbours(shown, data.train, found), {
        "value": distances.quantile(0.5).item(),
        "unit": "root mean squared difference of the values, in 8-bit levels; the median over the samples",
        "n": len(shown),
        "distances": distances.tolist(),
        "indices": found.index[:, 0].tolist(),
        "split": "samples against training images" + (", mirrored ones too" if data.mirror else ""),
        "held_out": {
            "value": scale.quantile(0.5).item(),
            "least": scale.min().item(),
            "n": len(others),
            "seed": seed,
            "split": "held-out images against training images",
        },
    }


def fid_and_kid(
    images: Tensor, data: ImageData, inception: Path | str, device: torch.device, batch_size: int
) -> tuple[Report, Report]:
    """FID and KID of the samples against all training images, as is usual in publications."""
    if isinstance(inception, str):
        return not_measured(inception), not_measured(inception)
    figures = inception_distances(images, data.train, inception, device=device, batch_size=batch_size)
    about = {
        "n": len(images),
        "n_reference": len(data.train),
        "split": "samples against training images",
        "library": f"torch-fidelity {importlib.metadata.version('torch-fidelity')}",
        "weights": inception.name,
    }
    fid = {"value": figures["fid"], "unit": "squared distance of Inception features"} | about
    kid = {"value": figures["kid"], "unit": "squared maximum mean discrepancy of Inception features"} | about
    return fid, kid | {"standard_deviation": figures["kid_std"], "subset_size": figures["kid_subset_size"]}
