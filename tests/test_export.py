"""`export.py`: what its ONNX files compute is what torch computes, and they need nothing of this project.

All drawing is done by the `draw.py` that lies in the exported folder. An export takes seconds, so the tests share them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, call
from PIL import Image

import export
from choices import EPS_SCALE
from diffusion.sampling import Guidance, image_noise, sample_images
from lab.export import files
from models import build_model, complete_config, multiply_adds
from training.checkpoint import load_model, save_model
from training.run_folder import PUBLISHED

# name -> the model, its own config, and what else its file tells; together they have each way of telling it
RGB = {"shape": [3, 16, 16]}
GRAY = {"shape": [1, 16, 12], "schedule": "cosine", "prediction_type": "v"}
LIQUID = {"channels": (8, 6, 4), "embedding_dim": 8, "ode_steps": (2, 3, 4)}
MADE = {
    "true": ("true", {**LIQUID, "solver": "exponential", "activation": "tanh"}, GRAY),
    "fixed": ("true:tau=fixed", {**LIQUID, "num_classes": 3}, RGB),
    "inspired": ("inspired", {}, RGB | {"prediction_type": "eps"}),
    "inspired-classes": ("inspired", {"num_classes": 3}, GRAY),
    "unet": ("unet", {"channels": (8, 8), "mid_block": True, "attention_level": 1}, GRAY),
    "unet-classes": ("unet", {"num_classes": 3}, RGB),
}
ALL = ["published", *MADE]
PARTS = ["features", "global", "local", "detail", "step", "head"]


def make(path: Path, name: str, config: dict, about: dict) -> Path:
    """A file of weights that are random where training would start from zeros, so that images depend on everything."""
    torch.manual_seed(0)
    config = complete_config(name, in_channels=about["shape"][0], **config)
    model = build_model(name, **config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    rest = {"timesteps": 40, "schedule": "linear", "prediction_type": "edm", "dataset": "digits"}
    rest |= {"classes": ["zero", "one", "two"], "model": name, "model_config": config}
    save_model(path, model.state_dict(), rest | about)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The function that exports a model by its name, once, and gives it with the example as it was written."""

    @cache
    def once(name: str) -> SimpleNamespace:
        at = tmp_path_factory.mktemp(name)
        path = PUBLISHED if name == "published" else make(at / "model.safetensors", *MADE[name])
        folder = at / "new" / "folder"
        code, out, err = call(export, "--checkpoint", path, "--output", folder)
        assert code == 0 and out.count("\n") == 1 and str(folder) in out, err
        spec = importlib.util.spec_from_file_location(f"draw_{name}", folder / "draw.py")
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        model, scheduler, config = load_model(path)
        both = {"example": example, "onnx": example.Model(folder), "torch": model, "scheduler": scheduler}
        return SimpleNamespace(**both, config=config, shape=config["shape"], folder=folder)

    return once


def drawn_by_both(one, count: int = 3, steps: int = 14, **ode) -> tuple[np.ndarray, np.ndarray]:
    """The images that torch and the files draw, from the same noise and as sample.py draws."""
    noise = image_noise(range(7, 7 + count), one.shape, "cpu")()
    labels = torch.arange(count) % one.torch.num_classes if one.torch.num_classes else None
    how = {"labels": labels, "guidance": Guidance.usual(one.torch), "eps_scale": EPS_SCALE}
    expected = sample_images(one.torch, one.scheduler, one.shape, count, steps=steps, seed=7, **how).numpy()
    drawn = one.example.draw(one.onnx, noise.numpy(), None if labels is None else labels.numpy(), steps, **ode)
    assert drawn.dtype == np.float32 and drawn.shape == expected.shape
    return expected, drawn


@pytest.mark.parametrize("name", ALL)
def test_a_whole_drawing_is_that_of_torch(name, exported):
    one = exported(name)
    expected, drawn = drawn_by_both(one)
    assert np.abs(drawn - expected).max() < 1e-4
    assert (np.abs(drawn) < 0.99).mean() > 0.05 and drawn.std() > 0.1  # clipping does not hide all


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [1, 5])
def test_x_0_is_that_of_torch_for_any_number_of_images_at_any_timesteps_and_classes(count, name, exported):
    one, T = exported(name), exported(name).scheduler.num_timesteps
    x_t, t = 2 * image_noise(range(count), one.shape, "cpu")(), torch.tensor([T // 2, 0, 1, T // 3, T - 3])[:count]
    labels = {"labels": torch.arange(count) % (one.torch.num_classes + 1)} if one.torch.num_classes else {}
    with torch.no_grad():
        x_0, _ = one.scheduler.predict(one.scheduler.network_output(one.torch, x_t, t, **labels), x_t, t)
    inputs = {key: value.numpy() for key, value in {"x_t": x_t, "t": t, **labels}.items()}
    error = torch.from_numpy(one.onnx.run("denoiser", **inputs)["x_0"]) - x_0
    error, largest = (images.abs().amax((1, 2, 3)) for images in (error, x_0))  # where noise is high, x_0 may be large
    assert (error < 2e-5 * largest.clamp(min=1)).all()


ODES = [("semi-implicit", (4, 2, 3)), ("exponential", (1, 2, 5)), ("midpoint", (4, 4, 6)), (None, (5, 4, 6))]
ODES += [("euler", None)]


@pytest.mark.parametrize("solver, ode_steps", ODES)
@pytest.mark.parametrize("name", ["published", "true"])
def test_the_parts_integrate_in_other_steps_and_by_other_solvers_as_torch_does(name, solver, ode_steps, exported):
    one = exported(name)
    trained = one.torch.processor.detail_cell.solver, one.torch.current_steps()
    count = 1 if name == "published" else 5  # an export has two
    usual, _ = drawn_by_both(one, count, steps=4)
    one.torch.set_solver(solver, ode_steps)
    try:
        expected, drawn = drawn_by_both(one, count, steps=4, solver=solver, ode_steps=ode_steps)
    finally:
        one.torch.set_solver(*trained)
    assert np.abs(drawn - expected).max() < 1e-4
    assert (solver == trained[0] and ode_steps is None) or np.abs(drawn - usual).max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_each_file_stands_alone_and_tells_nothing_of_the_machine(name, exported):
    one = exported(name)
    graphs = [f"{part}.onnx" for part in ("denoiser", *(PARTS if name in ("published", "true") else []))]
    assert {path.name for path in one.folder.iterdir()} == {*graphs, "model.json", "draw.py"}
    about = json.loads((one.folder / "model.json").read_text())
    assert about["files"] == graphs
    for path in map(one.folder.joinpath, graphs):
        graph = onnx.load(path, load_external_data=False)
        assert all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in graph.graph.initializer)
        assert [(entry.domain, entry.version >= 18) for entry in graph.opset_import] == [("", True)]
        assert {entry.key: json.loads(entry.value) for entry in graph.metadata_props} == {"liquid-diffusion": about}
        content = path.read_bytes()
        for trace in (str(ROOT), sys.prefix, "site-packages", 'File "', ".py"):
            assert trace.encode() not in content, path


@pytest.mark.parametrize("name", ALL)
def test_the_description_is_that_of_the_model(name, exported):
    one, about = exported(name), exported(name).onnx.about
    classes = one.torch.num_classes
    assert about["alphas_cumprod"] == one.scheduler.alphas_cumprod.tolist()
    assert (about["timesteps"], about["shape"]) == (one.scheduler.num_timesteps, list(one.shape))
    assert all(about[key] == one.config[key] for key in ("model", "dataset", "schedule", "prediction_type"))
    assert about["classes"] == (one.config["classes"] if classes else [])
    usual = Guidance.usual(one.torch)
    assert (about["no_class"], about["guidance"], about["guided_share"]) == (classes, usual.weight, usual.between[1])
    assert about["multiply_adds"] == multiply_adds(one.torch, one.shape)
    assert ("ode" in about) == (name in ("published", "true"))


@pytest.mark.parametrize("name", ["published", "true"])
def test_the_description_of_the_ode_is_that_of_the_cells(name, exported):
    one, ode = exported(name), exported(name).onnx.about["ode"]
    config, steps = one.config["model_config"], one.torch.current_steps()
    assert (ode["solver"], ode["activation"], ode["horizon"]) == (config["solver"], config["activation"], 2)
    assert {key: cell["tau"] for key, cell in ode["cells"].items()} == {
        "global": [0.7, 4], "local": [0.45, 4], "detail": [0.3, 4]
    }  # fmt: skip
    assert [cell["steps"] for cell in ode["cells"].values()] == list(config["ode_steps"])
    with torch.no_grad():
        _, states = one.torch(torch.zeros(1, *one.shape), torch.tensor([0]), return_state=True)
    assert [cell["state"] for cell in ode["cells"].values()] == [list(state.shape[1:]) for state in states]
    for i, cell in enumerate(ode["cells"].values()):
        longer = one.torch.with_steps([n + (i == j) for j, n in enumerate(steps)])
        cost = multiply_adds(longer, one.shape) - one.onnx.about["multiply_adds"]
        assert cell["step_multiply_adds"] == cost


@pytest.mark.parametrize("name, options", [("true", ["--solver", "midpoint", "--ode-steps", 2, 1, 2]), ("fixed", [])])
def test_the_example_draws_a_picture_where_there_is_neither_torch_nor_this_project(name, options, exported, tmp_path):
    one = exported(name)
    project = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    absent = sorted({"torch", "onnx", "onnxscript"} | project)
    words = [str(one.folder / "draw.py"), "--steps", "3", "--seed", "5", *map(str, options)]
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({absent}); sys.argv = {words}\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    noise = np.random.default_rng(5).standard_normal((16, *one.shape), dtype=np.float32)
    labels = np.arange(16) % 3 if one.torch.num_classes else None
    ode = {"solver": "midpoint", "ode_steps": (2, 1, 2)} if options else {}
    images = one.example.draw(one.onnx, noise, labels, steps=3, **ode)
    _, height, width = one.shape
    with Image.open(tmp_path / "drawn.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (4 * width, 4 * height))
        pixels = np.asarray(picture).reshape(4, height, 4, width, 3).transpose(0, 2, 4, 1, 3)
    assert np.abs(pixels.reshape(16, 3, height, width) - (images + 1) * 127.5).max() < 0.51


def line_of_refusal(*arguments) -> str:
    """The one line with which the command refuses its arguments."""
    code, out, err = call(export, *arguments)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("export.py: error: "), (code, out, err)
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_a_checkpoint_that_is_missing_or_cannot_be_exported_is_refused(tmp_path):
    assert str(tmp_path / "none") in line_of_refusal("--checkpoint", tmp_path / "none")
    for name, config, word in (("true:memory", LIQUID, "state"), ("true", LIQUID | {"solver": "midpoint"}, "solver")):
        path = make(tmp_path / f"{word}.safetensors", name, config, GRAY)
        line = line_of_refusal("--checkpoint", path, "--output", tmp_path / "out")
        assert f"--checkpoint: {path}: " in line and word in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", files.NEEDED)
def test_without_a_package_the_line_says_what_to_install(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    line = line_of_refusal("--output", tmp_path / "out")
    assert f"needs {package};" in line and "requirements-export.txt" in line and not (tmp_path / "out").exists()


def test_a_folder_of_exports_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "onnx").mkdir()
    monkeypatch.delitem(sys.modules, "onnx")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert files.missing() == "onnx"


def test_the_folder_has_the_name_of_the_run_or_of_the_weights(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(files, "export", lambda checkpoint, folder: written.append((checkpoint, folder)))
    monkeypatch.chdir(tmp_path)
    for name in ("runs/00003-true-v1.5/model.safetensors", "a.safetensors"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
        assert call(export, "--checkpoint", name)[0] == 0
    for words in (["--checkpoint", "runs/00003-true-v1.5"], []):
        assert call(export, *words)[0] == 0
    os.chdir("runs/00003-true-v1.5")
    assert call(export, "--checkpoint", ".")[0] == 0
    names = ["00003-true-v1.5", "a", "00003-true-v1.5", "true-cifar10", "00003-true-v1.5"]
    assert [str(folder) for _, folder in written] == [os.path.join("exported", name) for name in names]


def test_an_output_that_is_a_run_or_a_file_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "export", lambda *_: pytest.fail("exported"))
    (tmp_path / "run").mkdir()
    for name in ("run/config.json", "file"):
        (tmp_path / name).write_text("{}")
        assert "--output: " in line_of_refusal("--output", tmp_path / name.split("/")[0])
