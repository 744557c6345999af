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

import importlib.util
from pathlib import Path

from choices import DEVICES, NEED_TRAIN, SECTIONS
from runtime.command_line import Parser, file_or_folder, integer, number, run, slow_imports
from runtime.errors import UserError
from runtime.files import check_writable

PACKAGES = ("diffusers", "torchdiffeq", "ncps")


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
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help=f"what to measure: {', '.join(SECTIONS)}; {', '.join(sorted(NEED_TRAIN))} also run train first")
    add("--seconds", type=number(0, 3600, "no median gets better with more", without=(0,)), default=1.0,
        help="seconds per timing round")
    add("--no-compile", action="store_true",
        help="leave out torch.compile, which takes a minute per model and precision")
    add("--output-dir", type=file_or_folder, default="benchmarks",
        help="where benchmark.json, .md and .png are written")
    # fmt: on
    return p


def main() -> None:
    """Parse, check, measure section by section, tell."""
    s = parser().parse_args()
    folder = Path(s.output_dir)
    check_writable(folder, "--output-dir")
    if s.image_size % 8:
        raise UserError(f"--image-size: must be a multiple of 8, got {s.image_size}")
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"benchmark.py needs {name}; pip install -r requirements-compare.txt")
    s.sections = [name for name in SECTIONS if name in s.sections or (name == "train" and NEED_TRAIN & {*s.sections})]

    with slow_imports():
        from lab.benchmark.procedure import measure_and_write
    measure_and_write(s, folder, PACKAGES)


if __name__ == "__main__":
    run("benchmark.py", main)
