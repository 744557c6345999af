"""What `benchmark.py` does: measure section by section, and write the report after each."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from lab.benchmark.report import markdown, save_plot
from lab.benchmark.sections import SECTIONS, Bench, Variant
from runtime.files import make_folder, save_json, save_text
from runtime.hardware import (
    choose_device,
    has_bf16,
    keep_freed_memory,
    machine_name,
    out_of_memory_named,
    stay_within_memory,
)

MOST_COMPILED = 64  # of one network: for each arm of its kind, precision and reading; torch would stop at 8


def measure_and_write(s: argparse.Namespace, folder: Path, packages: Sequence[str]) -> None:
    """Measure what the flags of `benchmark.py` say. packages: those whose versions the report names."""
    keep_freed_memory()
    device = choose_device(s.device)
    stay_within_memory(device)
    precisions = ("fp32", "bf16") if has_bf16(device) else ("fp32",)
    variants = [Variant(p, c) for c in ((False,) if s.no_compile else (False, True)) for p in precisions]
    bench = Bench(device, s.batch_size, s.image_size, s.seconds, variants)
    make_folder(folder, "--output-dir")
    report = conditions(s, device, packages)
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


def conditions(s: argparse.Namespace, device: torch.device, packages: Sequence[str]) -> dict:
    """What readers have to know to compare the figures with their own."""
    return {
        "machine": machine_name(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: importlib.metadata.version(name) for name in packages},
        "settings": {
            name: getattr(s, name) for name in ("batch_size", "image_size", "sections", "seconds", "no_compile")
        },
        "images": "random uint8",
        "units": "seconds per call (a step, a sampling, a pass), the median of rounds; bytes; "
        "multiply-adds per forward pass of one image unless they are said to be per step",
    }
