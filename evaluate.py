"""Measure one trained model: print a table, and write `evaluation.json`, with units, into the run's folder.

python evaluate.py --checkpoint runs/00003-true-cifar10
python evaluate.py --checkpoint RUN --num-images 2000 --fid
python evaluate.py --checkpoint model.safetensors --dataset folder --data-dir IMAGES --output figures.json

It measures the held-out eps-MSE on the frozen bank, overall and by noise level; the variational bound in bits/dim; the
sliced Wasserstein distance of samples from held-out images, beside that of training images; the training images nearest
to 16 samples, as a picture; speed; and, on request, FID and KID, and the held-out eps-MSE of a liquid model with every
ODE solver. A figure that could not be measured is null in the file, with the reason. Each measure has a file in
lab/evaluation.
"""

from runtime import interrupted_import  # noqa: F401  # isort: skip

import hashlib
from argparse import Namespace
from pathlib import Path

import torch

from diffusion import SAMPLERS
from images.batches import held_out_bank
from images.datasets import DATASETS, ImageData, load_images
from images.pictures import save_grid
from lab.evaluation.inception import MissingWeights, inception_weights, require_torch_fidelity
from lab.evaluation.measures import SHOWN, Report, by_solver, evaluate, subject
from lab.evaluation.ode_work import save_ode_work, with_ode
from lab.evaluation.table import table
from runtime.command_line import Parser, file_or_folder, integer, run
from runtime.errors import RunFailed, UserError, reason, user_errors
from runtime.files import output_file, save_json
from runtime.hardware import DEVICES, choose_device, keep_freed_memory, out_of_memory_named, stay_within_memory
from training.checkpoint import load_model
from training.run_folder import CONFIG_FILE, MODEL_FILE, check_not_own, read_config


def parser() -> Parser:
    """All flags."""
    p = Parser(prog="evaluate.py", description="Measure one trained model.")
    add = p.add_argument
    # fmt: off
    add("--checkpoint", required=True, type=file_or_folder, help="a run folder or a model.safetensors")
    add("--dataset", choices=DATASETS, help="what to measure on (default: what the model was trained on)")
    add("--data-dir", type=file_or_folder,
        help="where the data set is (default: where the run's config.json says, else data)")
    add("--skip-bad-images", action="store_true",
        help="with --dataset folder: leave out images that cannot be read (default: as the run was trained)")
    many = "no figure gets better with more"
    add("--num-images", type=integer(SHOWN, 10**6, many), default=10_000, help="how many images to draw")
    add("--bound-images", type=integer(2, 10**6, many), default=2000,
        help="how many held-out images the variational bound is computed for")
    add("--sampler", choices=SAMPLERS, default="dpmpp", help="how to get from noise to an image")
    add("--steps", type=integer(1, 10**5, "no model has more timesteps"),
        help="network calls per image (default: 50, or all timesteps of a model that has fewer)")
    add("--seed", type=integer(0, 10**12, "larger ones give nothing new"), default=0,
        help="image i is drawn from the noise of seed + i; also seeds the rest")
    add("--batch-size", type=integer(1, 2**16, "more need more memory and are measured no faster"), default=64,
        help="images per network call")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one, else mps, else cpu")
    add("--fid", action="store_true", help="also compute FID and KID against all training images: hours on a CPU")
    add("--ode-work", action="store_true",
        help="also measure the eps-MSE of a true liquid model for every ODE solver and number of steps, with a plot")
    add("--output", type=file_or_folder, metavar="JSON",
        help="where the figures are written (default: evaluation.json in the run folder, or beside the file)")
    # fmt: on
    return p


def main() -> None:
    """Parse, check, measure."""
    args = parser().parse_args()
    if args.fid:
        require_torch_fidelity()
    keep_freed_memory()
    device = choose_device(args.device)
    stay_within_memory(device)
    check_not_own(args.output, "--output", [args.checkpoint])
    checkpoint = Path(args.checkpoint)
    weights = checkpoint / MODEL_FILE if checkpoint.is_dir() else checkpoint
    model, scheduler, config = load_model(checkpoint)
    liquid = None
    if args.ode_work:
        with user_errors("--ode-work"):
            liquid = with_ode(model, config["model"])
    args.steps = args.steps or min(50, scheduler.num_timesteps)
    if args.steps > scheduler.num_timesteps:
        raise UserError(f"--steps: must be at most the model's {scheduler.num_timesteps} timesteps, got {args.steps}")
    run_folder = folder_of_run(checkpoint)
    output, picture = output_paths(args.output, checkpoint, run_folder)
    args.dataset, args.data_dir, image_size, skip = data_source(args, config, run_folder)
    nearby = "name its folder with --data-dir"  # another data set would not be the one of this model
    data = load_images(args.dataset, args.data_dir, image_size, skip_bad_images=skip, otherwise=nearby)
    check_fit(data, config)
    model.to(device).to(memory_format=torch.channels_last)
    about = subject(model, scheduler, data)
    print(description(config["model"], about))
    inception = inception_or_reason(args.fid)
    try:
        with out_of_memory_named(min(args.batch_size, args.num_images), "a smaller --num-images"):
            figures, pairs = evaluate(
                model,
                scheduler,
                data,
                num_images=args.num_images,
                bound_images=args.bound_images,
                sampler=args.sampler,
                steps=args.steps,
                seed=args.seed,
                batch_size=args.batch_size,
                inception=inception,
            )
            if liquid is not None:
                figures["ode_work"] = by_solver(liquid, scheduler, held_out_bank(data, scheduler.num_timesteps))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    figures["nearest_training_images"]["picture"] = picture.name
    print(table(figures))
    report = {
        "checkpoint": args.checkpoint,
        "checkpoint_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "model": {name: config[name] for name in ("model", "model_config")},
        "data_dir": args.data_dir,
        "seed": args.seed,
        **about,
        **figures,
    }
    pictures = [picture]
    try:
        save_grid(pairs, picture)
        if args.ode_work:
            pictures.append(output.with_name(f"{output.stem}-ode-work.png"))
            save_ode_work(figures["ode_work"]["points"], pictures[-1])
        save_json(output, report)
    except OSError as error:
        raise RunFailed(f"cannot write {error.filename or output} ({reason(error)})") from error
    print(*pictures, output, sep="\n")


def folder_of_run(checkpoint: Path) -> Path | None:
    """The run folder that the checkpoint is, or whose model.safetensors it is; None for any other file."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    known = checkpoint.is_dir() or (checkpoint.name == MODEL_FILE and (folder / CONFIG_FILE).exists())
    return folder if known else None


def output_paths(output: str | None, checkpoint: Path, run_folder: Path | None) -> tuple[Path, Path]:
    """Where the JSON and the picture will be written. Raises UserError, naming --output, if they cannot be."""
    beside = checkpoint.with_name(f"{checkpoint.stem}-evaluation.json")
    path = output_file(output or (run_folder / "evaluation.json" if run_folder else beside), "--output", ".json")
    return path, path.with_name(f"{path.stem}-neighbours.png")


def data_source(args: Namespace, config: dict, run_folder: Path | None) -> tuple[str, str, str | None, bool]:
    """(data set, its folder, image size, whether bad images are skipped): by the flags, else as the run was trained.

    Raises UserError if the images' folder is not known.
    """
    trained = {}
    if run_folder is not None and (run_folder / CONFIG_FILE).exists():
        trained = read_config(run_folder).get("train", {})
    name = args.dataset or config.get("dataset")
    if name is None:
        raise UserError(f"--dataset: {args.checkpoint} does not say what it was trained on; name it")
    data_dir = args.data_dir or (trained.get("data_dir") if name == trained.get("dataset") else None)
    if data_dir is None and name == "folder":
        raise UserError(f"--data-dir: name the folder of images; {args.checkpoint} does not say where it is")
    # the model's own set was resized to its images, if they differ; another set has to be of its size
    own = name in ("folder", config.get("dataset"))
    skip = args.skip_bad_images or (bool(trained.get("skip_bad_images")) and args.data_dir is None)
    return name, data_dir or "data", "x".join(map(str, config["shape"][1:])) if own else None, skip


def check_fit(data: ImageData, config: dict) -> None:
    """Raise UserError, naming both, if the shape or the classes of the data are not those of the model."""
    for what, found, wanted in (
        ("images", data.shape, tuple(config["shape"])),
        ("classes", data.classes, tuple(config["classes"])),
    ):
        if found != wanted:
            listed = [f"{', '.join(map(str, values[:12]))}{', ...' * (len(values) > 12)}" for values in (found, wanted)]
            raise UserError(f"--data-dir: {data.name} has {what} ({listed[0]}), the model has ({listed[1]})")


def description(name: str, about: Report) -> str:
    """What is about to be measured, in a few lines."""
    data = about["data"]
    threads = f", {about['threads']} threads" if about["device"] == "cpu" else ""
    held_out = f"{data['held_out_images']:,} held out"
    macs = f"{about['multiply_adds']['value']:,} multiply-adds per forward pass"
    shape = "x".join(map(str, data["shape"]))
    return "\n".join(
        [
            f"device   {about['device']}{threads}, {about['precision']}",
            f"model    {name}: {about['parameters']['value']:,} parameters, {macs}",
            f"data     {data['dataset']}: {data['train_images']:,} images {shape}, {held_out}",
        ]
    )


def inception_or_reason(wanted: bool) -> Path | str:
    """The weights of the Inception network, or why there are none, which is said before an hour of sampling."""
    if not wanted:
        return "not asked for (--fid)"
    try:
        return inception_weights()
    except MissingWeights as reason:
        print(f"fid      not measured: {reason}")
        return str(reason)


if __name__ == "__main__":
    run("evaluate.py", main)
