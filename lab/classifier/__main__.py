"""Train a small classifier of a data set, in whose features `evaluate.py` compares samples with images.

python -m lab.classifier --dataset folder --data-dir IMAGES --output classifier.safetensors
python evaluate.py --checkpoint RUN --classifier classifier.safetensors
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

import shlex
import sys
import time

from choices import DATASETS, DEVICES
from runtime.command_line import Parser, file_or_folder, integer, run, slow_imports
from runtime.files import make_folder, output_file

PROG = "python -m lab.classifier"


def parser() -> Parser:
    """All flags."""
    p = Parser(prog=PROG, description="Train a small classifier of a data set, for evaluate.py and compare.py.")
    add = p.add_argument
    # fmt: off
    add("--dataset", choices=DATASETS, default="cifar10", help="which images; those of a folder are its subfolders'")
    add("--data-dir", type=file_or_folder, default="data", help="where the data set is, or is downloaded to")
    add("--image-size", type=integer(4, 4096, "larger images would need a larger network"),
        help="resize to squares with this side (default: as they are; 32 for a folder)")
    add("--skip-bad-images", action="store_true", help="with --dataset folder: leave out images that cannot be read")
    add("--images", type=integer(1, 10**9, "it would take weeks"), default=1_000_000,
        help="how many training images are seen in total")
    add("--seed", type=integer(0, 10**12, "larger ones give nothing new"), default=0,
        help="of the first weights, and of the order, shifts and flips of the images")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one, else mps, else cpu")
    add("--output", type=file_or_folder, metavar="FILE", default="classifier.safetensors",
        help="where the classifier is written")
    # fmt: on
    return p


def main() -> None:
    """Parse, check, train, write."""
    args = parser().parse_args()
    output = output_file(args.output, "--output", ".safetensors")
    with slow_imports():
        from images.datasets import load_images
        from lab.classifier.training import save_and_check, train_classifier
        from runtime.errors import user_errors
        from runtime.hardware import choose_device, keep_freed_memory, make_reproducible, out_of_memory_named
        from runtime.progress import progress_bar
    keep_freed_memory()
    device = choose_device(args.device)
    make_reproducible(device)
    data = load_images(args.dataset, args.data_dir, args.image_size, skip_bad_images=args.skip_bad_images)
    make_folder(output.parent, "--output")
    started = time.monotonic()
    with progress_bar(total=args.images, unit="img") as bar, out_of_memory_named(0, "a smaller --image-size"):

        def on_batch(count: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(count)

        with user_errors("--dataset"):
            classifier = train_classifier(data, images=args.images, seed=args.seed, device=device, on_batch=on_batch)
    about = save_and_check(output, classifier.cpu(), data, shlex.join([*PROG.split(), *sys.argv[1:]]))
    right, minutes = about["held_out"], (time.monotonic() - started) / 60
    print(f"{right['accuracy']:.1%} of {right['n']:,} held-out images are read rightly, after {minutes:.1f} min")
    print(output)


if __name__ == "__main__":
    run(PROG, main)
