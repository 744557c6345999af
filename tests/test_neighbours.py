"""Nearest training images against brute force, and copies, which have to be found at distance 0."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from lab.evaluation import neighbours as module
from lab.evaluation.neighbours import nearest, picture_of_neighbours


def noise(count: int, seed: int, side: int = 8) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=random, dtype=torch.uint8)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_neighbours_are_those_of_brute_force(chunk, monkeypatch):
    monkeypatch.setattr(module, "TRAIN_AT_ONCE", chunk)
    images, train = noise(9, 0), noise(50, 1)
    found = nearest(images, train, 5)
    brute = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(train.flatten(1).numpy().astype(float))
    distance, index = brute.kneighbors(images.flatten(1).numpy().astype(float))
    assert np.array_equal(found.index.numpy(), index)
    assert np.allclose(found.distance.numpy(), distance / np.sqrt(3 * 8 * 8))
    assert not found.mirrored.any()


@pytest.mark.parametrize("chunk", [7, 4096])
def test_mirrored_images_count_once_at_the_nearer_of_the_two(chunk, monkeypatch):
    monkeypatch.setattr(module, "TRAIN_AT_ONCE", chunk)
    images, train = noise(9, 0), noise(50, 1)
    both = torch.stack([train, train.flip(3)]).flatten(2).double()  # (2, N, pixels)
    distance = torch.cdist(images.flatten(1).double()[None], both) / (3 * 8 * 8) ** 0.5  # (2, Q, N)
    nearer, mirrored = distance.min(0)
    expected, index = nearer.sort(1)
    found = nearest(images, train, 6, mirror=True)
    assert torch.equal(found.index, index[:, :6])
    assert torch.allclose(found.distance, expected[:, :6])
    assert torch.equal(found.mirrored, mirrored.bool().gather(1, found.index))
    assert 0.2 < found.mirrored.double().mean() < 0.8


@pytest.mark.parametrize("side", [8, 32])
def test_a_copy_and_its_mirror_image_are_found_at_distance_zero(side):
    train = noise(300, 1, side)
    images = torch.stack([train[17], train[299].flip(2)])  # the last axis of (C, H, W) is the width
    plain = nearest(images, train, 2)
    assert plain.distance[0, 0] == 0 and plain.index[0, 0] == 17
    assert (plain.distance[:, 1] > 50).all() and plain.distance[1, 0] > 50
    found = nearest(images, train, 2, mirror=True)
    assert found.distance[:, 0].tolist() == [0, 0] and (found.distance[:, 1] > 50).all()
    assert found.index[:, 0].tolist() == [17, 299] and found.mirrored[:, 0].tolist() == [False, True]


def test_one_pixel_that_differs_is_measured():
    train = noise(5, 1)
    image = train[3:4].clone()
    image[0, 1, 2, 3] ^= 1
    assert nearest(image, train, 1).distance.item() == pytest.approx((1 / 192) ** 0.5)


def test_the_picture_has_the_image_a_blank_and_what_was_found():
    images, train = noise(4, 0), noise(10, 1)
    images[2] = train[7].flip(2)
    found = nearest(images, train, 2, mirror=True)
    grid = ((picture_of_neighbours(images, train, found) + 1) * 127.5).round().byte().unflatten(0, (4, 4))
    assert torch.equal(grid[:, 0], images)
    assert (grid[:, 1] == 255).all()
    assert torch.equal(grid[2, 2], images[2])  # drawn mirrored, as it was matched
    plain = nearest(images, train, 2)
    grid = ((picture_of_neighbours(images, train, plain) + 1) * 127.5).round().byte()
    assert torch.equal(grid[3], train[plain.index[0, 1]])


def test_fewer_training_images_than_asked_for_leave_blanks():
    images, train = noise(5, 0), noise(1, 1)
    found = nearest(images, train, 3)
    assert found.index.shape == (5, 1)
    grid = picture_of_neighbours(images, train, found).unflatten(0, (5, 5))
    assert (grid[:, 3:] == 1).all() and not (grid[:, 2] == 1).all()
