"""What `export.py` writes: an ONNX file for each part of a model, `model.json`, and `draw.py`, the example.

`model.json` has all that a program needs to draw from the files; each ONNX file has the same as its metadata
`liquid-diffusion`.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from choices import EPS_SCALE
from diffusion.sampling import Guidance
from diffusion.scheduler import DDPMScheduler, Denoiser
from lab.export.graphs import OPSET, check_exportable, graphs, has_parts
from liquid_diffusion import TrueLiquidDiffusionModel
from models import count_parameters, multiply_adds
from runtime.errors import UserError, reason
from runtime.files import PRODUCER, atomic_path, make_folder, save_json
from runtime.progress import progress_bar
from training.checkpoint import load_model

NEEDED = ("onnx", "onnxscript")
ABOUT = "model.json"
FORMAT_VERSION = 1


def missing() -> str:
    """The first package that an export needs and that is not installed; empty if there is none."""
    specs = {name: importlib.util.find_spec(name) for name in NEEDED}
    # a folder of that name counts as a package, but one without a file
    return next((name for name, spec in specs.items() if spec is None or spec.origin is None), "")


def export(checkpoint: str, folder: Path) -> None:
    """Write all parts of a checkpoint's model into the folder. Raises UserError for a model that cannot be exported."""
    model, scheduler, config = load_model(checkpoint)
    try:
        check_exportable(model)
    except ValueError as error:
        raise UserError(f"--checkpoint: {checkpoint}: {reason(error)}") from error
    make_folder(folder, "--output")
    (folder / ABOUT).unlink(missing_ok=True)  # where it is, all is
    about = describe(model, scheduler, config)
    total, written = len(about["files"]), 0
    with progress_bar(desc="export", total=total, unit="file") as bar:
        for name, graph in graphs(model, scheduler, config["shape"]):
            properties = graph.metadata_props.add()
            properties.key, properties.value = PRODUCER, json.dumps(about)
            with atomic_path(folder / f"{name}.onnx") as temporary:
                temporary.write_bytes(graph.SerializeToString())
            written += (folder / f"{name}.onnx").stat().st_size
            bar.update()
    with atomic_path(folder / "draw.py") as temporary:
        shutil.copyfile(Path(__file__).with_name("draw.py"), temporary)
    save_json(folder / ABOUT, about)
    print(f"written  {folder}: {total} ONNX files of {written / 1000:,.0f} kB, {ABOUT}, and draw.py, which draws")


def describe(model: Denoiser, scheduler: DDPMScheduler, config: dict[str, Any]) -> dict[str, Any]:
    """What a program must know to draw from the files, as plain values."""
    channels, height, width = config["shape"]
    guidance = Guidance.usual(model)
    parts = ["features", "global", "local", "detail", "step", "head"] if has_parts(model) else []
    about = {
        "format_version": FORMAT_VERSION,
        "opset": OPSET,
        "files": [f"{name}.onnx" for name in ("denoiser", *parts)],
        "model": config["model"],
        "parameters": count_parameters(model),
        "dataset": config["dataset"],
        "shape": [channels, height, width],
        "classes": list(config["classes"]) if model.num_classes else [],
        "no_class": model.num_classes,  # the label that means so
        # how sample.py draws
        "guidance": guidance.weight,
        "guided_share": guidance.between[1],
        "eps_scale": EPS_SCALE,
        "timesteps": scheduler.num_timesteps,
        "schedule": scheduler.schedule,
        "prediction_type": scheduler.prediction_type,
        "alphas_cumprod": scheduler.alphas_cumprod.tolist(),
        "multiply_adds": multiply_adds(model, (channels, height, width)),  # of a network call, on one image
    }
    if has_parts(model):
        about["ode"] = ode(model, height, width)
    return about


def ode(model: TrueLiquidDiffusionModel, height: int, width: int) -> dict[str, Any]:
    """How the cells' equations were integrated in training, and what a step costs."""
    cells = {}
    for scale, (name, cell) in zip((4, 2, 1), model.processor.cells.items(), strict=True):
        size = [cell.recurrent.weight.shape[0], height // scale, width // scale]
        cells[name] = {
            "state": size,
            "tau": [cell.tau_min, cell.tau_max],
            "steps": cell.num_steps,
            "step_multiply_adds": cell.recurrent.weight.numel() * size[1] * size[2],
        }
    cell = model.processor.detail_cell
    activation = "tanh" if cell.activation.__name__ == "tanh" else "silu"
    return {
        "horizon": cell.horizon,
        "solver": cell.solver,
        "random_steps": model.random_steps,  # whether it also learned to do with half of the steps
        "activation": activation,
        "cells": cells,
    }
