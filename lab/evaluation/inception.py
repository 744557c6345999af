"""FID and KID between samples and training images, by torch-fidelity; only these measures need a pretrained network.

try:
    weights = inception_weights()
except MissingWeights as error:
    ...
figures = inception_distances(samples, data.train, weights, device=device)
"""

import hashlib
import socket
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from runtime.errors import reason
from runtime.progress import progress_bar

TIMEOUT = 10  # seconds to wait for the host's answer
KID_SUBSET = 1000


class MissingWeights(Exception):
    """The weights of the Inception network are not available; the message says why, in one line."""


def inception_weights() -> Path:
    """The file in torch's cache with the weights of the Inception network, downloaded (91 MB) if it is not there.

    Raises MissingWeights if the download fails, or if the file's digest is not the one in its name. The digest is
    checked here because torch-fidelity unpickles the file.
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
        except (OSError, RuntimeError) as error:  # no network; a wrong digest
            raise MissingWeights(
                f"Inception's weights are not in {path.parent} and not downloadable: {reason(error)}"
            ) from error
        finally:
            socket.setdefaulttimeout(before)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise MissingWeights(f"{path} is not readable ({reason(error)})") from error
    if not found.startswith(digest):
        raise MissingWeights(f"{path} is damaged (its SHA-256 starts with {found[:8]}, not {digest}); remove it")
    return path


class _Images(Dataset):
    """uint8 images with three channels (equal ones for grey images); reading an image moves the progress bar."""

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

    The settings are torch-fidelity's defaults: Inception with the original TensorFlow weights, its 2048 pooled
    features, and images enlarged to 299 pixels bilinearly. KID is the mean over 100 random subsets of 1,000 images (of
    fewer if a set is smaller), `kid_std` their standard deviation. Returns `fid`, `kid`, `kid_std`, `kid_subset_size`.
    """
    from torch_fidelity import calculate_metrics

    subset = min(KID_SUBSET, len(samples), len(reference))
    with progress_bar(desc="Inception", total=len(samples) + len(reference), unit="img") as bar:
        metrics = calculate_metrics(
            input1=_Images(samples, bar),
            input2=_Images(reference, bar),
            fid=True,
            kid=True,
            kid_subset_size=subset,
            feature_extractor_weights_path=str(weights),
            cuda=device.type == "cuda",
            batch_size=batch_size,
            save_cpu_ram=True,  # starts no reader processes, so that the progress bar of this process counts the images
            verbose=False,
        )
    return {
        "fid": metrics["frechet_inception_distance"],
        "kid": metrics["kernel_inception_distance_mean"],
        "kid_std": metrics["kernel_inception_distance_std"],
        "kid_subset_size": subset,
    }
