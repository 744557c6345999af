"""Distances between sets of features: each against its definition, computed in another way."""

import itertools

import numpy as np
import pytest
import torch
from scipy import linalg

from lab.evaluation.feature_distances import (
    frechet_distance,
    inside,
    jackknife,
    kernel_distance,
    precision_and_recall,
    radii,
)


def features(count: int, width: int = 6, *, seed: int, shift: float = 0.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, generator=random) @ mix + shift


@pytest.mark.parametrize("counts", [(40, 70), (4, 5)])  # the second: covariances without full rank
def test_the_frechet_distance_is_that_of_scipy_s_matrix_root(counts):
    a, b = features(counts[0], seed=0), features(counts[1], seed=1, shift=0.3)
    x, y = a.double().numpy(), b.double().numpy()
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T) + 1e-12 * np.eye(6)).real
    truth = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 6, rel=1e-4)


def test_both_distances_are_those_of_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = features(60, seed=0), features(60, seed=1, shift=0.5)
    statistics = [fid.fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-4)
    found = kid.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(a, b) == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-4)


def test_the_kernel_distance_is_the_mean_over_pairs_of_different_images(monkeypatch):
    monkeypatch.setattr("lab.evaluation.feature_distances.ROWS_AT_ONCE", 4)
    a, b = features(9, seed=0).double(), features(7, seed=1).double()

    def mean(pairs):
        return np.mean([(float(x @ y) / 6 + 1) ** 3 for x, y in pairs])

    truth = sum(mean(itertools.permutations(x, 2)) for x in (a, b)) - 2 * mean(itertools.product(a, b))
    assert kernel_distance(a, b) == pytest.approx(truth)


def test_precision_and_recall_are_those_of_a_loop_over_all_balls(monkeypatch):
    monkeypatch.setattr("lab.evaluation.feature_distances.ROWS_AT_ONCE", 16)
    real, drawn = features(50, 2, seed=0), features(40, 2, seed=1, shift=1.0)

    def share(points, centres):
        count = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(float((centre - other).norm()) for j, other in enumerate(centres) if j != i)
                if float((point - centre).norm()) <= others[2]:
                    count += 1
                    break
        return count / len(points)

    truth = share(drawn, real), share(real, drawn)
    assert precision_and_recall(drawn, real) == pytest.approx(truth)
    assert 0.05 < truth[0] < 0.95 and 0.05 < truth[1] < 0.95
    far = features(40, 2, seed=2, shift=1e4)
    assert precision_and_recall(far, real) == (0, 0) and precision_and_recall(real, real) == (1, 1)
    one_point = real[:1].expand(40, -1) + 1e-3 * features(40, 2, seed=3)  # a model that draws one image
    precision, recall = precision_and_recall(one_point, real)
    assert precision == 1 and recall < 0.1


def test_copies_have_a_manifold_of_their_own_points():
    twice = features(3, 2, seed=0).repeat_interleave(4, 0)
    assert radii(twice).max() < 1e-6
    assert inside(twice, twice, radii(twice) + 1e-9).all()


def test_too_few_images_are_refused():
    few = features(1, seed=0)
    for distance in (frechet_distance, kernel_distance, precision_and_recall):
        with pytest.raises(ValueError, match="got 1"):
            distance(few, few)


def test_the_interval_covers_as_often_as_it_says():
    """Of a mean, whose spread is known, and of the Frechet distance, over sets that are drawn anew."""
    values = torch.randn(400, 200, generator=torch.Generator().manual_seed(0)).double()
    covered = [abs(row.mean()) <= jackknife(lambda kept, row=row: row[kept].mean().item(), 200) for row in values]
    assert 0.92 < np.mean(covered) < 0.98
    real = features(500, 4, seed=1000)
    sets = [features(200, 4, seed=i, shift=0.5) for i in range(60)]
    found = np.array([frechet_distance(drawn, real) for drawn in sets])
    halves = [jackknife(lambda kept, drawn=drawn: frechet_distance(drawn[kept], real), 200) for drawn in sets]
    assert 0.85 < np.mean(np.abs(found - found.mean()) <= halves) <= 1
