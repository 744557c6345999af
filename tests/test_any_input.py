"""Whatever is typed, saved or put into a folder: it is taken, or refused in one line; no traceback reaches the user."""

import io
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import call, same
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
import train
import training.loop
from choices import DATASETS, MODELS
from images.datasets import load_images
from images.decode import readable_suffixes
from lab import drawing
from models import build_model
from runtime.errors import UserError
from training import checkpoint
from training.checkpoint import load_model, read_model, read_resume, save_model, save_run

settings.register_profile("thousand", max_examples=1000, deadline=None, derandomize=True, database=None)
settings.load_profile("thousand")

CONFIG = {
    "model": "true",
    "model_config": {"in_channels": 1, "channels": [4, 4, 4], "ode_steps": [1, 1, 1], "solver": "euler"},
    **{"timesteps": 8, "schedule": "linear", "prediction_type": "edm", "dataset": "digits"},
    **{"shape": [1, 8, 8], "classes": list("0123456789"), "training_images": 9},
}


TENSORS = {"a": torch.arange(60.0).view(3, 4, 5), "b.weight": torch.ones(2, dtype=torch.int64)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder's two files with few and small tensors, so that a thousand of them are read in seconds."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, TENSORS, CONFIG, {"model": TENSORS, "step": 3})
    return folder


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """A current folder in which a command may write what it likes."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


# ---- the argument parser

WORDS = st.sampled_from(
    [
        *("0", "1", "-1", "3", "1e400", "-0.0", "nan", "inf", "-inf", "1e-300", "99999999999999999999", "0x10", "1_0"),
        *(
            "",
            " ",
            "-",
            "--",
            "--x",
            "=",
            "true",
            "auto",
            "cpu",
            "a.png",
            "/dev/null",
            "/nonexistent/a.png",
            "é",
            "\udcff",
        ),
        *DATASETS,
        *MODELS,
    ]
)
WORDS |= st.text(max_size=12).filter(lambda text: "\0" not in text) | st.integers().map(str) | st.floats().map(str)


def arguments(module) -> st.SearchStrategy[list[str]]:
    """Command lines of the module's own flags in either spelling, of others, and of words where they may not stand."""
    flags = sorted(flag for action in module.parser()._actions for flag in action.option_strings)
    flag = st.sampled_from([*flags, *(flag.replace("-", "_").replace("__", "--", 1) for flag in flags)])
    pair = st.tuples(flag, WORDS).map(list) | st.builds("{}={}".format, flag, WORDS).map(lambda word: [word])
    alone = (flag | WORDS).map(lambda word: [word])
    return st.lists(st.one_of(pair, pair, pair, alone), max_size=5).map(
        lambda parts: [word for part in parts for word in part]
    )


def check_command(module, words: list[str]) -> None:
    code, _, err = call(module, *words)
    assert code in (0, 2), (words, err)
    assert err.count("\n") == (code == 2), (words, err)
    assert not err or err.startswith(f"{module.__name__}.py: error: "), (words, err)


@given(words=arguments(train))
def test_any_command_line_of_train_is_taken_or_refused(words):
    with mock.patch.object(training.loop, "train", lambda *_, **__: Path("runs/00000-true-digits")):
        check_command(train, words)


@given(words=arguments(sample))
def test_any_command_line_of_sample_is_taken_or_refused(words):
    def draw(_, drawn, *__):
        images = {name: torch.zeros(1, 3, 8, 8) for name in drawn}
        return images, [images]

    # single images are not written: a folder may be anywhere
    with mock.patch.multiple(drawing, draw=draw, save_folder=mock.DEFAULT, save_npz=mock.DEFAULT):
        check_command(sample, words)


# ---- the checkpoint reader


@st.composite
def changed(draw, content: bytes) -> bytes:
    """The content with parts cut out, overwritten, repeated or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)) | st.integers(0, min(200, len(content))))
        length = draw(st.integers(0, 64) | st.integers(0, len(content)))
        new = draw(st.binary(max_size=64) | st.just(content[start : start + length]))
        content = content[:start] + new + content[start + length * draw(st.booleans()) :]
    return content


def read_or_refuse(read, path: Path):
    try:
        return read(path)
    except UserError as error:
        assert str(path) in str(error)


@given(data=st.data())
def test_any_bytes_are_a_model_or_are_refused(data, run):
    whole = (run / "model.safetensors").read_bytes()
    content = data.draw(st.binary(max_size=200) | changed(whole))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(content)
        read = read_or_refuse(read_model, path)
    assert read is None or content == whole


@given(data=st.data())
def test_any_bytes_are_a_checkpoint_or_are_refused(data, run):
    whole = (run / "checkpoint.pt").read_bytes()
    content = data.draw(st.binary(max_size=200) | changed(whole))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        path.write_bytes(content)
        state = read_or_refuse(read_resume, path)
    if state is not None:
        assert state["step"] == 3
        assert same(state["model"], TENSORS)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The weights of CONFIG's model."""
    return build_model("true", **CONFIG["model_config"]).state_dict()


NUMBERS = st.integers(-3, 40) | st.just(10**15) | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.sampled_from(["true", "unet", "euler", "v"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    key=st.sampled_from(sorted(CONFIG)),
    inner=st.none() | st.sampled_from(["channels", "in_channels", "num_steps"]),
    value=JSON,
)
def test_any_config_is_a_models_or_is_refused(key, inner, value, tensors):
    config = CONFIG | ({"model_config": CONFIG["model_config"] | {inner: value}} if inner else {key: value})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_model(path, TENSORS, config)  # quicker than the weights, of which the config says nothing
        config = read_model(path)[1]
    with mock.patch.object(checkpoint, "read_model", lambda _: (tensors, config)):
        loaded = read_or_refuse(load_model, path)
    if loaded is not None:
        model, scheduler, config = loaded
        x = torch.zeros(1, *config["shape"])
        assert model(x, torch.zeros(1, dtype=torch.long)).shape == x.shape and scheduler.num_timesteps > 0


# ---- the folder reader


@st.composite
def image_files(draw) -> bytes:
    """An image file of any mode, size and format that suits it, whole or changed."""
    mode, format = draw(
        st.sampled_from(
            [
                *(("RGB", f) for f in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")),
                *(
                    ("RGBA", "PNG"),
                    ("LA", "PNG"),
                    ("L", "JPEG"),
                    ("P", "PNG"),
                    ("P", "GIF"),
                    ("1", "PNG"),
                    ("1", "TIFF"),
                ),
                *(("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("LAB", "TIFF")),
            ]
        )
    )
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(0, 9))  # orientation: 1 to 8 are defined
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format, **({"exif": exif} if format in ("PNG", "JPEG", "WEBP") else {}))
    return draw(st.just(buffer.getvalue()) | changed(buffer.getvalue()))


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
SUFFIXES = st.sampled_from([*sorted(readable_suffixes()), ".PNG", ".txt", ""])


@given(
    files=st.lists(st.tuples(NAMES, SUFFIXES, image_files() | st.binary(max_size=100)), max_size=4),
    skip=st.booleans(),
)
def test_any_folder_is_read_or_refused(files, skip):
    with tempfile.TemporaryDirectory() as folder:
        for name, suffix, content in files:
            path = Path(folder, name + suffix)
            if path.parent == Path(folder) and path.name not in ("", "..") and len(path.name.encode()) < 256:
                path.write_bytes(content)
        try:
            data = load_images("folder", folder, 8, skip_bad_images=skip)
        except UserError as error:
            assert str(error).startswith("--data-dir: ")
            return
    images = torch.cat([data.train, data.held_out])
    assert images.shape[1:] == (3, 8, 8) and len(data.train) >= 1 and len(data.held_out) >= 1
    assert skip or not data.skipped
    assert len(images) + len(data.skipped) <= len(files)
    assert images.numpy().dtype == np.uint8
