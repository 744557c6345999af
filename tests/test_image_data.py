"""Data sets from real files on the disk, and batches that follow from (seed, number) alone."""

import hashlib
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from images.batches import held_out_bank, to_float, training_batch
from images.datasets import load_images
from runtime.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "unused")


def evenly(uniform):
    """Each of 400 timesteps as often as any other."""
    return (400 * uniform).long()


def batch(data, **options):
    return training_batch(data, evenly, **{"seed": 0, "number": 0, "batch_size": 8} | options)


def save(path, color, size=(40, 40), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def test_digits_are_scikit_learns(digits):
    source = load_digits()
    everything = torch.cat([digits.train, digits.held_out]).flatten(1)
    assert everything.shape == (1797, 64)
    assert digits.held_out.shape == (36, 1, 8, 8)  # a fiftieth
    expected = torch.from_numpy(np.round(source.data * 255 / 16)).to(torch.uint8)
    assert torch.equal(everything.sort(0).values, expected.sort(0).values)
    labels = torch.cat([digits.train_labels, digits.held_out_labels])
    assert torch.equal(labels.bincount(), torch.from_numpy(source.target).bincount())


def test_held_out_images_are_not_trained_on():
    data = load_images("digits", "unused")
    train = {image.numpy().tobytes() for image in data.train}
    assert sum(image.numpy().tobytes() in train for image in data.held_out) == 0


def test_an_epoch_visits_each_image_once_and_each_epoch_in_another_order(digits):
    size = len(digits.train)  # 1,761 = 3 * 587
    orders = []
    for epoch in range(2):
        numbers = range(epoch * 587, (epoch + 1) * 587)
        orders.append(torch.cat([batch(digits, number=n, batch_size=3).x_0 for n in numbers]))
    expected = to_float(digits.train).flatten(1).sort(0).values
    for order in orders:
        assert len(order) == size
        assert torch.equal(order.flatten(1).sort(0).values, expected)
    assert not torch.equal(orders[0], orders[1])


def test_a_batch_may_be_larger_than_the_set(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", (i, i, i))
    data = load_images("folder", tmp_path)
    counts = batch(data, batch_size=17).x_0[:, 0, 0, 0].mul(127.5).add(127.5).round().long().bincount()
    assert sorted(counts[counts > 0].tolist()) == [4, 4, 4, 5]  # 4 images: one is held out


def test_a_batch_depends_on_seed_and_number_alone(digits):
    first = batch(digits, number=7, seed=3)
    batch(digits, number=99, seed=1)
    again = batch(digits, number=7, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert not torch.equal(first.eps, batch(digits, number=8, seed=3).eps)
    assert not torch.equal(first.eps, batch(digits, number=7, seed=4).eps)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_shares_of_all_processes_are_the_batch(digits, world_size):
    whole = batch(digits, number=5)
    shares = [batch(digits, number=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for name, value in vars(whole).items():
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), value)


def test_timesteps_are_stratified_and_uniform(digits):
    times = torch.stack([batch(digits, number=n).t for n in range(1000)])
    assert (times.sort(1).values.diff(dim=1) - 50).abs().max() <= 1
    counts = times.flatten().bincount(minlength=400)
    assert len(counts) == 400
    assert counts.float().mean() == 20 and counts.min() >= 5 and counts.max() <= 40


def test_noise_is_standard_normal_and_labels_are_dropped_at_random(digits):
    batches = [batch(digits, number=n, batch_size=64) for n in range(50)]
    eps = torch.cat([b.eps for b in batches])
    assert eps.mean().abs() < 0.01 and (eps.std() - 1).abs() < 0.01
    dropped = torch.cat([b.labels for b in batches]).eq(10).float().mean()
    assert 0.07 < dropped < 0.13


def test_mirroring_flips_half_of_the_images(tmp_path):
    for i in range(4):
        image = Image.new("RGB", (32, 32))
        image.paste((255, 255, 255), (0, 0, 16, 32))
        image.save(tmp_path / f"{i}.png")
    data = load_images("folder", tmp_path)
    left_is_white = torch.cat([batch(data, number=n).x_0[:, 0, 0, 0] > 0 for n in range(50)]).float()
    assert 0.4 < left_is_white.mean() < 0.6


def test_bank_is_frozen_stratified_and_of_held_out_images(digits):
    bank = held_out_bank(digits, 400)
    assert all(
        torch.equal(a, b) for a, b in zip(vars(bank).values(), vars(held_out_bank(digits, 400)).values(), strict=True)
    )
    assert bank.t.bincount().tolist() == [5] * 400
    held_out = {image.numpy().tobytes() for image in to_float(digits.held_out)}
    assert {image.numpy().tobytes() for image in bank.x_0} == held_out
    assert len(bank.eps.flatten(1).unique(dim=0)) == 2000


def test_image_size_resizes_a_named_set():
    data = load_images("digits", "unused", 16)
    assert data.shape == (1, 16, 16)
    halved = torch.nn.functional.avg_pool2d(data.train.float(), 2)
    assert (halved - load_images("digits", "unused").train.float()).abs().mean() < 12


def fake_cifar10(root, monkeypatch, **replaced: bytes) -> torch.Tensor:
    """CIFAR-10's own archive format with 60 images, some files replaced, and torchvision told the checksums."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3072), dtype=np.uint8)
    files = {f"data_batch_{i + 1}": slice(10 * i, 10 * i + 10) for i in range(5)} | {"test_batch": slice(50, 60)}
    contents = {
        name: pickle.dumps({"data": pixels[part], "labels": [i % 10 for i in range(part.start, part.stop)]})
        for name, part in files.items()
    }
    contents["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    contents |= replaced
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    cifar10 = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar10, "meta", cifar10.meta | {"md5": sums["batches.meta"]})
    return torch.from_numpy(pixels).view(60, 3, 32, 32)


def test_cifar10_is_read_from_a_placed_archive(tmp_path, monkeypatch):
    pixels = fake_cifar10(tmp_path, monkeypatch)
    data = load_images("cifar10", tmp_path)
    assert torch.equal(data.train, pixels[:50]) and torch.equal(data.held_out, pixels[50:])
    assert data.train_labels[:3].tolist() == [0, 1, 2] and data.classes[3] == "class 3"
    assert data.mirror


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_read_from_placed_files(name, folder, tmp_path):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for split, part in (("train", slice(0, 8)), ("t10k", slice(8, 12))):
        count = part.stop - part.start
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels[part].tobytes())
        labels = np.array([2049, count], ">i4").tobytes() + bytes(range(count))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    data = load_images(name, tmp_path)
    assert torch.equal(data.train[:, 0], torch.from_numpy(pixels[:8]))
    assert data.held_out_labels.tolist() == [0, 1, 2, 3]
    assert not data.mirror


@pytest.mark.parametrize("arguments, word", [(("imagenet", "."), "imagenet"), (("digits", ".", 10), "10")])
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(UserError, match=word):
        load_images(*arguments)


def no_network(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


def test_a_cifar10_archive_that_is_cut_short_is_named_as_such(tmp_path, monkeypatch):
    fake_cifar10(tmp_path, monkeypatch)
    no_network(monkeypatch)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: is cut short or damaged"):
        load_images("cifar10", tmp_path)
    archive.unlink()
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: not found"):
        load_images("cifar10", tmp_path)


def test_a_cifar10_file_that_was_damaged_after_unpacking_is_unpacked_again(tmp_path, monkeypatch):
    pixels = fake_cifar10(tmp_path, monkeypatch)
    load_images("cifar10", tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:50])
    assert torch.equal(load_images("cifar10", tmp_path).train, pixels[:50])


def test_a_cifar10_pickle_that_would_run_code_does_not_run_it(tmp_path, monkeypatch):
    trace = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    fake_cifar10(tmp_path, monkeypatch, test_batch=pickle.dumps({"data": Attack(), "labels": []}))
    with pytest.raises(UserError, match="mkdir is not data"):
        load_images("cifar10", tmp_path)
    assert not trace.exists()


def test_mnist_files_that_are_cut_short_are_refused(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind, magic in (("images-idx3", [2051, 12, 28, 28]), ("labels-idx1", [2049, 12])):
            (raw / f"{split}-{kind}-ubyte").write_bytes(np.array(magic, ">i4").tobytes() + b"123")
    with pytest.raises(UserError, match="MNIST"):
        load_images("mnist", tmp_path)
