"""How far the features of samples are from those of real images: Frechet distance, kernel distance, precision, recall.

    frechet_distance(drawn, real), kernel_distance(drawn, real)
    precision, recall = precision_and_recall(drawn, real)
    error = jackknife(lambda kept: frechet_distance(drawn[kept], real), len(drawn))

Features are (N, D), one row per image. Those of Inception would give FID and KID; `evaluate.py` takes those of our own
classifier, and then the figures are that classifier's and can be compared with no others. All sums are float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NEIGHBOURS = 3  # k of Kynkäänniemi et al. 2019, section 3
GROUPS = 10
T_QUANTILE = 2.262  # the 97.5 % quantile of Student's distribution with GROUPS - 1 degrees of freedom
ROWS_AT_ONCE = 1000


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), covariance (D, D)), float64."""
    if len(features) < 2:
        raise ValueError(f"feature distances need at least 2 images, got {len(features)}")
    x = features.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2), with covariances A and B (Heusel et al. 2017, eq. 6).

    a, b: features (N, D) and (M, D). The trace of the root is the sum of the roots of the eigenvalues of
    A^1/2 B A^1/2, which are those of A B. The distance of finite sets is too large, by about 1/N + 1/M times a constant
    (Chong & Forsyth 2020), so only figures for equal numbers can be compared. Raises ValueError for fewer than 2 rows.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    parts = (((part @ b.T) / a.shape[1] + 1).pow(3).sum() for part in a.split(ROWS_AT_ONCE))
    return torch.stack(list(parts)).sum()


def kernel_between(a: Tensor, b: Tensor) -> float:
    """The mean of the kernel (x.y / D + 1)^3 over all pairs of a row of a (N, D) and one of b (M, D)."""
    return _kernel_sum(a.double(), b.double()).item() / (len(a) * len(b))


def kernel_within(features: Tensor) -> float:
    """The mean of the kernel over all pairs of different rows (N, D). Raises ValueError for fewer than 2 rows."""
    if len(features) < 2:
        raise ValueError(f"feature distances need at least 2 images, got {len(features)}")
    x = features.double()
    own = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
    return (_kernel_sum(x, x) - own).item() / (len(x) * (len(x) - 1))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The squared maximum mean discrepancy with a cubic kernel, without bias (Binkowski et al. 2018, eq. 4 and 5).

    a, b: features (N, D) and (M, D). It is taken over the whole sets, where KID is usually the mean over subsets, whose
    expectation is the same. It may be negative. Raises ValueError for fewer than 2 rows.
    """
    return kernel_within(a) + kernel_within(b) - 2 * kernel_between(a, b)


def radii(features: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """(N,) the distance of each row from its k-th nearest other one. Raises ValueError for k rows or fewer."""
    if len(features) <= k:
        raise ValueError(f"{k} neighbours need more than {k} images, got {len(features)}")
    x = features.double()
    parts = []
    for first in range(0, len(x), ROWS_AT_ONCE):
        distances = _distances(x[first : first + ROWS_AT_ONCE], x)
        rows = torch.arange(len(distances))
        distances[rows, first + rows] = torch.inf  # not the row itself, and no product that rounds to nearly 0
        parts.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(parts)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def inside(points: Tensor, features: Tensor, around: Tensor) -> Tensor:
    """(N,) whether each point (N, D) lies within its radius `around` (M,) of at least one of the features (M, D)."""
    x, y = points.double(), features.double()
    return torch.cat([(_distances(part, y) <= around).any(1) for part in x.split(ROWS_AT_ONCE)])


def precision_and_recall(drawn: Tensor, real: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) of samples against real images (Kynkäänniemi et al. 2019, eq. 1 to 3).

    drawn, real: features (N, D) and (M, D). Precision is the share of the samples that lie in the manifold of the real
    images, the balls around each that reach to its k-th nearest neighbour; recall is the share of the real images that
    lie in the manifold of the samples. Balls shrink as sets grow, so only figures for equal numbers can be compared.
    """
    return (
        inside(drawn, real, radii(real, k)).double().mean().item(),
        inside(real, drawn, radii(drawn, k)).double().mean().item(),
    )


def jackknife(figure: Callable[[Tensor], float], count: int) -> float:
    """Half of the 95 % interval of figure(indices) over sets of `count` samples that could have been drawn.

    The samples are divided into g groups, and the figure is taken without each of them: the standard error is the root
    of (g - 1) / g times the sum of squared deviations of these g figures from their mean (delete-a-group jackknife,
    Shao & Tu 1995, section 2.3). The images that samples are compared with, the classifier and the model stay the
    same; so the interval says by how much the figure would change with other noise. Splitting the samples into small
    sets, or drawing them with replacement, would change the bias that FD and recall have. A group is a run of samples
    in their order, so that classes that take turns are as even in a group as in the whole.
    """
    every = torch.arange(count)
    group = every * GROUPS // count
    without = torch.tensor([figure(every[group != i]) for i in range(GROUPS)], dtype=torch.float64)
    return T_QUANTILE * ((GROUPS - 1) / GROUPS * (without - without.mean()).square().sum()).sqrt().item()
