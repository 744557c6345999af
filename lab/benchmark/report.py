"""The report of a benchmark as Markdown tables, the most important ratios first, and a plot. Nothing here measures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.files import save_figure

Report = dict[str, Any]
PASSES = {"forward": "forward", "training": "forward and backward"}  # their names in the tables
SAME_OUTPUT = 1e-4  # of the largest value: larger differences do not come from rounding


def dig(report: Any, *keys: str) -> Any:
    """The value under nested keys, or None if it was not measured."""
    for key in keys:
        report = report.get(key) if isinstance(report, dict) else None
    return report


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, or None if one of them was not measured."""
    return a / b if a and b else None


def goals(report: Report) -> list[tuple[str, float | None, str]]:
    """(name, value, unit) of the most important figures; the value is None if its section was left out."""
    batch = report["settings"]["batch_size"]
    speed = {arm: dig(part, "images_per_second") for arm, part in report.get("train", {}).items()}
    by_torch = dig(report, "train", "true", "plain", "images_per_second")
    cells = {name: dig(part, "seconds") for name, part in (dig(report, "peers", "cell", "peers") or {}).items()}
    steps = {name: dig(part, "seconds") for name, part in (dig(report, "peers", "train_step") or {}).items()}
    drawing = {arm: dig(part, "seconds") for arm, part in (dig(report, "sampling", "arms") or {}).items()}
    alone = dig(report, "convolutions", "arms", "true") or {}
    memory = [part for part in (dig(report, "memory", "true") or {}).values() if "peak_bytes" in part]
    least = min(memory, key=lambda part: part["peak_bytes"], default={})
    peak, own = least.get("peak_bytes"), least.get("step_bytes")
    ours = cells.get("ours")
    drawn = "{images} images in {steps} steps".format(**report["sampling"]) if "sampling" in report else "images"
    return [
        (f"training step over its convolutions alone, batch {batch}", alone.get("step_over_convolutions"), "x"),
        ("training step over its multiply-adds at matrix rate", alone.get("step_over_matrix_rate"), "x"),
        ("training step over its convolutions' bytes at copy bandwidth", alone.get("step_over_copy_bandwidth"), "x"),
        ("training images/s over `unet:38k`'s", ratio(speed.get("true"), speed.get("unet:38k")), "x"),
        ("training images/s over those by plain torch", ratio(speed.get("true"), by_torch), "x"),
        (
            "training step with cells driven by torchdiffeq, over ours",
            ratio(steps.get("torchdiffeq"), steps.get("ours")),
            "x",
        ),
        ("detail cell driven by torchdiffeq, over ours", ratio(cells.get("torchdiffeq"), ours), "x"),
        ("ncps LTC, over our detail cell on the same pixels", ratio(cells.get("ncps ltc"), ours), "x"),
        ("ncps CfC, over our detail cell on the same pixels", ratio(cells.get("ncps cfc"), ours), "x"),
        (
            "ncps CfC unrolled over the ODE steps, over our detail cell",
            ratio(cells.get("ncps cfc-unrolled"), ours),
            "x",
        ),
        (f"`unet:35.7m` sampling {drawn}, over ours", ratio(drawing.get("unet:35.7m"), drawing.get("true")), "x"),
        ("a million training images", ratio(1e6, speed.get("true")), "s"),
        (f"peak memory of a training process, batch {batch}", peak and peak / 2**20, "MiB"),
        ("of this, the training steps alone", own and own / 2**20, "MiB"),
        ("`python sample.py`, process start to PNG", dig(report, "start", "seconds"), "s"),
        ("images/s of two processes over those of one", dig(report, "processes", "two_over_one"), "x"),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table, with floats to three digits and None as a dash."""

    def cell(value: object) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([cell(value) for value in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def markdown(report: Report) -> str:
    """The whole report: the conditions, the most important ratios, and one table per section."""
    settings, versions = report["settings"], report["versions"]
    side = settings["image_size"]
    lines = [
        f"# Benchmark: {report['machine']}",
        "",
        f"Device {report['device']}, {report['threads']} CPU threads, load average {report['load_average_at_start']} "
        f"at the start; {', '.join(f'{name} {version}' for name, version in versions.items())}. Batch "
        f"{settings['batch_size']}, random images 3x{side}x{side}. Medians over rounds of {settings['seconds']:g} s, "
        "taken in turn after a warm-up. Every model and cell is shown in its fastest variant of fp32 and bf16"
        + (" (nothing was compiled)." if settings["no_compile"] else ", as written and compiled.")
        + (" Plain torch means: without our C++ kernels." if dig(report, "train", "true", "plain") else ""),
        "",
        *table(("of the true liquid model", "value", "unit"), goals(report)),
    ]
    if (dig(report, "peers", "torchdiffeq_largest_difference") or 0) > SAME_OUTPUT:
        lines += ["**The cell driven by torchdiffeq gives another output, so its times mean nothing.**", ""]
    for section in (models, speeds, convolutions_alone, kernels, cells, growth):
        lines += section(report)
    return "\n".join(lines)


def arms(report: Report) -> list[str]:
    """The arms that were trained, drawn from, or whose memory was measured."""
    return list({**report.get("train", {}), **(dig(report, "sampling", "arms") or {}), **report.get("memory", {})})


def models(report: Report) -> list[str]:
    """One row per arm: its size and memory."""
    rows = []
    for arm in arms(report):
        train = dig(report, "train", arm) or {}
        peaks = ((dig(report, "memory", arm, p, "peak_bytes") or 0) / 2**20 or None for p in ("fp32", "bf16"))
        rows.append((f"`{arm}`", train.get("parameters"), train.get("multiply_adds"), *peaks))
    head = ("model", "parameters", "multiply-adds per image", "peak MiB fp32", "peak MiB bf16")
    return table(head, rows) if rows else []


def speeds(report: Report) -> list[str]:
    """One row per arm: how fast it trains and draws, as everybody runs it and by plain torch."""
    rows = []
    for arm in arms(report):
        train, draw = (dig(report, *keys, arm) or {} for keys in (("train",), ("sampling", "arms")))
        rate, by_torch = (dig(train, *keys, "images_per_second") for keys in ((), ("plain",)))
        whole = dig(draw, "steps_timed") == dig(report, "sampling", "steps")
        timed = "" if whole else f" ({draw['steps_timed']} steps timed)"
        rows.append(
            (f"`{arm}`", rate, train.get("best"), by_torch, dig(train, "plain", "best"), ratio(rate, by_torch),
             draw.get("seconds"), draw.get("best") and draw["best"] + timed, dig(draw, "plain", "seconds"),
             dig(draw, "plain", "best"))
        )  # fmt: skip
    head = ("model", "training images/s", "variant", "images/s by plain torch", "variant", "gain", "sampling s",
            "variant", "sampling s by plain torch", "variant")  # fmt: skip
    return table(head, rows) if rows else []


def convolutions_alone(report: Report) -> list[str]:
    """One row per arm: its training step over its convolutions alone by torch, and over two rates of the machine."""
    rows = [
        (f"`{arm}`", part["variant"], 1e3 * part["seconds_a_step"], 1e3 * part["convolutions_seconds"],
         part["step_over_convolutions"], part["step_over_matrix_rate"], part["step_over_copy_bandwidth"])
        for arm, part in (dig(report, "convolutions", "arms") or {}).items()
    ]  # fmt: skip
    head = ("model", "variant", "training step ms", "convolutions alone ms", "step over convolutions",
            "over matrix rate", "over copy bandwidth")  # fmt: skip
    return table(head, rows) if rows else []


def kernels(report: Report) -> list[str]:
    """The tables of our C++ kernels, or why there are none."""
    found = report.get("kernels", {})
    if "reason" in found:
        return [f"Our C++ kernels were not timed: {found['reason']}.", ""]
    return kernel_cells(found) + kernel_errors(found) + kernel_layers(found) if found else []


def kernel_cells(found: Report) -> list[str]:
    """For each pass, one row per cell, batch size and number of threads: its steps, and the convolutions among them."""
    lines, names = [], ("torch", "compiled", "convolutions, torch", "ours", "convolutions, ours")
    for part, title in PASSES.items():
        rows = []
        for row in found["cells"]:
            times = row[part]
            what = f"{row['cell']}, {row['channels']} channels, {row['side']}x{row['side']}, {row['steps']} steps"
            alone = times["convolutions, torch"]
            rows.append(
                (what, row["batch_size"], row["threads"], *(milliseconds(times.get(name)) for name in names),
                 ratio(times["ours"], alone), ratio(times["convolutions, ours"], alone))
            )  # fmt: skip
        head = (f"steps of the cell, {title}", "batch", "threads", "torch ms", "torch, compiled ms",
                "their convolutions by torch ms", "our cell ms", "their convolutions by ours ms",
                "our cell over torch's convolutions", "our convolutions over torch's")  # fmt: skip
        lines += table(head, rows)
    return lines


def kernel_errors(found: Report) -> list[str]:
    """One row per cell and who computed it: the largest errors against torch in double precision."""
    rows = [
        (f"{cell}, {who}", *errors.values())
        for cell, both in found["largest_errors"].items()
        for who, errors in both.items()
    ]
    gradients = (f"gradient of the {name}" for name in ("features", "offset", "weight"))
    return table(("largest error of the cell's steps, over the largest value", "output", *gradients), rows)


def kernel_layers(found: Report) -> list[str]:
    """One row per layer that our kernels compute besides the cells' steps, and one per arm: a training step's sum."""
    rows = []
    for arm, part in found["arms"].items():
        named = [
            (f"{row['layer']}, {row['inputs']} to {row['outputs']} channels, {row['side']}x{row['side']}", row)
            for row in part["layers"]
        ]
        for name, row in [*named, ("all calls of a training step", part["sum"])]:
            times = [(row[p]["torch"], row[p]["ours"]) for p in PASSES]
            figures = [x for a, b in times for x in (milliseconds(a), milliseconds(b), ratio(b, a))]
            rows.append((f"`{arm}`: {name}", row["calls_a_step"], *figures))
    columns = [f"{title}, {what}" for title in PASSES.values() for what in ("torch ms", "ours ms", "ours over torch")]
    return table(("layer", "calls per step", *columns), rows)


def milliseconds(seconds: float | None) -> float | None:
    """The same time, if it was measured."""
    return seconds and 1e3 * seconds


def cells(report: Report) -> list[str]:
    """One row for our detail cell and each of its peers."""
    about = dig(report, "peers", "cell")
    if not about:
        return []
    ours = about["peers"]["ours"]["seconds"]
    rows = [
        (
            name,
            part["best"],
            part["seconds"] and 1e3 * part["seconds"],
            ratio(part["seconds"], ours),
            part["pixels_timed"],
        )
        for name, part in about["peers"].items()
    ]
    what = f"detail cell, {about['inputs']} inputs, {about['units']} units, {about['ode_steps']} steps"
    head = (
        what,
        "variant",
        f"forward and backward ms, {about['pixels']:,} pixels",
        "over ours",
        "pixels timed (scaled to all)",
    )
    return table(head, rows)


def growth(report: Report) -> list[str]:
    """Training images/s by batch and image size, and the time of a training step by ODE steps."""
    lines, found = [], report.get("growth", {})
    for key, name in (("batch_size", "batch"), ("image_side", "image side")):
        sizes = found.get(key, {})
        rows = [
            [f"`{arm}`", *(dig(sizes, size, arm, "images_per_second") for size in sizes)]
            for arm in found.get("variants", {})
        ]
        lines += table((f"training images/s by {name}", *sizes), rows) if rows else []
    steps = found.get("ode_steps", {})
    if steps:
        rows = [["ms", *(part.get("seconds") and 1e3 * part["seconds"] for part in steps.values())]]
        lines += table(("training step of `true` by ODE steps", *steps), rows)
    return lines


def save_plot(report: Report, path: Path) -> None:
    """Plot training speeds, by batch and image size and by ODE steps, as PNG; one panel for each that was measured."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    found = report.get("growth", {})
    train = {
        arm: part["images_per_second"] for arm, part in report.get("train", {}).items() if part["images_per_second"]
    }
    panels = [name for name in ("batch_size", "image_side", "ode_steps") if found.get(name)]
    panels = (["train"] if train else []) + panels
    if not panels:
        return
    figure = Figure(figsize=(11, 3.8 * -(-len(panels) // 2)), layout="constrained")
    figure.suptitle(report["machine"])
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), 2 if len(panels) > 1 else 1, i + 1)
        axes.grid(alpha=0.3, which="both")
        axes.set_axisbelow(True)
        if panel == "train":
            bars = axes.bar(list(train), list(train.values()), color="tab:blue")
            axes.bar_label(bars, fmt=lambda value: f"{value:.3g}")
            axes.set(ylabel="training images/s", yscale="log", title=f"batch {report['settings']['batch_size']}")
            axes.margins(y=0.15)
        elif panel == "ode_steps":
            points = [
                (sum(map(int, steps.split())), 1e3 * part["seconds"])
                for steps, part in found[panel].items()
                if "seconds" in part
            ]
            axes.plot(*zip(*points, strict=True), "o-")
            axes.set(xlabel="ODE steps of the three cells together", ylabel="training step, ms", title="true")
            axes.set(xlim=(0, None), ylim=(0, None))
        else:
            for arm in found["variants"]:
                rates = {int(size): dig(parts, arm, "images_per_second") for size, parts in found[panel].items()}
                points = [(size, rate) for size, rate in rates.items() if rate]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", label=arm)
            axes.set(xlabel=panel.replace("_", " "), ylabel="training images/s", xscale="log", yscale="log")
            sizes = [int(size) for size in found[panel]]
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xticks([], minor=True)
            axes.legend()
    save_figure(path, figure, dpi=120)
