"""Files of a run that were cut, flipped, swapped or made by something else: refused by name, never run as code."""

import io
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import call, same, trained

import sample
import train
from runtime.errors import UserError
from training.checkpoint import read_model, read_resume, save_run

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}

DAMAGE = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "text": lambda content: b"hello\n" * 9,
    "a byte of the header flipped": lambda content: content[:3] + bytes([content[3] ^ 0xFF]) + content[4:],
    "a bit flipped in a weight": lambda content: flip(content, len(content) // 2),
    "zeros, as after a crash": lambda content: bytes(len(content)),
}


def flip(content: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt"])
def test_a_damaged_file_is_refused_by_name(name, damage, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / name).write_bytes(DAMAGE[damage]((run / name).read_bytes()))
    module, flag = (sample, "--checkpoint") if name == "model.safetensors" else (train, "--resume")
    code, out, err = call(module, flag, run)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert str(run / name) in err


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


def test_no_flipped_bit_goes_unseen(whole_run, tmp_path):
    places = random.Random(0)
    model, resume = ((whole_run / name).read_bytes() for name in ("model.safetensors", "checkpoint.pt"))
    for _ in range(300):
        (tmp_path / "model.safetensors").write_bytes(flip(model, places.randrange(len(model)), places.randrange(8)))
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_model(tmp_path)
    saved = read_resume(whole_run / "checkpoint.pt")
    inside = [
        range(info.header_offset, info.header_offset + 256) for info in zipfile.ZipFile(io.BytesIO(resume)).filelist
    ]
    headers = [place for part in inside for place in part]  # of the parts, where some bytes mean nothing
    seen = 0
    for i in range(300):
        place = places.randrange(len(resume)) if i % 2 else places.choice(headers)
        (tmp_path / "checkpoint.pt").write_bytes(flip(resume, place, places.randrange(8)))
        try:
            assert same(read_resume(tmp_path / "checkpoint.pt"), saved)
        except UserError as error:
            assert "checkpoint.pt" in str(error)
            seen += 1
    assert seen > 150


def resumed_with_checkpoint_of(other: Path, run: Path) -> str:
    shutil.copy(other / "checkpoint.pt", run / "checkpoint.pt")
    code, _, err = call(train, "--resume", run)
    assert code == 2 and err.count("\n") == 1, err
    assert str(run / "checkpoint.pt") in err
    return err


def test_the_checkpoint_of_another_run_is_refused_with_what_differs(light, tmp_path):
    run = trained(tmp_path / "run", "--steps", 1)
    others = {
        "model was inspired, is true": ["--model", "inspired"],
        "shape was [1, 16, 16], is [1, 8, 8]": ["--image-size", 16],  # the weights would fit
        "prediction_type was v, is edm": ["--prediction-type", "v"],
    }
    for i, (words, options) in enumerate(others.items()):
        other = trained(tmp_path / str(i), "--steps", 1, *options)
        assert words in resumed_with_checkpoint_of(other, run)


def test_a_file_of_a_later_format_is_refused_with_its_version(whole_run, tmp_path, monkeypatch):
    run = shutil.copytree(whole_run, tmp_path / "run")
    tensors, config = read_model(run)
    state = read_resume(run / "checkpoint.pt")
    state.pop("format_version")
    with monkeypatch.context() as later:
        later.setattr("training.checkpoint.FORMAT_VERSION", 99)
        save_run(run, tensors, config, state)
    for module, flag, name in ((sample, "--checkpoint", "model.safetensors"), (train, "--resume", "checkpoint.pt")):
        code, _, err = call(module, flag, run)
        assert code == 2 and f"{run / name}: format version 99" in err, err


BAD_CONFIGS = [
    "[1]",
    "{",
    "null",
    "[" * 100_000,
    '{"train": {"model": "true", "wings": 2}}',
    '{"train": {"batch_size": "x"}}',
    '{"train": {"batch_size": -5}}',
    '{"train": {"lr": [1]}}',
    '{"train": {"epochs": {}}}',
    '{"train": {"model": "transformer"}}',
    '{"train": {"model_config": 3}}',
    '{"train": {"model_config": {"solver": 3}}}',
    '{"train": {"model_config": {"horses": 3}}}',
]


@pytest.mark.parametrize("content", BAD_CONFIGS, ids=lambda content: content[:50])
def test_a_config_that_no_run_wrote_is_refused_by_name(content, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / "config.json").write_text(content)
    code, _, err = call(train, "--resume", run)
    assert code == 2 and err.count("\n") == 1 and "config.json" in err, err


def test_metrics_that_no_run_wrote_are_refused_by_name(light, tmp_path):
    run = trained(tmp_path, "--steps", 1)
    for content in (b"a,b\n1,2\n", b"\xff\xfe\n", b"step,images,seconds,loss,lr,held_out_loss\nx,1,1,1,1,\n"):
        (run / "metrics.csv").write_bytes(content)
        code, _, err = call(train, "--resume", run, "--steps", 2)
        assert code == 2 and "metrics.csv" in err and "Traceback" not in err, err
        assert (run / "metrics.csv").read_bytes() == content
