"""The sliced Wasserstein distance against scipy's filters and 1-D distance, and against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from lab.evaluation import sliced_wasserstein as module
from lab.evaluation.sliced_wasserstein import (
    DIRECTIONS,
    PATCHES,
    downsample,
    laplacian_pyramid,
    num_blocks,
    pyramid_levels,
    sliced_wasserstein,
    upsample,
)


def noise(count: int, channels: int, side: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=random, dtype=torch.uint8)


def textures(count: int, seed: int, blur: float = 1.0, channels: int = 3, side: int = 32) -> torch.Tensor:
    """Blurred noise, stretched to a standard deviation of 40 levels."""
    values = np.random.default_rng(seed).standard_normal((count, channels, side, side))
    values = ndimage.gaussian_filter(values, (0, 0, blur, blur), mode="wrap")
    return torch.from_numpy((128 + 40 * values / values.std()).clip(0, 255).astype(np.uint8))


def scipy_pyramid(images: np.ndarray, num_levels: int) -> list[np.ndarray]:
    """The pyramid by scipy's convolution, mirrored at the borders without repeating them."""
    row = np.array([1, 4, 6, 4, 1]) / 16
    kernel = np.outer(row, row)[None, None]
    levels = [images]
    for _ in range(num_levels - 1):
        smaller = ndimage.convolve(levels[-1], kernel, mode="mirror")[:, :, ::2, ::2]
        spread = np.zeros_like(levels[-1])
        spread[:, :, ::2, ::2] = smaller
        levels[-1] = levels[-1] - ndimage.convolve(spread, 4 * kernel, mode="mirror")
        levels.append(smaller)
    return levels


@pytest.mark.parametrize("side, num_levels", [(32, 2), (64, 3), (8, 1)])
def test_the_pyramid_is_scipys_and_gives_the_images_back(side, num_levels):
    images = noise(3, 3, side, 0).double()
    levels = laplacian_pyramid(images, num_levels)
    assert [level.shape[-1] for level in levels] == [side // 2**i for i in range(num_levels)]
    for level, expected in zip(levels, scipy_pyramid(images.numpy(), num_levels), strict=True):
        assert np.allclose(level.numpy(), expected)
    whole = levels[-1]
    for level in reversed(levels[:-1]):
        whole = upsample(whole) + level
    assert torch.allclose(whole, images)


def test_a_flat_image_stays_flat_through_both_filters():
    flat = torch.full((1, 2, 16, 16), 37.0)
    assert torch.allclose(downsample(flat), torch.full((1, 2, 8, 8), 37.0))
    assert torch.allclose(upsample(flat), torch.full((1, 2, 32, 32), 37.0))


def test_levels_are_those_that_hold_a_patch():
    expected = {32: [32, 16], 64: [64, 32, 16], 36: [36, 18], 28: [28], 16: [16], 8: [8], 7: [7], 4: []}
    assert {side: pyramid_levels(side) for side in expected} == expected


@pytest.mark.parametrize("channels, side", [(3, 32), (1, 8)])
def test_the_whole_protocol_agrees_with_a_plain_one(channels, side):
    """Patch by patch in numpy, and scipy's 1-D distance along each direction; only the random draws are shared."""
    a, b = noise(6, channels, side, 0), textures(6, 1, channels=channels, side=side)
    found = sliced_wasserstein(a, [b], seed=3)[0]
    random = torch.Generator().manual_seed(3)
    assert list(found) == pyramid_levels(side)
    pyramids = [scipy_pyramid(images.double().numpy(), len(found)) for images in (a, b)]
    for i, level in enumerate(found):
        corners = torch.randint(level - 6, (6, PATCHES, 2), generator=random).numpy()
        directions = torch.randn(channels * 49, DIRECTIONS, generator=random).double().numpy()
        directions /= np.sqrt((directions**2).sum(0))
        projected = []
        for pyramid in pyramids:
            patches = np.array(
                [pyramid[i][n, :, row : row + 7, column : column + 7] for n in range(6) for row, column in corners[n]]
            )
            patches -= patches.mean((0, 2, 3), keepdims=True)
            patches /= patches.std((0, 2, 3), keepdims=True)
            projected.append(patches.reshape(len(patches), -1) @ directions)
        distances = [stats.wasserstein_distance(x, y) for x, y in zip(*(p.T for p in projected), strict=True)]
        assert found[level] == pytest.approx(np.mean(distances), rel=1e-4)


def test_a_set_is_at_no_distance_from_itself_and_any_other_is():
    a, b = textures(10, 0), textures(10, 1)
    same, other = sliced_wasserstein(a, [a.clone(), b])
    assert set(same.values()) == {0.0}
    assert all(value > 0.01 for value in other.values())


def test_contrast_and_brightness_do_not_count():
    """Each set is normalised by itself, as in the paper."""
    a = noise(10, 3, 32, 0) // 4
    changed = 2 * a + 30
    assert all(value < 1e-5 for value in sliced_wasserstein(a, [changed])[0].values())


def test_white_noise_against_flat_images_has_a_closed_form():
    """Normalised white noise projects on N(0, 1), flat images of random grey on N(0, c^2), c the direction's sum: the
    1-D distance of the two is |1 - |c|| E|N(0, 1)|, and c / 7 is the sum of a random unit vector of 49 values."""
    random = np.random.default_rng(0)
    white = torch.from_numpy((128 + 30 * random.standard_normal((500, 1, 8, 8))).clip(0, 255).round().astype(np.uint8))
    greys = (128 + 30 * random.standard_normal((500, 1, 1, 1))).clip(0, 255).round().astype(np.uint8)
    flat = torch.from_numpy(greys).expand(-1, -1, 8, 8)
    directions = random.standard_normal((20000, 49))
    sums = directions.sum(1) / np.sqrt((directions**2).sum(1))
    expected = np.abs(1 - np.abs(sums)).mean() * math.sqrt(2 / math.pi)
    assert sliced_wasserstein(white, [flat])[0][8] == pytest.approx(expected, rel=0.08)  # 512 directions


def test_the_distance_rises_with_the_difference():
    """At the fine level a growing blur shows; the floor, between two sets of the same textures, is lower."""
    reference = textures(40, 0)
    others = [textures(40, seed, blur) for seed, blur in ((1, 1.0), (2, 1.4), (3, 1.8), (4, 2.5))]
    distances = [levels[32] for levels in sliced_wasserstein(reference, others)]
    assert distances == sorted(distances) and distances[1] > 1.3 * distances[0]


def test_the_size_of_the_pieces_does_not_matter(monkeypatch):
    a, b, blocks = textures(11, 0), textures(11, 1), []
    whole = sliced_wasserstein(a, [b], on_block=lambda: blocks.append(1))[0]
    assert len(blocks) == num_blocks(32)
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 3)
    monkeypatch.setattr(module, "DIRECTIONS_AT_ONCE", 100)
    assert sliced_wasserstein(a, [b])[0] == pytest.approx(whole, rel=1e-5)


def test_the_seed_matters_little():
    a, b = textures(20, 0), textures(20, 1, blur=2.0)
    first, second = (sliced_wasserstein(a, [b], seed=seed)[0] for seed in (0, 1))
    assert first != second
    assert first == pytest.approx(second, rel=0.1)


def test_a_set_of_one_colour_is_measured():
    flat = torch.full((4, 1, 8, 8), 7, dtype=torch.uint8)
    distance = sliced_wasserstein(noise(4, 1, 8, 0), [flat])[0][8]
    # the flat set projects on 0, the other on something close to N(0, 1)
    assert distance == pytest.approx(math.sqrt(2 / math.pi), rel=0.15)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 3, 32, 32\) and \(5, 3, 32, 32\)"):
        sliced_wasserstein(noise(5, 3, 32, 0), [noise(4, 3, 32, 0)])
    with pytest.raises(ValueError, match="7x7"):
        sliced_wasserstein(noise(5, 3, 4, 0), [noise(5, 3, 4, 1)])
