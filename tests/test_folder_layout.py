"""Folders as other programs leave them: which files are images, which folders are splits, what is passed over."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import call, trained
from PIL import Image, features

import sample
import train
from images.datasets import load_images
from images.folder import load_image_folder
from runtime.errors import UserError


def save(path, value=0, **options):
    """An image of 8x8 pixels whose value says which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path, **options)


def values(root) -> list[list[int]]:
    """The values of the images of each split."""
    return [sorted(images[:, 0, 4, 4].tolist()) for images, _ in load_image_folder(root, 8, 8).splits]


def notes(root) -> str:
    return "; ".join(load_image_folder(root, 8, 8).notes)


FORMATS = ["png", "jpg", "bmp", "gif", "webp", "tiff", "ppm", "tga", "pcx", "sgi", "ico", "dds"]
FORMATS += ["avif"] * features.check("avif") + ["jp2"] * features.check("jpg_2000")


def test_every_still_format_that_pillow_writes_here_is_read(tmp_path):
    for i, ending in enumerate(FORMATS):
        save(tmp_path / "a" / f"{i}.{ending}", 10 + 15 * i, **({"lossless": True} if ending == "webp" else {}))
    ((images, _),) = load_image_folder(tmp_path, 8, 8).splits
    found = sorted(images[:, 0, 4, 4].tolist())
    assert np.abs(np.array(found) - [10 + 15 * i for i in range(len(FORMATS))]).max() <= 6  # some formats lose a little
    assert not notes(tmp_path)


def test_what_looks_like_a_picture_and_is_not_read_is_counted_by_its_ending(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / name)
    for name in ("c.heic", "d.HEIC", "e.svg", "f.nef", "notes.txt", "movie.mpg"):
        (tmp_path / name).write_bytes(b"x")
    assert notes(tmp_path) == "not read, for want of a reader: .heic 2, .svg 1, .nef 1"
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"no images in .*; not read: \.heic 2"):
        load_images("folder", tmp_path)


def test_hidden_files_and_the_litter_of_other_programs_are_passed_over_and_counted(tmp_path):
    for i, name in enumerate(("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png")):
        save(tmp_path / name, i)
    for name in (
        "cat/._a.png",
        "cat/.ipynb_checkpoints/a.png",
        ".thumbnails/x.png",
        "__MACOSX/cat/a.png",
        "@eaDir/t.jpg",
    ):
        save(tmp_path / name, 99, format="PNG")
    found = load_image_folder(tmp_path, 8, 8)
    assert found.classes == ("cat", "dog") and values(tmp_path) == [[0, 1, 2, 3]]
    assert set(found.notes[0].removeprefix("passed over: ").split(", ")) == {
        *("hidden folders 2", "hidden files 1", "folders of other programs 2"),
    }


@pytest.mark.parametrize(
    "folders, expected",
    [
        (["train/a", "test/a"], [[0], [1]]),
        (["Train/a", "TEST/a"], [[0], [1]]),
        (["training/a", "validation/a"], [[0], [1]]),
        (["train/a", "val/a"], [[0], [1]]),
        (["train/a", "dev/a"], [[0], [1]]),
        (["train/a", "val/a", "test/a"], [[0], [2]]),  # val is passed over
        (["train/a"], [[0]]),
        (["train", "test"], [[0], [1]]),  # without classes
        (["a", "b"], [[0, 1]]),
    ],
)
def test_the_usual_names_of_splits_are_taken_as_such_in_any_case(folders, expected, tmp_path):
    for i, name in enumerate(folders):
        save(tmp_path / name / "0.png", i)
    assert values(tmp_path) == expected
    assert ("val/" in notes(tmp_path)) == (len(folders) == 3)


@pytest.mark.parametrize(
    "folders, words",
    [
        (["cat", "dog", "test"], ["cat/, dog/ beside test/", "train/CLASS"]),  # a flat test beside classes
        (["train/a", "b"], ["b/ beside train/"]),
        (["train/a", "training/a"], ["train and training"]),
        (["train/a", "Train/a"], ["Train and train"]),
        (["test/a"], ["test/"]),
        (["train/a", "test/a", "test/b"], ["no image of 'b'"]),  # a class without a training image
    ],
)
def test_an_ambiguous_layout_is_refused_with_the_layout_that_is_expected(folders, words, tmp_path):
    for i, name in enumerate(folders):
        save(tmp_path / name / "0.png", i)
    with pytest.raises(UserError, match="--data-dir") as refused:
        load_image_folder(tmp_path, 8, 8)
    assert all(word in str(refused.value) for word in words), refused.value


def test_no_class_loses_its_last_training_image_to_the_held_out_ones(tmp_path):
    for i in range(60):
        save(tmp_path / ("rare" if i == 25 else "common") / f"{i:02d}.png", i)
    data = load_images("folder", tmp_path, 8)
    assert min(data.images_per_class().values()) >= 1 and len(data.held_out) >= 1
    shutil.rmtree(tmp_path / "common")
    save(tmp_path / "other" / "0.png")
    with pytest.raises(UserError, match="each class has a single image"):
        load_images("folder", tmp_path, 8)


def test_a_run_below_its_own_images_is_not_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        save(tmp_path / "cat" / f"{i}.png", 40 * i)
    options = ["--dataset", "folder", "--data-dir", ".", "--image-size", 8, "--batch-size", 2, "--timesteps", 4]
    run = trained(tmp_path / "runs", "--steps", 1, options=[*options, "--precision", "fp32", "--device", "cpu"])
    for name in ("grid.png", "sub/beside.gif"):
        flag = "--output" if name.endswith("png") else "--gif"
        code, _, err = call(sample, "--checkpoint", run, "--num-images", 4, "--steps", 2, flag, name)
        assert code == 0, err
    assert values(tmp_path) == [[0, 40, 80, 120]]
    assert set(notes(tmp_path).removeprefix("passed over: ").split(", ")) == {
        *("pictures that these commands wrote 3", "run folders 1"),  # the grid of --gif is samples.png
    }
    code, _, err = call(train, "--resume", run, "--steps", 2)
    assert code == 0, err


def test_classes_and_what_was_left_out_are_printed_and_recorded(tmp_path):
    for i in range(5):
        save(tmp_path / "set" / ("cat" if i else "dog") / f"{i}.png", i)
    (tmp_path / "set" / "x.heic").write_bytes(b"x")
    options = [
        "--dataset",
        "folder",
        "--data-dir",
        tmp_path / "set",
        "--output-dir",
        tmp_path / "runs",
        "--timesteps",
        4,
    ]
    code, out, err = call(train, *options, "--steps", 1, "--batch-size", 2)
    assert code == 0, err
    assert "classes  cat 3, dog 1\n" in out and "note     not read, for want of a reader: .heic 1\n" in out
    record = json.loads((tmp_path / "runs/00000-true-folder/config.json").read_text())["folder"]
    assert record["classes"] == {"cat": 3, "dog": 1} and len(record["notes"]) == 1
    _, dry, _ = call(train, *options, "--dry-run")
    assert "classes  cat 3, dog 1\n" in dry


def test_images_that_were_replaced_since_are_said_when_a_run_is_resumed(tmp_path):
    for i in range(4):
        save(tmp_path / "set" / f"{i}.png", i)
    options = ["--dataset", "folder", "--data-dir", tmp_path / "set", "--output-dir", tmp_path / "runs"]
    code, _, err = call(train, *options, "--steps", 1, "--batch-size", 2, "--timesteps", 4)
    assert code == 0, err
    resume = ["--resume", "--output-dir", tmp_path / "runs", "--steps", 2]
    code, out, err = call(train, *resume, "--dry-run")
    assert code == 0 and "note     the images" not in out, err
    save(tmp_path / "set" / "1.png", 77)
    code, out, err = call(train, *resume)
    assert code == 0 and "note     the images are not those that" in out, err


def test_transparent_pixels_show_white_whatever_colour_they_hide(tmp_path):
    random = np.random.default_rng(0)
    hidden = np.dstack([random.integers(0, 256, (8, 8, 3)), np.zeros((8, 8))]).astype(np.uint8)
    Image.fromarray(hidden).save(tmp_path / "rgba.png")
    Image.fromarray(hidden[..., 2:]).save(tmp_path / "la.png")
    palette = Image.fromarray(random.integers(0, 2, (8, 8), dtype=np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=bytes([0, 0]))
    half = np.full((8, 8, 4), (0, 0, 0, 128), np.uint8)
    Image.fromarray(half).save(tmp_path / "z.png")
    ((images, _),) = load_image_folder(tmp_path, 8, 8).splits
    assert torch.equal(images[:3], torch.full((3, 3, 8, 8), 255, dtype=torch.uint8))
    assert images[3].unique().tolist() == [127]


def deep(path, largest, dtype=np.uint16, **options):
    """A grey ramp from 0 to `largest`."""
    ramp = np.linspace(0, largest, 64).reshape(8, 8).astype(dtype)
    Image.fromarray(ramp).save(path, **options)


def test_deep_grey_is_scaled_by_the_declared_range_else_by_the_bits_that_the_set_needs(tmp_path):
    deep(tmp_path / "declared.tif", 1000, tiffinfo={281: 1000})
    ((images, _),) = load_image_folder(tmp_path, 8, 8).splits
    assert (images.min(), images.max()) == (0, 255) and not notes(tmp_path)
    deep(tmp_path / "a.png", 4095)
    deep(tmp_path / "b.png", 2000)
    deep(tmp_path / "c.tif", 4000, np.int32)
    ((images, _),) = load_image_folder(tmp_path, 8, 8).splits
    assert [image.max().item() for image in images] == [255, 124, 249, 255]
    assert "3 deep grey images declare no range: assumed 12 bits, the largest is 4095" in notes(tmp_path)


def test_deep_grey_that_would_become_one_grey_is_a_bad_image(tmp_path):
    deep(tmp_path / "a.png", 65535)
    deep(tmp_path / "b.png", 100)
    with pytest.raises(UserError, match=r"b\.png: values from 0 to 100 of a range to 65535 would become one grey"):
        load_image_folder(tmp_path, 8, 8)
    (tmp_path / "b.png").unlink()
    Image.fromarray(np.full((8, 8), -5, np.int32)).save(tmp_path / "c.tif")
    with pytest.raises(UserError, match=r"c\.tif: values from -5"):
        load_image_folder(tmp_path, 8, 8)
