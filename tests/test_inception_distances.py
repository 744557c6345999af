"""FID and KID by their definitions, and the weights of the network that they are taken with."""

import numpy as np
import pytest
import torch
from conftest import known_features
from scipy import linalg

from lab.evaluation import inception


@pytest.mark.parametrize("channels", [3, 1])
def test_fid_and_kid_are_those_of_their_definitions(channels, stand_in):
    """Only the network is a stand-in; both figures are computed here from its features by scipy and numpy."""
    random = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 200, (60, channels, 8, 8), generator=random, dtype=torch.uint8)
    reference = torch.randint(30, 256, (60, channels, 8, 8), generator=random, dtype=torch.uint8)
    found = inception.inception_distances(samples, reference, "unused", device=torch.device("cpu"))
    x, y = (known_features(images.expand(-1, 3, -1, -1)).double().numpy() for images in (samples, reference))
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T) + 1e-12 * np.eye(9))
    fid = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root.real)
    assert found["fid"] == pytest.approx(fid, rel=1e-3)

    def kernel(a, b):
        return (a @ b.T / 9 + 1) ** 3

    xx, yy, n = kernel(x, x), kernel(y, y), 60  # subsets of 60 of 60: every one is the whole set
    kid = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1)) - 2 * kernel(x, y).mean()
    assert found["kid"] == pytest.approx(kid, rel=1e-4)
    assert found["kid_subset_size"] == 60 and found["kid_std"] == pytest.approx(0, abs=1e-4 * abs(kid))


def test_weights_in_the_cache_are_taken_only_if_they_are_what_their_name_says(monkeypatch, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    # of an empty file, by the definition of SHA-256
    monkeypatch.setattr(module, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-e3b0c442.pth")
    (folder / "weights-e3b0c442.pth").write_bytes(b"")
    assert inception.inception_weights() == folder / "weights-e3b0c442.pth"
    (folder / "weights-e3b0c442.pth").write_bytes(b"x")
    with pytest.raises(inception.MissingWeights, match="damaged"):
        inception.inception_weights()
