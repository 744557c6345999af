"""The gradient noise scale of a run at its last save: the batch size beyond which more images a step help little.

python results/gradient_noise.py runs/00000-true-folder

The simple noise scale tr(Sigma) / |G|^2 of McCandlish et al. 2018 ("An Empirical Model of Large-Batch Training",
appendix A.1), estimated from the squared norms of gradients of SMALL and of LARGE images, at the weights that train
(not their average).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import RESUME_FILE, read_config, read_resume
from command_line import run
from image_data import load_images, training_batch
from models import load_model

SMALL, LARGE, REPEATS = 8, 4096, 2


def main() -> None:
    """Print the estimate, the mean over more and more gradients."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("checkpoint", type=Path, metavar="RUN", help="a run folder")
    folder = p.parse_args().checkpoint
    config, saved = read_config(folder)["train"], read_resume(folder / RESUME_FILE)
    model, scheduler, _ = load_model(folder)
    model.load_state_dict(saved["model"])
    data = load_images(config["dataset"], config["data_dir"], config["image_size"])
    small, large = [], []
    for repeat in range(REPEATS):
        mean = 0
        for number in range(LARGE // SMALL):
            seed = config["seed"] + 1 + repeat
            batch = training_batch(data, scheduler.draw_timesteps, seed=seed, number=number, batch_size=SMALL)
            model.zero_grad()
            scheduler.training_loss(model, batch.x_0, batch.t, batch.eps).mean().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            small.append(gradient.square().sum().item())
            mean = mean + gradient * SMALL / LARGE
        large.append(mean.square().sum().item())
        of_small, of_large = sum(small) / len(small), sum(large) / len(large)
        signal = (LARGE * of_large - SMALL * of_small) / (LARGE - SMALL)
        noise = (of_small - of_large) / (1 / SMALL - 1 / LARGE)
        norms = f"|G|^2 {signal:.3g}, tr(Sigma) {noise:.3g}"
        print(f"step {saved['step']}: {norms}, noise scale {noise / signal:.0f} images", flush=True)


if __name__ == "__main__":
    run("gradient_noise.py", main)
