"""Speed, side by side and in one run: the models, what a user would otherwise pick, and the limit of this machine.

python benchmark.py                                   # all of it
python benchmark.py --device cuda --batch-size 512
python benchmark.py --sections peers floor --no-compile

No data set is needed: the images are random. Whatever is compared takes turns in rounds after a warm-up, and the
median round counts; every model and cell is measured in fp32 and bf16, as written and compiled, and stands with what
is best for it. Leave the machine alone meanwhile. `benchmark.json` has every round, `benchmark.md` the table.
"""

import interrupted_import  # noqa: F401  # isort: skip

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from benchmark_report import markdown, save_plot
from benchmark_sections import NEED_TRAIN, SECTIONS, Bench, Variant
from checkpoint import atomic_path, check_writable, make_folder, save_json
from command_line import Parser, integer, number, run
from errors import UserError
from hardware import DEVICES, choose_device, has_bf16, keep_freed_memory, out_of_memory_named
from speed import machine_name

PACKAGES = ("diffusers", "torchdiffeq", "ncps")


def parser() -> Parser:
    """All flags."""
    p = Parser(prog="benchmark.py", description="Measure speed against peers and against the limit of this machine.")
    p.add_argument("--device", choices=DEVICES, default="auto", help="auto: cuda, else mps, else cpu")
    p.add_argument("--batch-size", type=integer(1, 10**6), default=64, help="images a training step")
    p.add_argument("--image-size", type=integer(8, 4096), default=32, help="side of the images, a multiple of 8")
    p.add_argument(
        "--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
        help=f"what to measure: {', '.join(SECTIONS)}; {', '.join(sorted(NEED_TRAIN))} need and bring train",
    )  # fmt: skip
    p.add_argument(
        "--seconds", type=number("greater than 0", lambda v: v > 0), default=1.0, help="of a round of a measurement"
    )
    p.add_argument("--no-compile", action="store_true", help="leave out torch.compile, a minute a model and precision")
    p.add_argument("--output-dir", default="benchmarks", help="where benchmark.json, .md and .png are written")
    return p


def conditions(s: argparse.Namespace, device: torch.device) -> dict:
    """What a reader has to know to compare with figures of their own."""
    return {
        "machine": machine_name(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": {
            name: getattr(s, name) for name in ("batch_size", "image_size", "sections", "seconds", "no_compile")
        },
        "images": "random uint8",
        "units": "seconds: of one call (a step, a sampling, a pass), the median of rounds; bytes; "
        "multiply-adds: of a forward pass of one image where not said to be of a step",
    }


def main() -> None:
    """Parse, check, measure section by section, tell."""
    s = parser().parse_args()
    folder = Path(s.output_dir)
    check_writable(folder, "--output-dir")
    keep_freed_memory()
    device = choose_device(s.device)
    if s.image_size % 8:
        raise UserError(f"--image-size: must be a multiple of 8, got {s.image_size}")
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"benchmark.py needs {name}; pip install -r requirements-compare.txt")
    s.sections = [name for name in SECTIONS if name in s.sections or (name == "train" and NEED_TRAIN & {*s.sections})]
    precisions = ("fp32", "bf16") if has_bf16(device) else ("fp32",)
    variants = [Variant(p, c) for c in ((False,) if s.no_compile else (False, True)) for p in precisions]
    bench = Bench(device, s.batch_size, s.image_size, s.seconds, variants)
    make_folder(folder, "--output-dir")
    report = conditions(s, device)
    print(f"{report['machine']}: leave it alone meanwhile", flush=True)
    for name in s.sections:
        print(f"measuring {name}", flush=True)
        torch._dynamo.reset()
        try:
            with out_of_memory_named(s.batch_size, "a smaller --image-size"):
                report[name] = SECTIONS[name](bench)
        except KeyboardInterrupt:
            done = s.sections[: s.sections.index(name)]
            raise KeyboardInterrupt(f"{folder / 'benchmark.json'} has {', '.join(done)}" if done else "") from None
        save_json(folder / "benchmark.json", report)
    table = markdown(report)
    with atomic_path(folder / "benchmark.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    save_plot(report, folder / "benchmark.png")
    print(table)
    for name in ("benchmark.json", "benchmark.md", "benchmark.png"):
        if (folder / name).exists():
            print(folder / name)


if __name__ == "__main__":
    run("benchmark.py", main)
