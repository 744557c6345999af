"""Write a trained model as ONNX files, to draw from it without torch: in a browser, in C++, on a phone.

python export.py                                                 # the published weights, into exported/true-cifar10
python export.py --checkpoint runs/00003-true-cifar10 --output FOLDER
python FOLDER/draw.py                                            # an example: needs onnxruntime and numpy alone

`denoiser.onnx` is the whole network with the ODE steps and the solver of its training. A true liquid model comes in
parts, too (what drives the cells, one ODE step, the head), from which a caller integrates the ODE in other steps or by
another solver. `model.json` describes it: noise schedule, classes, shapes, tau's bounds. lab/export has the details.
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

from pathlib import Path

from runtime.command_line import Parser, file_or_folder, run, slow_imports
from runtime.errors import UserError
from runtime.files import check_writable
from training.run_folder import MODEL_FILE, PUBLISHED, check_not_own, weights_file


def parser() -> Parser:
    """All flags."""
    p = Parser(prog="export.py", description="Write a trained model as ONNX files.")
    add = p.add_argument
    # fmt: off
    add("--checkpoint", type=file_or_folder, metavar="RUN",
        help="a run folder or a model.safetensors (default: the published weights)")
    add("--output", type=file_or_folder, metavar="FOLDER",
        help="where the files are written (default: exported/ and the name of the run or of the weights)")
    # fmt: on
    return p


def main() -> None:
    """Parse, check, export."""
    args = parser().parse_args()
    checkpoint = args.checkpoint or str(PUBLISHED)
    weights = weights_file(checkpoint)
    name = weights.resolve().parent.name if weights.name == MODEL_FILE else weights.stem
    folder = Path(args.output or Path("exported") / name)
    check_writable(folder, "--output")
    check_not_own(folder, "--output")

    with slow_imports():
        from lab.export.files import export, missing
    if missing():
        raise UserError(f"export.py needs {missing()}; pip install -r requirements-export.txt")
    export(checkpoint, folder)


if __name__ == "__main__":
    run("export.py", main)
