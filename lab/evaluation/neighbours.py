"""The training images nearest to given images, in pixel distance: they reveal a model that memorised its data.

found = nearest(images, data.train, 5, mirror=data.mirror)
found.distance[:, 0], data.train[found.index[:, 0]]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_AT_ONCE = 4096


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images of each of Q images, nearest first: all tensors are (Q, K)."""

    distance: Tensor  # float64, root mean squared difference of the pixel values, in 8-bit levels
    index: Tensor  # int64, into the training images
    mirrored: Tensor  # bool, whether the distance is that to the mirrored training image


def nearest(images: Tensor, train: Tensor, count: int, *, mirror: bool = False) -> Neighbours:
    """The `count` training images (N, C, H, W) nearest to each image (Q, C, H, W), both uint8; all if there are fewer.

    The distance is the L2 distance of the values divided by the square root of their number. It is exact: products of
    8-bit integers and their sums are not rounded in float64, so a copy has distance 0. mirror: also compare with each
    training image flipped left to right; it then counts once, with the smaller of the two distances.
    """
    queries = images.flatten(1).double()
    flipped = images.flip(3).flatten(1).double()  # |x - flip(y)| = |flip(x) - y|
    best = torch.empty(len(images), 0, dtype=torch.float64)
    index, mirrored = best.long(), best.bool()
    for first in range(0, len(train), TRAIN_AT_ONCE):
        some = train[first : first + TRAIN_AT_ONCE].cpu().flatten(1).double()
        norms = queries.square().sum(1, keepdim=True) + some.square().sum(1)
        squares = norms - 2 * queries @ some.T  # (Q, n)
        other = norms - 2 * flipped @ some.T if mirror else squares
        # keep the nearest among those kept so far and this part
        best = torch.cat([best, torch.minimum(squares, other)], dim=1)
        index = torch.cat([index, torch.arange(first, first + len(some)).expand(len(images), -1)], dim=1)
        mirrored = torch.cat([mirrored, other < squares], dim=1)
        best, kept = best.topk(min(count, best.shape[1]), dim=1, largest=False)
        index, mirrored = index.gather(1, kept), mirrored.gather(1, kept)
    return Neighbours((best / queries.shape[1]).sqrt(), index, mirrored)


def picture_of_neighbours(images: Tensor, train: Tensor, found: Neighbours) -> Tensor:
    """(Q * Q, C, H, W) in [-1, 1]: one row per image, with the image, a blank and its nearest training images.

    images: (Q, C, H, W) uint8. Rows have Q pictures, so that the grid is square. A training image that is nearer when
    mirrored is shown mirrored.
    """
    blank = torch.full_like(images[:1], 255)
    rows = []
    for image, index, mirrored in zip(images, found.index, found.mirrored, strict=True):
        near = train[index.to(train.device)].cpu()
        near = torch.where(mirrored[:, None, None, None], near.flip(3), near)
        row = torch.cat([image[None], blank, near])[: len(images)]
        rows.append(torch.cat([row, blank.expand(len(images) - len(row), -1, -1, -1)]))
    return torch.cat(rows).float() / 127.5 - 1
