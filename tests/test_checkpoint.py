"""Files and folders of a run: atomic, refused by name when damaged, and never executed."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from checkpoint import (
    atomic_path,
    make_run_folder,
    next_run_folder,
    output_file,
    read_config,
    read_model,
    read_resume,
    run_folders,
    save_model,
    save_run,
)
from errors import UserError

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


def test_the_same_model_is_the_same_bytes_in_any_process(model_file, tmp_path):
    """Rust's hash maps, in which safetensors keeps its metadata, are ordered by a seed of each process."""
    code = (
        "import sys, torch; from pathlib import Path; from checkpoint import save_model; "
        "tensors = {'a': torch.arange(6.0).view(2, 3), 'b': torch.ones(2, dtype=torch.int64)}; "
        f"save_model(Path(sys.argv[1]), tensors, {CONFIG})"
    )
    for i in range(3):
        path = tmp_path / f"{i}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        assert path.read_bytes() == model_file.read_bytes()


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


def damaged(content: bytes) -> dict[str, bytes]:
    flipped = bytearray(content)
    flipped[3] ^= 0xFF
    return {"empty": b"", "truncated": content[: len(content) // 2], "flipped": bytes(flipped), "text": b"hello\n" * 9}


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "text"])
@pytest.mark.parametrize("read, fixture", [(read_model, "model_file"), (read_resume, "resume_file")])
def test_a_damaged_file_is_refused_by_name(read, fixture, damage, request):
    path = request.getfixturevalue(fixture)
    path.write_bytes(damaged(path.read_bytes())[damage])
    with pytest.raises(UserError, match=path.name):
        read(path)


@pytest.mark.parametrize("read", [read_model, read_resume])
def test_a_missing_file_is_refused_by_name(read, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        read(tmp_path / "nowhere")


def test_foreign_and_future_files_are_refused(tmp_path):
    foreign, future = tmp_path / "foreign.safetensors", tmp_path / "future.safetensors"
    safetensors.torch.save_file(TENSORS, foreign)
    safetensors.torch.save_file(TENSORS, future, {"liquid-diffusion": '{"format_version": 99, "config": {}}'})
    with pytest.raises(UserError, match="not a model of this project"):
        read_model(foreign)
    with pytest.raises(UserError, match="99"):
        read_model(future)
    torch.save({"weights": TENSORS}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        read_resume(tmp_path / "foreign.pt")


def test_a_pickle_that_would_run_code_does_not_run_it(tmp_path):
    trace = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    torch.save({"format": "liquid-diffusion", "model": Attack()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match=name):
            read_resume(tmp_path / name)
    assert not trace.exists()


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
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_config(tmp_path) == CONFIG
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        read_config(tmp_path)


def test_reading_a_model_needs_no_other_module_of_the_project(model_file):
    """A checkpoint can be read by its format alone: the file is safetensors with JSON in its metadata."""
    code = (
        "import json, sys, safetensors; f = safetensors.safe_open(sys.argv[1], 'pt'); "
        "print(json.loads(f.metadata()['liquid-diffusion'])['config']['model'], sorted(f.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(model_file)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "true ['a', 'b']"


def test_a_file_to_be_written_has_its_folder_made_and_is_refused_by_its_flag(tmp_path):
    wanted = tmp_path / "new" / "grid.PNG"
    assert output_file(str(wanted), "--output", ".png") == wanted and wanted.parent.is_dir()
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
