"""Folders of images as users have them: any format, size, mode and name, links, and files that are no images."""

import gzip
import os
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from images import folder
from images.datasets import load_images
from images.folder import load_image_folder
from runtime.errors import RunFailed, UserError


def save(path, color, size=(40, 40), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def test_folder_takes_any_image_and_names_classes_by_folder(tmp_path):
    save(tmp_path / "cat" / "wide.png", (10, 20, 30), (90, 40))
    save(tmp_path / "cat" / "grey.jpg", 77, mode="L")
    save(tmp_path / "dog" / "deeper" / "ünïcode 犬.webp", (1, 2, 3), lossless=True)
    save(tmp_path / "dog" / "alpha.png", (9, 9, 9, 255), mode="RGBA")
    Image.fromarray(np.full((40, 40), 0x8000, np.uint16)).save(tmp_path / "dog" / "sixteen.png")
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "dog" / "palette.gif")
    (tmp_path / "notes.txt").write_text("no image")
    data = load_images("folder", tmp_path)
    assert data.classes == ("cat", "deeper", "dog")
    images = torch.cat([data.train, data.held_out])
    assert images.shape == (6, 3, 32, 32)
    assert {tuple(image[:, 16, 16].tolist()) for image in images} == {
        (10, 20, 30), (77, 77, 77), (1, 2, 3), (9, 9, 9), (127, 127, 127), (200, 100, 50),
    }  # fmt: skip


def test_folder_is_turned_upright_resized_by_the_short_side_and_cropped_in_the_centre(tmp_path):
    image = Image.new("RGB", (192, 64), (255, 0, 0))
    image.paste((0, 255, 0), (64, 0, 128, 64))  # the middle square is green, but for its top
    image.paste((0, 0, 255), (64, 0, 128, 32))
    exif = Image.Exif()
    exif[0x0112] = 3  # "turned by 180 degrees"
    for name in ("a", "b"):
        image.save(tmp_path / f"{name}.png", exif=exif)
    pixels = load_images("folder", tmp_path, 16).train[0]
    assert pixels[:, 2, 8].tolist() == [0, 255, 0]
    assert pixels[:, 13, 8].tolist() == [0, 0, 255]
    assert pixels[0, :, 1:15].max() < 30


def test_folder_with_a_test_split_holds_it_out(tmp_path):
    for split, color, count in (("train", (50, 50, 50), 3), ("test", (200, 200, 200), 2)):
        for i in range(count):
            save(tmp_path / split / "thing" / f"{i}.png", color)
    data = load_images("folder", tmp_path)
    assert (len(data.train), len(data.held_out)) == (3, 2)
    assert data.train.unique().tolist() == [50] and data.held_out.unique().tolist() == [200]


def test_a_large_folder_is_memory_mapped_and_the_same(tmp_path, monkeypatch):
    for i in range(6):
        save(tmp_path / f"{i}.png", (40 * i, 0, 0))
    in_memory = load_images("folder", tmp_path)
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    assert torch.equal(load_images("folder", tmp_path).train, in_memory.train)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "no images"),
        (lambda root: (root / "a.png").write_bytes(b"\x89PNG broken"), "a.png"),
        (lambda root: save(root / "a.png", 0), "at least 2"),
        (lambda root: (root / "a.png").write_bytes(gzip.compress(b"x")), "a.png"),
    ],
)
def test_bad_folders_are_refused_by_name(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        load_images("folder", tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", 0, (300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(UserError, match=r"bomb\.png"):
        load_images("folder", tmp_path)


def test_bad_images_are_named_and_counted_and_skipped_only_on_request(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png", (i, i, i))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:-30])
    (tmp_path / "4.png").write_bytes(b"")
    os.symlink(tmp_path / "nowhere", tmp_path / "5b.png")
    with pytest.raises(UserError, match=r"cannot read .*1\.png: .*; 3 of 7 images are bad, --skip-bad-images"):
        load_images("folder", tmp_path)
    data = load_images("folder", tmp_path, skip_bad_images=True)
    assert sorted(torch.cat([data.train, data.held_out])[:, 0, 0, 0].tolist()) == [0, 2, 3, 5]
    assert [line.split(":")[0] for line in data.skipped] == [f"cannot read {tmp_path}/{n}.png" for n in (1, 4, "5b")]
    for i in (0, 2, 3, 5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="no readable images"):
        load_images("folder", tmp_path, skip_bad_images=True)


def test_links_are_followed_once_and_what_is_no_file_is_left_alone(tmp_path):
    save(tmp_path / "real" / "cat" / "a.png", (1, 1, 1))
    save(tmp_path / "b.png", (2, 2, 2))
    root = tmp_path / "set"
    root.mkdir()
    os.symlink(tmp_path / "real" / "cat", root / "dog")  # a class that lies elsewhere
    os.symlink(tmp_path / "b.png", root / "linked.png")
    os.symlink(root, root / "again")  # without end
    os.mkfifo(root / "pipe.png")  # reading it would wait for ever
    (root / "folder.png").mkdir()
    found = load_image_folder(root, 8, 8)
    ((images, labels),) = found.splits
    assert images[:, 0, 0, 0].tolist() == [1, 2]
    assert [found.classes[label] for label in labels] == ["dog", "set"]


def test_sixteen_bit_images_are_turned_upright_too_and_float_ones_are_refused(tmp_path):
    pixels = np.zeros((40, 40), np.uint16)
    pixels[:20] = 0xFFFF
    exif = Image.Exif()
    exif[0x0112] = 3  # "turned by 180 degrees"
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    ((images, _),) = load_image_folder(tmp_path, 8, 8).splits
    assert images[0, 0, 1].max() == 0 and images[0, 0, 6].min() == 255
    Image.fromarray(np.ones((40, 40), np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(UserError, match=r"b\.tiff: floating-point"):
        load_image_folder(tmp_path, 8, 8)


def test_a_disk_without_room_for_the_temporary_file_is_a_failure_and_no_bus_error(tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / f"{i}.png", 0)
    monkeypatch.setattr(folder, "IN_MEMORY_BYTES", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunFailed, match="TMPDIR"):
            load_image_folder(tmp_path, 32, 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
