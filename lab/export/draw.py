"""Draw from a model that `export.py` wrote, with onnxruntime and numpy alone.

python draw.py                                   # the model in this folder: sixteen images, into drawn.png
python draw.py --ode-steps 2 3 4 --solver midpoint       # the same liquid, integrated in another way
"""

import argparse
import json
import struct
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime

CELLS = {"global": "coarse", "local": "medium", "detail": "fine"}  # from slow to fast, and what each reads
FRACTION = {
    "euler": lambda a: a,
    "semi-implicit": lambda a: a / (1 + a),
    "exponential": lambda a: -np.expm1(-a),
}


class Model:
    """The files of a folder: `about` is model.json, and `run` runs the graph of a name."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.about = json.loads((self.folder / "model.json").read_text())
        self.sessions = {}

    def run(self, name, **inputs):
        """The outputs of a graph by their names."""
        if name not in self.sessions:
            self.sessions[name] = onnxruntime.InferenceSession(self.folder / f"{name}.onnx")
        session = self.sessions[name]
        return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))

    def predict(self, x_t, t, labels=None, solver=None, ode_steps=None):
        """x_0 (N, C, H, W) as the model sees it in x_t at timestep t, an integer; labels: (N,) integers."""
        inputs = {"x_t": x_t, "t": np.full(len(x_t), t, np.int64)}
        own = {} if labels is None else {"labels": labels}
        if solver is None and ode_steps is None:
            return self.run("denoiser", **inputs, **own)["x_0"]
        ode = self.about["ode"]
        steps = ode_steps or [cell["steps"] for cell in ode["cells"].values()]
        features, slower = self.run("features", **inputs, **own), {}
        for (name, scale), n in zip(CELLS.items(), steps, strict=True):
            cell = self.run(name, features=features[scale], conditioning=features["conditioning"], **slower)
            slower = {"slower": self.integrate(cell, solver or ode["solver"], n, ode["horizon"])}
        return self.run("head", **inputs, fine=features["fine"], h=slower["slower"])["x_0"]

    def integrate(self, cell, solver, steps, horizon):
        """The state of a cell after the horizon, starting from zeros, in equal steps."""
        drive, recurrent = cell["drive"], cell["recurrent"]
        dt_over_tau = np.float32(horizon / steps) / cell["tau"]

        def step(h, fraction):
            return self.run("step", h=h, drive=drive, fraction=fraction, recurrent=recurrent)["next"]

        h = np.zeros_like(drive)
        for _ in range(steps):
            if solver == "midpoint":  # half a step of Euler, then a whole one with the slope that is found there
                middle = step(h, dt_over_tau / 2)
                h = h + step(middle, dt_over_tau) - middle
            else:
                h = step(h, FRACTION[solver](dt_over_tau))
        return h


def draw(model, noise, labels=None, steps=50, guidance=None, **ode):
    """Images (N, C, H, W) in [-1, 1] from noise of that shape, by DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2)."""
    about = model.about
    guidance = about["guidance"] if guidance is None else guidance
    T = about["timesteps"]
    timesteps = [round(T * (1 - i / steps)) - 1 for i in range(steps + 1)]
    alpha, sigma = np.sqrt(about["alphas_cumprod"]), np.sqrt(1 - np.array(about["alphas_cumprod"]))
    x, previous, last = noise.astype(np.float32), None, 0.0
    for t, s in pairwise(timesteps):
        x_0 = model.predict(x, t, labels, **ode)
        if labels is not None and guidance != 1 and (t + 0.5) / T <= about["guided_share"]:  # Ho & Salimans 2022
            without = model.predict(x, t, np.full_like(labels, about["no_class"]), **ode)
            x_0 = without + np.float32(guidance) * (x_0 - without)
        scale = about["eps_scale"]  # what the predicted noise is divided by (Ning et al. 2024)
        x_0 = (x_0 / np.float32(scale) + np.float32((1 - 1 / scale) / alpha[t]) * x).clip(-1, 1)
        if s < 0:
            return x_0
        step = np.log(alpha[s] * sigma[t] / (alpha[t] * sigma[s]))
        data = x_0 if previous is None else x_0 + np.float32(step / (2 * last)) * (x_0 - previous)
        x = np.float32(sigma[s] / sigma[t]) * x - np.float32(alpha[s] * np.expm1(-step)) * data
        previous, last = x_0, step


def save_png(path, images, columns=4):
    """Write images (N, C, H, W) in [-1, 1] as one picture, by hand: a PNG is a header and zlib's stream of rows."""
    pixels = np.rint((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    rows = [np.concatenate(list(pixels[i : i + columns]), axis=1) for i in range(0, len(pixels), columns)]
    picture = np.concatenate(rows)
    height, width, _ = picture.shape
    lines = b"".join(b"\0" + line.tobytes() for line in picture)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def main():
    """Draw sixteen images."""
    parser = argparse.ArgumentParser(description="Draw sixteen images from the ONNX files of a model.")
    add = parser.add_argument
    add("--model", default=Path(__file__).parent, help="the folder that export.py wrote (default: that of this file)")
    add("--steps", type=int, default=50, help="network calls per image (default: 50)")
    add("--seed", type=int, default=0, help="of numpy's noise, which is another than torch's (default: 0)")
    add("--guidance", type=float, help="how strongly the images follow their class (default: as sample.py)")
    add("--solver", choices=[*FRACTION, "midpoint"], help="of the liquid's ODE (default: as trained)")
    add("--ode-steps", type=int, nargs=3, metavar=("GLOBAL", "LOCAL", "DETAIL"), help="(default: as trained)")
    add("--output", default="drawn.png", help="the picture (default: drawn.png)")
    args = parser.parse_args()
    model = Model(args.model)
    noise = np.random.default_rng(args.seed).standard_normal((16, *model.about["shape"]), dtype=np.float32)
    classes = model.about["classes"]
    labels = np.arange(16) % len(classes) if classes else None
    options = {"solver": args.solver, "ode_steps": args.ode_steps} if "ode" in model.about else {}
    save_png(args.output, draw(model, noise, labels, args.steps, args.guidance, **options))


if __name__ == "__main__":
    main()
