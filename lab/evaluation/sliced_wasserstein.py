"""Sliced Wasserstein distance between two sets of images, on patches of their Laplacian pyramids.

    distances, floor = sliced_wasserstein(held_out, [samples, training_images])   # [{32: ..., 16: ...}, {...}]

The protocol of Karras et al. 2018, "Progressive Growing of GANs for Improved Quality, Stability, and Variation",
section 5: a Laplacian pyramid down to 16 pixels, 128 patches of 7x7 per image and level at random places, each channel
normalised over the set to mean 0 and standard deviation 1, and 4 x 128 random directions. The distance is the mean
absolute difference of the sorted projections, averaged over the directions. It needs no network. Published figures are
multiplied by 1000. The distance falls as the sets grow, so only figures for equal numbers of images can be compared;
the smallest distance to expect is that of real images from other real images.

The paper chooses the places of the patches anew for every set. Here patch j of image i lies at the same place in every
set, so that the distance of a set from itself is 0.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 7  # pixels per side
PATCHES = 128  # per image and level
DIRECTIONS = 4 * 128
SMALLEST_LEVEL = 16  # pixels per side, where the paper's pyramids end
DIRECTIONS_AT_ONCE = 32  # the projections of 10,000 images then take 164 MB
IMAGES_AT_ONCE = 250


def pyramid_levels(*sides: int) -> list[int]:
    """The shorter sides of the levels at which images with these sides are compared, finest first.

    Sides are halved as long as all are even and at least 16 pixels remain, as in the paper. Smaller images have a
    single level, and images smaller than a patch have none.
    """
    levels = [min(sides)] if min(sides) >= PATCH else []
    while levels and all(side % 2 == 0 for side in sides) and levels[-1] // 2 >= SMALLEST_LEVEL:
        sides = tuple(side // 2 for side in sides)
        levels.append(min(sides))
    return levels


def _blur(images: Tensor, gain: float = 1.0) -> Tensor:
    """The binomial 5x5 filter of Burt & Adelson 1983, mirrored at the borders: (N, C, H, W)."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=images.dtype, device=images.device) / 16
    kernel = (gain * torch.outer(row, row)).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def downsample(images: Tensor) -> Tensor:
    """Halve both sides: (N, C, H, W) -> (N, C, H / 2, W / 2)."""
    return _blur(images)[:, :, ::2, ::2]


def upsample(images: Tensor) -> Tensor:
    """Double both sides: (N, C, H, W) -> (N, C, 2 H, 2 W)."""
    spread = images.new_zeros(*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3])
    spread[:, :, ::2, ::2] = images
    return _blur(spread, gain=4.0)  # because three of four values are zero


def laplacian_pyramid(images: Tensor, num_levels: int) -> list[Tensor]:
    """The band-pass levels of images (N, C, H, W), finest first; the last level has the remaining low frequencies.

    Upsampling and adding the levels from the last to the first restores the images (Burt & Adelson 1983).
    """
    levels = [images]
    for _ in range(num_levels - 1):
        smaller = downsample(levels[-1])
        levels[-1] = levels[-1] - upsample(smaller)
        levels.append(smaller)
    return levels


def patches_at(level: Tensor, corners: Tensor) -> Tensor:
    """(N * P, C, 7, 7): the patches of a level (N, C, H, W) whose upper left corners, (row, column), are (N, P, 2)."""
    windows = level.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (N, C, rows, columns, 7, 7), a view
    image = torch.arange(len(level), device=level.device)[:, None]
    return windows[image, :, corners[..., 0], corners[..., 1]].flatten(0, 1)


def channel_statistics(level: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each channel over all patches of a set: (C,) each, float64."""
    count = 0
    total = squares = torch.zeros((), dtype=torch.float64, device=level.device)
    for some, places in zip(level.split(IMAGES_AT_ONCE), corners.split(IMAGES_AT_ONCE), strict=True):
        patches = patches_at(some, places).double()
        count += patches[:, 0].numel()
        total = total + patches.sum((0, 2, 3))
        squares = squares + patches.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return mean, torch.where(std < 1e-3, 1.0, std)  # in levels 0..255; a constant channel becomes 0


def sorted_projections(level: Tensor, corners: Tensor, directions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(D, N * P): the normalised patches of a set projected on directions (C * 49, D), sorted for each direction."""
    # one product normalises and projects: (x - mean) / std . d
    scaled = directions.double().unflatten(0, (-1, PATCH * PATCH)) / std[:, None, None]  # (C, 49, D)
    offset = (mean[:, None, None] * scaled).sum((0, 1)).float()
    scaled = scaled.flatten(0, 1).float()
    projections = [
        torch.addmm(-offset, patches_at(some, places).flatten(1), scaled).T
        for some, places in zip(level.split(IMAGES_AT_ONCE), corners.split(IMAGES_AT_ONCE), strict=True)
    ]
    return _sort_rows(torch.cat(projections, dim=1))


def _sort_rows(rows: Tensor) -> Tensor:
    """The rows, sorted. On the CPU numpy sorts in place, three times as fast as torch.sort on two cores (measured)."""
    if rows.device.type != "cpu":
        return rows.sort(dim=1).values
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the interpreter's lock while it sorts
        list(pool.map(np.ndarray.sort, rows.numpy()))
    return rows


def sliced_wasserstein(
    reference: Tensor,
    others: Sequence[Tensor],
    *,
    seed: int = 0,
    on_block: Callable[[], object] | None = None,
) -> list[dict[int, float]]:
    """The distance of each of the other sets from the reference at each level of the pyramid: {side: distance}.

    reference and others: uint8 images, all of the same shape (N, C, H, W). The unit is the standard deviation of
    the patch values. on_block() is called after each of `num_blocks(H, W)` parts of the work.
    Raises ValueError if the shapes differ or the images are smaller than a patch of 7x7.
    """
    for other in others:
        if other.shape != reference.shape:
            shapes = [tuple(images.shape) for images in (other, reference)]
            raise ValueError(f"sliced Wasserstein distance: needs sets of equal shape, got {shapes[0]} and {shapes[1]}")
    sides = pyramid_levels(*reference.shape[-2:])
    if not sides:
        raise ValueError(f"sliced Wasserstein distance: needs images of at least 7x7, got {tuple(reference.shape)}")
    random = torch.Generator().manual_seed(seed)
    device = reference.device
    pyramids = [laplacian_pyramid(images.to(device).float(), len(sides)) for images in (reference, *others)]
    results = [{} for _ in others]
    for side, *levels in zip(sides, *pyramids, strict=True):
        corners = torch.randint(side - PATCH + 1, (len(reference), PATCHES, 2), generator=random).to(device)
        height, width = levels[0].shape[-2:]
        if height != width:  # spread over the longer side, too
            longer = torch.randint(max(height, width) - PATCH + 1, (len(reference), PATCHES), generator=random)
            corners[..., int(width > height)] = longer.to(device)
        directions = torch.randn(reference.shape[1] * PATCH * PATCH, DIRECTIONS, generator=random)
        directions = (directions / directions.norm(dim=0)).to(device)
        statistics = [channel_statistics(level, corners) for level in levels]
        distances = torch.zeros(len(others), dtype=torch.float64)
        for block in directions.split(DIRECTIONS_AT_ONCE, dim=1):
            truth = sorted_projections(levels[0], corners, block, *statistics[0])
            for j in range(len(others)):
                gap = sorted_projections(levels[j + 1], corners, block, *statistics[j + 1]).sub_(truth).abs_()
                distances[j] += gap.double().mean(1).sum().item()
            if on_block is not None:
                on_block()
        for result, distance in zip(results, distances.tolist(), strict=True):
            result[side] = distance / DIRECTIONS
    return results


def num_blocks(*sides: int) -> int:
    """How many times `sliced_wasserstein` calls on_block for images with these sides."""
    return len(pyramid_levels(*sides)) * DIRECTIONS // DIRECTIONS_AT_ONCE
