"""What `evaluate.py` does: load the model and the images, measure, print the table and write the figures."""

import hashlib
from argparse import Namespace
from pathlib import Path

import torch

from images.batches import held_out_bank
from images.datasets import ImageData, load_images
from images.pictures import save_grid
from lab.classifier.network import Classifier
from lab.evaluation.by_classifier import classifier_or_reason
from lab.evaluation.estimate import estimate, in_words
from lab.evaluation.inception import MissingWeights, inception_weights
from lab.evaluation.measures import by_solver, evaluate, subject
from lab.evaluation.ode_work import save_ode_work, with_ode
from lab.evaluation.report import Report
from lab.evaluation.table import table
from lab.predictions import denoiser_asked, guidance_asked
from runtime.errors import RunFailed, UserError, reason, user_errors
from runtime.files import make_folder, save_json
from runtime.hardware import choose_device, keep_freed_memory, out_of_memory_named, stay_within_memory
from training.checkpoint import load_model
from training.run_folder import CONFIG_FILE, read_config, weights_file


def measure_and_write(args: Namespace, run_folder: Path | None, output: Path, picture: Path) -> None:
    """Measure as the flags of `evaluate.py` say. run_folder: of the checkpoint, if it is a run's; output: the JSON."""
    keep_freed_memory()
    device = choose_device(args.device)
    stay_within_memory(device)
    model, scheduler, config = load_model(args.checkpoint)
    liquid = None
    if args.ode_work:
        with user_errors("--ode-work"):
            liquid = with_ode(model, config["model"])
    args.steps = args.steps or min(50, scheduler.num_timesteps)
    if args.steps > scheduler.num_timesteps:
        raise UserError(f"--steps: must be at most the model's {scheduler.num_timesteps} timesteps, got {args.steps}")
    args.dataset, args.data_dir, image_size, skip = data_source(args, config, run_folder)
    nearby = "name its folder with --data-dir"  # another data set would not be the one of this model
    model.to(device).to(memory_format=torch.channels_last)
    guidance, drawn_by = guidance_asked(args, model), denoiser_asked(args, model, scheduler)
    data = load_images(args.dataset, args.data_dir, image_size, skip_bad_images=skip, otherwise=nearby)
    check_fit(data, config)
    make_folder(output.parent, "--output")
    about = subject(model, scheduler, data)
    print(description(config["model"], about))
    inception = inception_or_reason(args.fid)
    classifier, path = classifier_or_reason(args.classifier, data)
    if isinstance(classifier, Classifier):
        classifier.to(device)
    try:
        with out_of_memory_named(min(args.batch_size, args.num_images), "a smaller --num-images"):
            parts = estimate(
                model,
                scheduler,
                data,
                classifier,
                num_images=args.num_images,
                bound_images=args.bound_images,
                calls_per_image=guidance.calls(scheduler.timesteps(args.steps), scheduler.num_timesteps),
                batch_size=args.batch_size,
            )
            print(f"time     {in_words(parts)}", flush=True)
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
                guidance=guidance,
                eps_scale=args.eps_scale,
                drawn_by=drawn_by,
                classifier=classifier,
                inception=inception,
            )
            if liquid is not None:
                figures["ode_work"] = by_solver(liquid, scheduler, held_out_bank(data, scheduler.num_timesteps))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    figures["nearest_training_images"]["picture"] = picture.name
    if path is not None:
        figures["classifier"]["file"] = path.name
        figures["classifier"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    print(table(figures))
    report = {
        "checkpoint": args.checkpoint,
        "checkpoint_sha256": hashlib.sha256(weights_file(args.checkpoint).read_bytes()).hexdigest(),
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
