"""Folders that were decoded before: the second start reads the cache, and any change of the files drops it."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from images import cache, folder
from images.folder import load_image_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, in which twenty images are many."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(folder, "MANY", 15)


@pytest.fixture
def root(tmp_path):
    """Twenty images of noise."""
    random = np.random.default_rng(0)
    (tmp_path / "set" / "a").mkdir(parents=True)
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / "set" / "a" / f"{i}.png")
    return tmp_path / "set"


def pixels(root) -> torch.Tensor:
    ((images, _),) = load_image_folder(root, 8, 8, skip_bad_images=True).splits
    return images


def refuse_to_decode(monkeypatch):
    monkeypatch.setattr(folder, "outcome", lambda *_: pytest.fail("the images were decoded again"))


def test_the_second_start_decodes_nothing_and_gives_the_same(root, monkeypatch):
    (root / "a" / "bad.png").write_bytes(b"broken")
    first = load_image_folder(root, 8, 8, skip_bad_images=True)
    refuse_to_decode(monkeypatch)
    second = load_image_folder(root, 8, 8, skip_bad_images=True)
    assert torch.equal(first.splits[0][0], second.splits[0][0]) and torch.equal(first.splits[0][1], second.splits[0][1])
    assert (first.skipped, first.notes, first.classes) == (second.skipped, second.notes, second.classes)


CHANGES = {
    "a file is new": lambda root: shutil.copy(root / "a/0.png", root / "a/new.png"),
    "a file is gone": lambda root: (root / "a/3.png").unlink(),
    "a file has another name": lambda root: (root / "a/3.png").rename(root / "a/99.png"),
    "a file has another content": lambda root: Image.new("RGB", (12, 12)).save(root / "a/3.png"),
    "a file has another date": lambda root: os.utime(root / "a/3.png", (1, 1)),
    "Pillow is another": lambda root: setattr(cache.PIL, "__version__", "0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_drops_the_entry(change, root, monkeypatch):
    before = pixels(root)
    monkeypatch.setattr(cache.PIL, "__version__", cache.PIL.__version__)  # restored at the end
    CHANGES[change](root)
    decoded = []
    real = folder.outcome
    monkeypatch.setattr(folder, "outcome", lambda *one: decoded.append(1) or real(*one))
    after = pixels(root)
    assert decoded and torch.equal(before, after) == (change in ("a file has another date", "Pillow is another"))


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], lambda b: b""])
@pytest.mark.parametrize("ending", ["pixels", "json"])
def test_a_damaged_entry_is_not_used(damage, ending, root, tmp_path):
    before = pixels(root)
    (entry,) = (tmp_path / "cache").glob(f"*.{ending}")
    entry.write_bytes(damage(entry.read_bytes()))
    assert torch.equal(pixels(root), before)


def test_where_no_cache_can_be_written_the_images_are_there_all_the_same(root, tmp_path):
    (tmp_path / "cache").write_text("a file in its way")
    assert len(pixels(root)) == 20
    assert (tmp_path / "cache").read_text() == "a file in its way"


def test_few_images_are_not_kept(root, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MANY", 21)
    assert len(pixels(root)) == 20 and not (tmp_path / "cache").exists()


def test_the_least_recently_used_entries_leave_first(root, tmp_path, monkeypatch):
    size = pixels(root).numel()
    monkeypatch.setattr(cache, "LARGEST_TOTAL", 2 * size + 1)
    (first,) = (tmp_path / "cache").glob("*.pixels")
    os.utime(first, (1, 1))
    for name in ("b", "c"):
        shutil.copytree(root, tmp_path / name)
        pixels(tmp_path / name)
    assert not first.exists() and len(list((tmp_path / "cache").glob("*.pixels"))) == 2


def test_several_processes_decode_what_one_would(root, monkeypatch):
    (root / "a" / "bad.png").write_bytes(b"broken")
    Image.fromarray(np.full((12, 12), 300, np.uint16)).save(root / "a" / "deep.png")
    alone = load_image_folder(root, 8, 8, skip_bad_images=True)
    shutil.rmtree(cache.cache_folder())
    monkeypatch.setattr(folder, "MANY", 4)
    monkeypatch.setattr(folder.os, "cpu_count", lambda: 3)
    several = load_image_folder(root, 8, 8, skip_bad_images=True)
    assert torch.equal(alone.splits[0][0], several.splits[0][0])
    assert (alone.skipped, alone.notes) == (several.skipped, several.notes)


def test_a_decoding_process_starts_without_torch():
    code = "import images.decode, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
