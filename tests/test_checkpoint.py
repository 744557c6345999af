"""Files and folders of a run: written whole or not at all, the same for the same model, and read in older formats."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from unittest import mock

import pytest
import safetensors.torch
import torch
from conftest import EVERY, ROOT, call, same, trained

import train
from liquid_diffusion import TrueLiquidDiffusionModel
from runtime.errors import UserError
from runtime.files import atomic_path, output_file
from training.checkpoint import load_model, read_model, read_resume, save_model, save_run
from training.run_folder import make_run_folder, next_run_folder, read_config, run_folders

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}
CONFIG = {"model": "true", "shape": [3, 32, 32]}


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, TENSORS, CONFIG)
    return path


@pytest.fixture
def resume_file(tmp_path):
    save_run(tmp_path, TENSORS, CONFIG, {"model": TENSORS, "step": 3})
    return tmp_path / "checkpoint.pt"


def test_model_file_gives_back_what_was_saved_and_is_plain_safetensors(model_file):
    for path in (model_file, model_file.parent):
        tensors, config = read_model(path)
        assert config == CONFIG
        assert tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[k], v) for k, v in TENSORS.items())
    assert torch.equal(safetensors.torch.load_file(model_file)["a"], TENSORS["a"])


def test_a_stop_signal_while_a_file_is_read_is_not_taken_for_damage(model_file, monkeypatch):
    """Torch asks a storage of which it knows no shape for its first value, in Python, where signals are handled."""
    read = torch.UntypedStorage.__getitem__
    signalled = []

    def signal_and_read(storage, index):
        if not isinstance(index, slice):
            signalled.append(index)
            signal.raise_signal(signal.SIGINT)
        return read(storage, index)

    monkeypatch.setattr(torch.UntypedStorage, "__getitem__", signal_and_read)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            read_model(model_file)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signalled


def test_the_same_model_is_the_same_bytes_in_any_thread(model_file, tmp_path):
    """Rust's hash maps, in which safetensors keeps its metadata, are ordered by a seed of each thread."""

    def save(i):
        save_model(tmp_path / f"{i}.safetensors", TENSORS, CONFIG)

    threads = [Thread(target=save, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert (tmp_path / f"{i}.safetensors").read_bytes() == model_file.read_bytes()


def test_channels_last_weights_survive(tmp_path):
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    save_model(tmp_path / "m.safetensors", {"w": weight}, CONFIG)
    assert torch.equal(read_model(tmp_path / "m.safetensors")[0]["w"], weight)


def test_resume_file_gives_back_what_was_saved(resume_file):
    state = read_resume(resume_file)
    assert state["step"] == 3
    assert torch.equal(state["model"]["a"], TENSORS["a"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(model_file):
    before = model_file.read_bytes()
    with pytest.raises(OSError, match="disk"), atomic_path(model_file) as temporary:
        temporary.write_bytes(before[:10])
        raise OSError("disk full")
    assert model_file.read_bytes() == before
    assert os.listdir(model_file.parent) == [model_file.name]


def format_2(tensors: dict) -> dict:
    """The weights under the names of format 2, which had the cells in a ModuleDict."""
    return {re.sub(r"processor\.(\w+)_cell\.", r"processor.cells.\1.", name): value for name, value in tensors.items()}


def test_published_weights_of_format_2_are_read_under_the_names_of_now():
    path = ROOT / "pretrained" / "true-digits.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["liquid-diffusion"])["format_version"] == 2
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert any(name.startswith("processor.cells.global.") for name in saved)
    model, _, _ = load_model(path)
    tensors = model.state_dict()
    assert any(name.startswith("processor.global_cell.") for name in tensors)
    assert same(read_model(path)[0], tensors)
    assert same(format_2(tensors), saved)


def test_a_run_of_format_2_goes_on_to_the_same_bytes(light, tmp_path, monkeypatch):
    run = trained(tmp_path / "now", *EVERY, "--steps", 3)
    old = shutil.copytree(run, tmp_path / "before")
    (tensors, config), state = read_model(run), read_resume(run / "checkpoint.pt")
    state.pop("format_version")
    state |= {part: format_2(state[part]) for part in ("model", "ema")}
    with monkeypatch.context() as before:
        before.setattr("training.checkpoint.FORMAT_VERSION", 2)
        save_run(old, format_2(tensors), config, state)
    saved = torch.load(old / "checkpoint.pt", weights_only=True)
    assert saved["format_version"] == 2 and "processor.cells.global.recurrent.weight" in saved["model"]
    for folder in (run, old):
        code, _, err = call(train, "--resume", folder, "--steps", 6)
        assert code == 0, err
    assert (run / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
    ends = [read_resume(folder / "checkpoint.pt") | {"seconds": None} for folder in (run, old)]  # how long it took
    assert same(*ends)


def test_a_run_of_format_3_goes_on_with_the_network_that_it_was_built_with(light, tmp_path, monkeypatch):
    """Its cells read their input through 3x3 kernels, by a default of those days that none of its files names."""
    with monkeypatch.context() as before:
        defaults = TrueLiquidDiffusionModel.__init__.__defaults__
        before.setattr(TrueLiquidDiffusionModel.__init__, "__defaults__", (*defaults[:-1], 3))
        run = trained(tmp_path / "now", *EVERY, "--steps", 3)
        old = shutil.copytree(run, tmp_path / "before")
        (tensors, about), state = read_model(run), read_resume(run / "checkpoint.pt")
        config = read_config(run)
        for record in (about, config["model"]):
            assert record["model_config"].pop("input_kernel") == 3
        state.pop("format_version")
        with mock.patch("training.checkpoint.FORMAT_VERSION", 3):
            save_run(old, tensors, about, state | {"about": json.dumps(about)})
        (old / "config.json").write_text(json.dumps(config))
        code, _, err = call(train, "--resume", run, "--steps", 6)
        assert code == 0, err
    code, _, err = call(train, "--resume", old, "--steps", 6)
    assert code == 0, err
    assert load_model(old)[0].processor.detail_cell.input.depthwise.kernel_size == (3, 3)
    assert same(read_model(run)[0], read_model(old)[0])


def test_run_ids_grow_from_the_largest(tmp_path):
    assert make_run_folder(tmp_path / "new" / "runs", "true-digits").name == "00000-true-digits"
    for name in ("00007-true-digits", "notes", "123-short"):
        (tmp_path / name).mkdir()
    assert next_run_folder(tmp_path, "x").name == "00008-x"
    assert make_run_folder(tmp_path, "unet-digits").name == "00008-unet-digits"
    assert [folder.name for folder in run_folders(tmp_path)] == ["00007-true-digits", "00008-unet-digits"]


def test_runs_that_start_together_get_different_ids(tmp_path):
    (tmp_path / "00000").mkdir()  # of a run that was killed as it started
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda i: make_run_folder(tmp_path, f"run{i % 3}"), range(32)))
    assert sorted(folder.name[:5] for folder in folders) == [f"{i:05d}" for i in range(1, 33)]


def test_an_output_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"--output-dir.*runs"):
        make_run_folder(tmp_path / "runs", "x")


def test_config_is_read_or_refused(tmp_path):
    with pytest.raises(UserError, match="run folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"train": CONFIG}))
    assert read_config(tmp_path) == {"train": CONFIG}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        read_config(tmp_path)


def test_reading_a_model_needs_neither_the_project_nor_torch(model_file):
    """A checkpoint can be read by its format alone: the file is safetensors with JSON in its metadata."""
    code = (
        "import json, sys, safetensors; f = safetensors.safe_open(sys.argv[1], 'np'); "
        "print(json.loads(f.metadata()['liquid-diffusion'])['config']['model'], sorted(f.keys()))"
    )
    command = [sys.executable, "-I", "-c", code, str(model_file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "true ['a', 'b']"


def test_a_file_to_be_written_is_refused_by_its_flag_if_it_cannot_be(tmp_path):
    wanted = tmp_path / "new" / "grid.PNG"
    assert output_file(str(wanted), "--output", ".png") == wanted and not wanted.parent.exists()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    refused = {
        "grid.jpg": "must end in .png",
        "folder.png": "is a folder",
        "file/grid.png": "is not a folder",
        f"{'n' * 300}.png": "File name too long",
        f"{'n' * 300}/grid.png": "File name too long",
    }
    for name, reason in refused.items():
        with pytest.raises(UserError, match=f"^--gif: .*{reason}"):
            output_file(tmp_path / name, "--gif", ".png")
