"""Measure speed in one run: the models, the libraries one would otherwise use, and the parts of a step by themselves.

python benchmark.py                                   # everything
python benchmark.py --device cuda --batch-size 512
python benchmark.py --sections peers convolutions --no-compile

No data set is needed, since the images are random. After a warm-up, whatever is compared takes turns in rounds, and the
median round counts. Every model and cell is timed in each precision that the processor has, as written and compiled,
and reported with its fastest variant; the models also by plain torch, without our C++ kernels. Do nothing else on the
machine meanwhile. `benchmark.json` has every round, `benchmark.md` the tables.
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

import argparse
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from lab.benchmark.report import markdown, save_plot
from lab.benchmark.sections import NEED_TRAIN, SECTIONS, Bench, Variant
from runtime.command_line import Parser, file_or_folder, integer, number, run
from runtime.errors import UserError
from runtime.files import check_writable, make_folder, save_json, save_text
from runtime.hardware import (
    DEVICES,
    choose_device,
    has_bf16,
    keep_freed_memory,
    machine_name,
    out_of_memory_named,
    stay_within_memory,
)

PACKAGES = ("diffusers", "torchdiffeq", "ncps")
MOST_COMPILED = 64  # of one network: for each arm of its kind, precision and reading; torch would stop at 8


def parser() -> Parser:
    """All flags."""
    p = Parser(prog="benchmark.py", description="Measure speed against other libraries and the rates of this machine.")
    add = p.add_argument
    # fmt: off
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one, else mps, else cpu")
    add("--batch-size", type=integer(1, 2**16, "more need more memory and are no faster"), default=64,
        help="images per training step")
    add("--image-size", type=integer(8, 4096, "larger ones need more memory than machines have"), default=32,
        help="side of the images in pixels, a multiple of 8")
    add("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
        help=f"what to measure: {', '.join(SECTIONS)}; {', '.join(sorted(NEED_TRAIN))} also run train first")
    add("--seconds", type=number(0, 3600, "no median gets better with more", without=(0,)), default=1.0,
        help="seconds per timing round")
    add("--no-compile", action="store_true",
        help="leave out torch.compile, which takes a minute per model and precision")
    add("--output-dir", type=file_or_folder, default="benchmarks",
        help="where benchmark.json, .md and .png are written")
    # fmt: on
    return p


def conditions(s: argparse.Namespace, device: torch.device) -> dict:
    """What readers have to know to compare the figures with their own."""
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
        "units": "seconds per call (a step, a sampling, a pass), the median of rounds; bytes; "
        "multiply-adds per forward pass of one image unless they are said to be per step",
    }


def main() -> None:
    """Parse, check, measure section by section, tell."""
    s = parser().parse_args()
    folder = Path(s.output_dir)
    check_writable(folder, "--output-dir")
    keep_freed_memory()
    device = choose_device(s.device)
    stay_within_memory(device)
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
    print(f"{report['machine']}: do nothing else on it meanwhile", flush=True)
    for name in s.sections:
        print(f"measuring {name}", flush=True)
        torch._dynamo.reset()
        try:
            patch = torch._dynamo.config.patch(recompile_limit=MOST_COMPILED)
            with out_of_memory_named(s.batch_size, "a smaller --image-size"), patch:
                report[name] = SECTIONS[name](bench)
        except KeyboardInterrupt:
            done = s.sections[: s.sections.index(name)]
            raise KeyboardInterrupt(f"{folder / 'benchmark.json'} has {', '.join(done)}" if done else "") from None
        save_json(folder / "benchmark.json", report)
    table = markdown(report)
    save_text(folder / "benchmark.md", table)
    save_plot(report, folder / "benchmark.png")
    print(table)
    for name in ("benchmark.json", "benchmark.md", "benchmark.png"):
        if (folder / name).exists():
            print(folder / name)


if __name__ == "__main__":
    run("benchmark.py", main)
