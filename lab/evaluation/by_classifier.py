"""What our classifier says of samples: their distance from held-out images, and how many it recognises.

classifier, path = classifier_or_reason(None, data)
distances(samples, asked, data, classifier)  # {"fd": ..., "kid": ..., "recognised": ...}, for compare.py
by_classifier(samples, asked, data, classifier, seed)  # these and more, with intervals, for evaluate.py
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from choices import SHOWN
from images.datasets import ImageData
from lab.classifier.network import Classifier, load_classifier, published_classifier, read
from lab.evaluation.feature_distances import (
    NEIGHBOURS,
    frechet_distance,
    inside,
    jackknife,
    kernel_between,
    kernel_within,
    radii,
)
from lab.evaluation.report import Report, choice, finite
from runtime.errors import UserError
from runtime.progress import progress_bar

MOST_REFERENCES = 10_000  # held-out images that features of samples are compared with


def classifier_or_reason(named: str | None, data: ImageData) -> tuple[Classifier | str, Path | None]:
    """(the classifier that was named or is published for these images, its file), or (why nothing is read, None).

    Raises UserError for a classifier of other images.
    """
    path = Path(named) if named else published_classifier(data.classes, data.shape)
    if path is None:
        _, height, width = data.shape
        where = "" if data.name != "folder" else " --data-dir PATH"
        size = f" --image-size {height}" if height == width else ""  # others it does not take
        if len(data.classes) < 2:
            return "these images have no classes to train a classifier with", None
        command = f"python -m lab.classifier --dataset {data.name}{where}{size}"
        return f"no classifier of these images is published; {command} trains one for --classifier", None
    classifier, about = load_classifier(path)
    for what, found, wanted in (("shape", data.shape, about["shape"]), ("classes", data.classes, about["classes"])):
        if tuple(found) != tuple(wanted):
            raise UserError(f"--classifier: {path} is for images of another {what} than those of {data.name}")
    if len(data.train) < SHOWN or len(data.held_out) <= NEIGHBOURS:
        return f"at least {SHOWN} training and {NEIGHBOURS + 1} held-out images are needed", None
    return classifier, path


def figures(
    features: Tensor, logits: Tensor, asked: Tensor | None, reference: Tensor, within: float
) -> dict[str, Callable[[Tensor], float]]:
    """What is said of samples, each figure as a function of the indices of those that are kept.

    features, logits: as `read` returns them. asked: the samples' classes (N,), or None. reference: features (M, D) of
    held-out images. within: their `kernel_within`.
    """

    def kid(kept: Tensor) -> float:
        return kernel_within(features[kept]) + within - 2 * kernel_between(features[kept], reference)

    found = {"fd": lambda kept: frechet_distance(features[kept], reference), "kid": kid}
    if asked is not None:
        right = (logits.argmax(1) == asked).double()
        found["recognised"] = lambda kept: right[kept].mean().item()
    return found


def valued(name: str, figure: Callable[[Tensor], float], count: int) -> float:
    """The figure of all of `count` samples. Raises RunFailed if it is not finite."""
    return finite(figure(torch.arange(count)), f"{name} of the classifier's features")


def distances(
    images: Tensor, asked: Tensor | None, data: ImageData, classifier: Classifier, seed: int = 0
) -> dict[str, float]:
    """`fd`, `kid` and, if the samples were asked for by class, `recognised`; as in the report of `by_classifier`."""
    others = choice(len(data.held_out), MOST_REFERENCES, seed)
    reference = read(classifier, data.held_out[others])[0]
    found = figures(*read(classifier, images), asked, reference, kernel_within(reference))
    return {name: valued(name, figure, len(images)) for name, figure in found.items()}


def by_classifier(images: Tensor, asked: Tensor | None, data: ImageData, classifier: Classifier, seed: int) -> Report:
    """What our classifier says of samples and, in their place, of as many training images.

    images: uint8 samples, each of the class `asked` (N,), or of none. FD and KID compare the features of N images with
    those of held-out images, of which there are up to 10,000; precision and recall with those of at most N of them.
    Each figure has the 95 % interval over sets of N samples. The classifier has seen the training images, whose
    features may therefore be a little farther from held-out ones than those of new real images would be.
    """
    n, n_reference = min(len(images), len(data.train)), min(len(data.held_out), MOST_REFERENCES)
    chosen, others = choice(len(data.train), n, seed), choice(len(data.held_out), n_reference, seed)
    with progress_bar(desc="classifier", total=2 * n + n_reference, unit="img") as bar:
        drawn, train, held_out = (
            read(classifier, part, on_batch=bar.update)
            for part in (images[:n], data.train[chosen.to(data.train.device)], data.held_out[others])
        )
    reference, few = held_out[0], held_out[0][:n]
    manifold, within = radii(few), kernel_within(reference)

    def measured(features: Tensor, logits: Tensor, labels: Tensor | None) -> Report:
        hits = inside(features, few, manifold).double()

        def recall(kept: Tensor) -> float:
            return inside(few, features[kept], radii(features[kept])).double().mean().item()

        every = figures(features, logits, labels, reference, within)
        every |= {"precision": lambda kept: hits[kept].mean().item(), "recall": recall}
        return {
            name: {"value": valued(name, figure, n), "interval": jackknife(figure, n)} for name, figure in every.items()
        }

    labels = data.train_labels[chosen.to(data.train_labels.device)].cpu()
    values = measured(*drawn, None if asked is None else asked[:n])
    floors = measured(*train, None if asked is None else labels)
    units = {
        "fd": "squared Frechet distance of our classifier's features; not FID",
        "kid": "squared maximum mean discrepancy of our classifier's features; not the KID of Inception",
        "precision": f"share of the samples in the manifold of held-out images, {NEIGHBOURS} neighbours",
        "recall": f"share of the held-out images in the manifold of the samples, {NEIGHBOURS} neighbours",
        "recognised": "share of the samples that the classifier reads as the class that was asked for",
    }
    return {
        name: {
            **value,
            "floor": floors[name],
            "unit": units[name],
            "n": n,
            "n_reference": n_reference if name in ("fd", "kid") else len(few),
        }
        for name, value in values.items()
    } | {
        "n": n,
        "split": "samples against held-out images",
        "floor_split": "as many training images against the same held-out images",
        "interval": "half of the 95 % interval over sets of n samples, by a delete-a-group jackknife",
        "held_out_accuracy": (held_out[1].argmax(1) == data.held_out_labels[others]).double().mean().item(),
        "seed": seed,
    }
