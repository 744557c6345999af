"""FID and KID between samples and training images, by torch-fidelity; the only measures that need a network's weights.

try:
    weights = inception_weights()
except MissingWeights as reason:
    ...
figures = inception_distances(samples, data.train, weights, device=device)
"""

import hashlib
import importlib.util
import socket
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from errors import UserError

TIMEOUT = 10  # seconds without an answer before the host counts as not reachable
KID_SUBSET = 1000


class MissingWeights(Exception):
    """Why the Inception network's weights are not to be had, in one line."""


def require_torch_fidelity() -> None:
    """Raises UserError where torch-fidelity is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("--fid: needs torch-fidelity; pip install -r requirements-compare.txt")


def inception_weights() -> Path:
    """The file of the Inception network's weights in torch's cache, downloaded (91 MB) if it is not there.

    Raises MissingWeights if it cannot be had within a short wait, or is not the file that its name says. The check
    comes before torch-fidelity reads the file, which unpickles it.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    digest = path.stem.rsplit("-", 1)[1]  # the first digits of the file's SHA-256
    if not path.exists():
        print(f"fetching {URL_INCEPTION_V3} (91 MB)")
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), digest)
        except (OSError, RuntimeError) as error:  # no network; not the file's digest
            reason = " ".join(str(error).split())
            raise MissingWeights(
                f"Inception's weights are not in {path.parent} and not downloadable: {reason}"
            ) from error
        finally:
            socket.setdefaulttimeout(before)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise MissingWeights(f"{path} is not readable ({error.strerror})") from error
    if not found.startswith(digest):
        raise MissingWeights(f"{path} is damaged (its SHA-256 starts with {found[:8]}, not {digest}); remove it")
    return path


class _Images(Dataset):
    """uint8 images, grey ones as three equal channels, that move a progress bar as they are read."""

    def __init__(self, images: Tensor, bar: tqdm):
        self.images, self.bar = images, bar

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        self.bar.update()
        return self.images[i].cpu().expand(3, -1, -1)


def inception_distances(
    samples: Tensor, reference: Tensor, weights: Path, *, device: torch.device, batch_size: int = 64
) -> dict[str, float | int]:
    """FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) between two sets of uint8 images (N, 1 or 3, H, W).

    As torch-fidelity does it by default: Inception of the original TensorFlow weights, its 2048 pooled features, images
    enlarged to 299 pixels bilinearly. KID is the mean over 100 random subsets of 1,000 images (fewer, if a set is
    smaller), with their standard deviation. Returns `fid`, `kid`, `kid_std` and `kid_subset_size`.
    """
    from torch_fidelity import calculate_metrics

    subset = min(KID_SUBSET, len(samples), len(reference))
    with tqdm(desc="Inception", total=len(samples) + len(reference), unit="img", mininterval=0.5) as bar:
        metrics = calculate_metrics(
            input1=_Images(samples, bar),
            input2=_Images(reference, bar),
            fid=True,
            kid=True,
            kid_subset_size=subset,
            feature_extractor_weights_path=str(weights),
            cuda=device.type == "cuda",
            batch_size=batch_size,
            save_cpu_ram=True,  # no reader processes: the images are in memory, and the bar counts them here
            verbose=False,
        )
    return {
        "fid": metrics["frechet_inception_distance"],
        "kid": metrics["kernel_inception_distance_mean"],
        "kid_std": metrics["kernel_inception_distance_std"],
        "kid_subset_size": subset,
    }
