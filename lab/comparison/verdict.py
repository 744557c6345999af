"""The tables of a comparison, with means, paired differences and the parameter-efficiency ratio, and its curves.

A result is one training run of one arm with one seed. Everything here is computed from results, and nothing trains.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit  # scipy.stats has it, too, but takes most of a second to import

from runtime.errors import UserError, reason
from runtime.files import atomic_path, save_figure

MINIMUM_SEEDS = 3  # with fewer the tables have figures but no verdict
CONFIDENCE = 0.95
# what the arms are compared by: figure -> (its name, digits); less is better
COMPARED = {"eps_mse": ("held-out eps-MSE", 5), "fd": ("FD", 3)}


@dataclass(frozen=True)
class Cost:
    """What an arm costs: its size, its multiply-adds per image, and its speed on one machine."""

    arm: str
    parameters: int
    multiply_adds: int  # per forward pass
    training_multiply_adds: int  # per training step; a backward pass counts as two forward passes
    images_per_second: float  # of training
    machine: str
    plain_images_per_second: float = math.nan  # by torch alone, without our C++ kernels


@dataclass(frozen=True)
class Result:
    """One finished training run: what it cost, and the held-out eps-MSE at its end.

    Its samples may have been measured, too: their FD, KID and the share recognised as the class that was asked for.
    """

    arm: str
    seed: int
    parameters: int
    multiply_adds: int  # per forward pass of one image
    lr: float
    images: int
    training_multiply_adds: float  # of the whole run
    seconds: float  # at the speed of the arm
    eps_mse: float
    fd: float = math.nan
    kid: float = math.nan
    recognised: float = math.nan


def with_figure(results: Sequence[Result], figure: str) -> list[Result]:
    """The results of which this figure was measured."""
    return [result for result in results if not math.isnan(getattr(result, figure))]


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each arm, sorted by seed; the arms in order of first appearance."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    return {arm: sorted(part, key=lambda result: result.seed) for arm, part in arms.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % interval) of normal values, by Student's t; of one value the half-width is NaN."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error


def paired_differences(arm: Sequence[Result], reference: Sequence[Result], figure: str = "eps_mse") -> list[float]:
    """The arm's figure minus the reference's for each seed that both have, so that the effect of the seed cancels."""
    of_reference = {result.seed: getattr(result, figure) for result in with_figure(reference, figure)}
    measured = with_figure(arm, figure)
    return [getattr(result, figure) - of_reference[result.seed] for result in measured if result.seed in of_reference]


@dataclass(frozen=True)
class Ratio:
    """Parameters of the smallest U-Net as good as the model, divided by the model's: a value or, at the ends, a bound.

    The U-Nets of increasing size are called the ladder.
    """

    value: float
    bound: str = ""  # "<" if even the smallest U-Net is as good, ">" if none is

    def __str__(self) -> str:
        return f"{self.bound}{' ' if self.bound else ''}{self.value:.2g}"


def parameter_ratio(loss: float, parameters: int, ladder: Sequence[tuple[int, float]]) -> Ratio:
    """The ratio for a model of this loss and size, from a ladder of U-Nets (parameters, loss).

    It is where the loss along the ladder first falls to the model's. Between two U-Nets the loss is interpolated
    linearly in the logarithm of the parameters. Raises ValueError without U-Nets.
    """
    if not ladder:
        raise ValueError("a ratio needs at least one U-Net")
    rungs = sorted(ladder)
    if rungs[0][1] <= loss:
        return Ratio(rungs[0][0] / parameters, "<")
    for (small, above), (large, below) in pairwise(rungs):
        if below <= loss:
            part = (above - loss) / (above - below)
            return Ratio(math.exp(math.log(small) + part * (math.log(large) - math.log(small))) / parameters)
    return Ratio(rungs[-1][0] / parameters, ">")


def ratio_line(results: Sequence[Result], arm: str, figure: str = "eps_mse") -> str:
    """A line on the parameter-efficiency ratio of an arm, from mean figures; with enough seeds also its interval.

    It is empty unless the figure was measured of the arm and of a U-Net.
    """
    arms = by_arm(with_figure(results, figure))
    unets = {name: part for name, part in arms.items() if name.startswith("unet:")}
    if arm not in arms or not unets:
        return ""

    def mean(part: Sequence[Result]) -> float:
        return float(np.mean([getattr(result, figure) for result in part]))

    own = arms[arm]
    ladder = [(part[0].parameters, mean(part)) for part in unets.values()]
    text = f"Parameter-efficiency ratio of `{arm}` in {COMPARED[figure][0]}: "
    text += str(parameter_ratio(mean(own), own[0].parameters, ladder))
    each = []
    for result in own:
        rungs = [(o.parameters, getattr(o, figure)) for part in unets.values() for o in part if o.seed == result.seed]
        if len(rungs) == len(unets):
            each.append(parameter_ratio(getattr(result, figure), result.parameters, rungs))
    if len(each) < MINIMUM_SEEDS:
        return f"{text} (no interval: it needs at least {MINIMUM_SEEDS} seeds with every U-Net)."
    if any(ratio.bound for ratio in each):
        return f"{text} (by seed: {', '.join(map(str, each))}; bounds have no interval)."
    middle, half = interval([math.log(ratio.value) for ratio in each])
    return f"{text} (95 % interval over seeds {math.exp(middle - half):.2g} to {math.exp(middle + half):.2g})."


def spread(part: Sequence[Result], figure: str, digits: int) -> str:
    """Mean +- standard deviation of a figure over seeds; empty if it was not measured."""
    values = [getattr(result, figure) for result in with_figure(part, figure)]
    if not values:
        return ""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def versus(part: Sequence[Result], reference: Sequence[Result], figure: str, digits: int) -> str:
    """The paired difference from the reference with its interval, if there are seeds enough; of itself nothing."""
    differences = paired_differences(part, reference, figure)
    if not differences or part[0].arm == reference[0].arm:
        return ""
    if len(differences) < MINIMUM_SEEDS:
        return "no verdict"
    middle, half = interval(differences)
    return f"{middle:+.{digits}f} ± {half:.{digits}f}"


def markdown(results: Sequence[Result], wiener: float | None, reference: str) -> str:
    """The table: means +- standard deviations over seeds, and with enough seeds paired differences from `reference`."""
    arms = by_arm(results)
    compared = {figure: about for figure, about in COMPARED.items() if with_figure(results, figure)}
    recognised = bool(with_figure(results, "recognised"))
    names = ["arm", "parameters", "multiply-adds", "lr", "images", "training multiply-adds", "seconds", "seeds"]
    for name, _ in compared.values():
        names += [name, f"difference from `{reference}` (paired, 95 % interval)"]
    names += ["recognised"] * recognised
    lines = [row(names), row(["---", *["---:"] * (len(names) - 1)])]
    for arm, part in sorted(arms.items(), key=lambda item: np.mean([result.eps_mse for result in item[1]])):
        first = part[0]
        cells = [f"`{arm}`", f"{first.parameters:,}", f"{first.multiply_adds / 1e6:.1f} M", f"{first.lr:g}"]
        cells.append(f"{np.mean([r.images for r in part]):,.0f}")
        cells.append(f"{np.mean([r.training_multiply_adds for r in part]):.3g}")
        cells += [f"{np.mean([r.seconds for r in part]):,.0f}", str(len(part))]
        for figure, (_, digits) in compared.items():
            cells += [spread(part, figure, digits), versus(part, arms.get(reference, []), figure, digits)]
        lines.append(row([*cells, *[spread(part, "recognised", 3)] * recognised]))
    if wiener is not None:
        cells = ["`wiener` (closed form)", *[""] * 7, f"{wiener:.5f}"]
        lines.append(row([*cells, *[""] * (len(names) - len(cells))]))
    ratios = [ratio_line(results, reference, figure) for figure in compared]
    for ratio in filter(None, ratios):
        lines += ["", ratio]
    if any(len(part) < MINIMUM_SEEDS for part in arms.values()):
        lines += ["", f"An arm with fewer than {MINIMUM_SEEDS} seeds has figures but no verdict."]
    return "\n".join(lines) + "\n"


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def speeds(costs: Mapping[str, Cost], arms: Iterable[str]) -> str:
    """The training speeds of these arms as a table: as they are run, and by torch alone."""
    lines = ["", "| arm | training images per second | by torch alone | machine |", "| --- | ---: | ---: | --- |"]
    for cost in (costs[arm] for arm in arms):
        plain = "" if math.isnan(cost.plain_images_per_second) else f"{cost.plain_images_per_second:,.0f}"
        lines.append(f"| `{cost.arm}` | {cost.images_per_second:,.0f} | {plain} | {cost.machine} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Point:
    """One measurement during a training run."""

    arm: str
    seed: int
    images: int
    seconds: float
    eps_mse: float


def save_rows(rows: Sequence[Cost] | Sequence[Result] | Sequence[Point], path: Path) -> None:
    """Write the rows as CSV, with a header; what was not measured stays empty."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for values in map(vars, rows):
            writer.writerow({name: "" if value != value else value for name, value in values.items()})


def read_rows(kind: type[Cost] | type[Result] | type[Point], path: Path) -> list:
    """Read what `save_rows` wrote; no rows if the file is missing. Raises UserError, naming it, if it is unreadable."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            types: dict[str, Any] = {field.name: field.type for field in fields(kind)}
            table = csv.DictReader(file)
            there = [name for name in types if name in (table.fieldnames or [])]
            needed = [field.name for field in fields(kind) if field.default is MISSING]
            lacking = [name for name in needed if name not in there]
            if lacking:
                raise ValueError(f"it has no column {lacking[0]!r}")
            return [kind(**{name: types[name](cells[name]) for name in there if cells[name] != ""}) for cells in table]
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not of a comparison ({reason(error)}); use another --output-dir") from error


def save_curves(results: Sequence[Result], points: Sequence[Point], path: Path) -> None:
    """Plot each arm's eps-MSE, averaged over seeds, against images, training multiply-adds and seconds, as PNG."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for arm, part in by_arm(results).items():
        runs = [[p for p in points if (p.arm, p.seed) == (arm, result.seed)] for result in part]
        # with a budget of seconds, runs may end at slightly different steps
        runs = [run for run in runs if run and len(run) == max(map(len, runs))]
        if not runs:
            continue
        loss, images, seconds = (
            np.mean([[getattr(p, name) for p in run] for run in runs], axis=0)
            for name in ("eps_mse", "images", "seconds")
        )
        per_image = part[0].training_multiply_adds / part[0].images
        for panel, x in zip(panels, (images, images * per_image, seconds), strict=True):
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
    save_figure(path, figure, dpi=120)
