"""What a comparison says: means, paired differences and the parameter-efficiency ratio, as a Markdown table and curves.

A result is one training of one arm with one seed. Everything here is a function of the results, nothing trains.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.special import stdtrit  # scipy.stats has it too, and takes most of a second to import

from checkpoint import atomic_path
from errors import UserError

MINIMUM_SEEDS = 3  # with fewer there are figures and no verdict
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cost:
    """What an arm costs: its size, its multiply-adds for one image, and its speed on one machine."""

    arm: str
    parameters: int
    multiply_adds: int  # of a forward pass
    training_multiply_adds: int  # of a training step, the backward pass counted as two forward ones
    images_per_second: float  # in training
    machine: str


@dataclass(frozen=True)
class Result:
    """One finished training: what it cost, and the held-out eps-MSE at its end."""

    arm: str
    seed: int
    parameters: int
    multiply_adds: int  # of one forward pass of one image
    lr: float
    images: int
    training_multiply_adds: float  # of the whole training
    seconds: float  # at the arm's speed
    eps_mse: float


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each arm, by seed; arms in the order in which they first come."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    return {arm: sorted(part, key=lambda result: result.seed) for arm, part in arms.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % interval) of normal values, by Student's t; NaN for the latter from one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error


def paired_differences(arm: Sequence[Result], reference: Sequence[Result]) -> list[float]:
    """eps-MSE of the arm less the reference's, for each seed that both have: the seed's own luck cancels."""
    of_reference = {result.seed: result.eps_mse for result in reference}
    return [result.eps_mse - of_reference[result.seed] for result in arm if result.seed in of_reference]


@dataclass(frozen=True)
class Ratio:
    """Parameters of the smallest U-Net that matches, over the model's: a value, or a bound where the ladder ends."""

    value: float
    bound: str = ""  # "<" if the smallest U-Net already matches, ">" if none does

    def __str__(self) -> str:
        return f"{self.bound}{' ' if self.bound else ''}{self.value:.2g}"


def parameter_ratio(loss: float, parameters: int, ladder: Sequence[tuple[int, float]]) -> Ratio:
    """Of a model's loss and size, against U-Nets as (parameters, loss): the first crossing along the ladder.

    Between two rungs the loss is taken as linear in the logarithm of the parameters. Raises ValueError without rungs.
    """
    if not ladder:
        raise ValueError("a ratio needs at least one U-Net")
    rungs = sorted(ladder)
    if rungs[0][1] <= loss:
        return Ratio(rungs[0][0] / parameters, "<")
    for (small, above), (large, below) in pairwise(rungs):
        if below <= loss:
            share = (above - loss) / (above - below)
            return Ratio(math.exp(math.log(small) + share * (math.log(large) - math.log(small))) / parameters)
    return Ratio(rungs[-1][0] / parameters, ">")


def ratio_line(arms: dict[str, list[Result]], arm: str) -> str:
    """The parameter-efficiency ratio of an arm: of the mean losses, and with enough seeds its interval over them."""
    unets = {name: part for name, part in arms.items() if name.startswith("unet:")}
    own = arms[arm]
    mean_loss = np.mean([result.eps_mse for result in own])
    ladder = [(part[0].parameters, float(np.mean([result.eps_mse for result in part]))) for part in unets.values()]
    text = f"Parameter-efficiency ratio of `{arm}`: {parameter_ratio(mean_loss, own[0].parameters, ladder)}"
    each = []
    for result in own:
        rungs = [(o.parameters, o.eps_mse) for part in unets.values() for o in part if o.seed == result.seed]
        if len(rungs) == len(unets):
            each.append(parameter_ratio(result.eps_mse, result.parameters, rungs))
    if len(each) < MINIMUM_SEEDS:
        return f"{text} (no interval: fewer than {MINIMUM_SEEDS} seeds have every U-Net)."
    if any(ratio.bound for ratio in each):
        return f"{text} (by seed: {', '.join(map(str, each))}; a bound has no interval)."
    middle, half = interval([math.log(ratio.value) for ratio in each])
    return f"{text} (95 % interval over seeds {math.exp(middle - half):.2g} to {math.exp(middle + half):.2g})."


def markdown(results: Sequence[Result], wiener: float | None, reference: str) -> str:
    """The table: mean +- standard deviation over seeds and, with enough of them, paired differences to `reference`."""
    arms = by_arm(results)
    lines = [
        "| arm | parameters | multiply-adds | lr | images | training multiply-adds | seconds | seeds "
        f"| held-out eps-MSE | less `{reference}`, paired, 95 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, part in sorted(arms.items(), key=lambda item: np.mean([result.eps_mse for result in item[1]])):
        losses = [result.eps_mse for result in part]
        spread = f" ± {np.std(losses, ddof=1):.5f}" if len(part) > 1 else ""
        differences = paired_differences(part, arms.get(reference, []))
        if arm == reference:
            versus = ""
        elif len(differences) >= MINIMUM_SEEDS:
            middle, half = interval(differences)
            versus = f"{middle:+.5f} ± {half:.5f}"
        else:
            versus = "no verdict" if differences else ""
        first = part[0]
        lines.append(
            f"| `{arm}` | {first.parameters:,} | {first.multiply_adds / 1e6:.1f} M | {first.lr:g} "
            f"| {np.mean([r.images for r in part]):,.0f} | {np.mean([r.training_multiply_adds for r in part]):.3g} "
            f"| {np.mean([r.seconds for r in part]):,.0f} | {len(part)} | {np.mean(losses):.5f}{spread} | {versus} |"
        )
    if wiener is not None:
        lines.append(f"| `wiener` (closed form) | | | | | | | | {wiener:.5f} | |")
    if reference in arms and any(arm.startswith("unet:") for arm in arms):
        lines += ["", ratio_line(arms, reference)]
    if any(len(part) < MINIMUM_SEEDS for part in arms.values()):
        lines += ["", f"An arm with fewer than {MINIMUM_SEEDS} seeds has figures and no verdict."]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Point:
    """One measurement along a training."""

    arm: str
    seed: int
    images: int
    seconds: float
    eps_mse: float


def save_rows(rows: Sequence[Cost] | Sequence[Result] | Sequence[Point], path: Path) -> None:
    """Write one CSV row each."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)


def read_rows(kind: type[Cost] | type[Result] | type[Point], path: Path) -> list:
    """What `save_rows` wrote; nothing if there is no such file. Raises UserError, naming it, for anything else."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [kind(**{f.name: f.type(row[f.name]) for f in fields(kind)}) for row in csv.DictReader(file)]
    except (KeyError, OSError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not the rows of a comparison ({error})") from error


def save_curves(results: Sequence[Result], points: Sequence[Point], path: Path) -> None:
    """Held-out eps-MSE of every arm, mean over seeds, against images, training multiply-adds and seconds, as PNG."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for arm, part in by_arm(results).items():
        runs = [[p for p in points if (p.arm, p.seed) == (arm, result.seed)] for result in part]
        runs = [run for run in runs if run and len(run) == max(map(len, runs))]  # seconds end at slightly other steps
        if not runs:
            continue
        loss, images, seconds = (
            np.mean([[getattr(p, name) for p in run] for run in runs], axis=0)
            for name in ("eps_mse", "images", "seconds")
        )
        an_image = part[0].training_multiply_adds / part[0].images
        for panel, x in zip(panels, (images, images * an_image, seconds), strict=True):
            panel.plot(x, loss, "o-", label=arm, linewidth=1, markersize=3)
    for panel, label in zip(panels, ("images", "training multiply-adds", "seconds of training"), strict=True):
        panel.set(xlabel=label, xscale="log", yscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("held-out eps-MSE")
    panels[0].legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
