"""Runs of the real commands, from the shell's point of view."""

import contextlib
import csv
import importlib
import io
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
import training.loop
import training.run_log
import training.validation
from images.batches import held_out_bank
from runtime import command_line

ROOT = Path(__file__).resolve().parent.parent
# the user's own cache stays as it is
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / "liquid-diffusion-tests")
# torch's compiler would start processes to help it, which import torch for longer than these small networks take
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# one thread per process: the runs are small, and several tests may run at once
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# few timesteps make the grid of samples quick: it takes no more steps than there are
TINY = ["--dataset", "digits", "--batch-size", "16", "--timesteps", "8", "--precision", "fp32", "--log-every", "5"]
TINY += ["--compile", "off"]  # many a test starts a long run and stops it early
EVERY = ["--log-every", 1, "--save-every", 1, "--sample-every", 1000]
BF16_FLAGS = {"avx512_bf16"}  # what a processor that multiplies in bf16 has; others compute the same, slowly


def as_from_a_shell() -> None:
    """Stop signals as they are for a command of a shell; the tests may run where some are ignored, as under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def light_records(patch: Callable = setattr) -> None:
    """From now on runs in this process measure 50 held-out images, draw grids of 4 and plot no curves.

    These take longer than the steps of a short run. A `prepare` for a forked process; in this one use `light`.
    """
    patch(training.loop, "held_out_bank", partial(held_out_bank, size=50))
    patch(training.validation, "GRID_ROWS", 1)
    patch(training.run_log, "save_loss_curves", lambda *_: None)


@pytest.fixture
def light(monkeypatch) -> None:
    """`light_records` for the runs that a test makes in this process."""
    light_records(monkeypatch.setattr)


def temporary_files(folder: Path) -> list[Path]:
    """Where a write was not finished."""
    return list(folder.rglob(".*.tmp"))


def start_command(script: Path | str, *arguments, prepare: Callable[[], None] | None = None, **options):
    """A command in a fresh interpreter. prepare: called in that process just before the command starts."""

    def before_start() -> None:
        as_from_a_shell()
        if prepare is not None:
            prepare()

    command = [sys.executable, *map(str, [ROOT / script if isinstance(script, str) else script, *arguments])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen(command, preexec_fn=before_start, **pipes | options)


def start_torchrun(processes: int, *arguments) -> subprocess.Popen:
    """`train.py` in several processes, started by torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", ROOT / "train.py"]
    command = [sys.executable, *map(str, [*launch, *arguments])]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def run_command(script: Path | str, *arguments, prepare=None, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run a command to its end in a fresh interpreter, in any current folder; its output as text."""
    process = start_command(script, *arguments, prepare=prepare, cwd=cwd, env=ENVIRONMENT | environment)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _forked(argv: list[str], prepare: Callable[[], None] | None, environment: dict[str, str], *pipes) -> None:
    as_from_a_shell()
    for number, pipe in enumerate(pipes, start=1):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = argv
    main = importlib.import_module(argv[0].removesuffix(".py")).main
    if prepare is not None:
        prepare()
    command_line.run(argv[0], main)


def forked(function: Callable, *arguments):
    """What the function returns in a process forked from one that has done the imports."""
    context = _fork_context()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(writer, function, *arguments))
    process.start()
    writer.close()
    with reader:
        answer = reader.recv()  # EOFError if it failed; its traceback is on stderr
    process.join()
    return answer


def _answer(pipe, function: Callable, *arguments) -> None:
    torch.set_num_threads(1)
    pipe.send(function(*arguments))


def _fork_context():
    context = multiprocessing.get_context("forkserver")
    ours = ["conftest", "lab.drawing", "lab.comparison.procedure"]
    context.set_forkserver_preload([*ours, "sklearn.datasets", "matplotlib.figure", "torch._dynamo"])
    return context


class ForkedCommand:
    """What `start_command` starts, without the seconds of the imports: a process forked from one that has done them.

    It has the parts of subprocess.Popen that the tests use. `prepare` is a function of a module or a partial of one.
    """

    def __init__(self, script: str, *arguments, prepare: Callable[[], None] | None = None, **environment: str):
        context = _fork_context()
        readers, writers = zip(*(context.Pipe(duplex=False) for _ in range(2)), strict=True)
        argv = [script, *map(str, arguments)]
        self._process = context.Process(target=_forked, args=(argv, prepare, environment, *writers))
        self._process.start()
        for writer in writers:
            writer.close()
        threads = ThreadPoolExecutor(len(readers))
        self._output = [threads.submit(self._read, reader) for reader in readers]
        threads.shutdown(wait=False)

    @staticmethod
    def _read(reader) -> str:
        with reader, os.fdopen(os.dup(reader.fileno()), errors="surrogateescape") as file:
            return file.read()

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)
    pid = property(lambda self: self._process.pid)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        out, err = (output.result(timeout) for output in self._output)
        self._process.join(timeout)
        return out, err


def start_ranks(processes: int, *arguments) -> list[ForkedCommand]:
    """`train.py` in several forked processes, with the environment that torchrun makes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    ranks = map(str, range(processes))
    return [ForkedCommand("train.py", *arguments, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ranks]


def run_forked(script: str, *arguments, prepare=None, **environment) -> subprocess.CompletedProcess:
    """As `run_command`, by a ForkedCommand."""
    process = ForkedCommand(script, *arguments, prepare=prepare, **environment)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess([script, *arguments], process.returncode, out, err)


def wait_for(condition, process) -> None:
    """Wait until the condition holds, as long as the process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.poll()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def train_tiny(output_dir: Path, *arguments) -> Path:
    """Train on digits for a few steps in a fresh interpreter; the run folder."""
    done = run_command("train.py", *TINY, "--output-dir", output_dir, *arguments)
    assert done.returncode == 0, done.stderr
    return sorted(output_dir.iterdir())[-1]


def refused(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    """Check an exit code, and one line on stderr that has all the words; only a progress bar may stand before it."""
    assert done.returncode == code, done.stderr
    *bar, line = done.stderr.strip().splitlines()
    assert all(not part or "img" in part or "call" in part for part in bar), done.stderr
    for word in words:
        assert word in line
    if done.args and str(done.args[0]).endswith(".py"):
        check_advice(importlib.import_module(str(done.args[0]).removesuffix(".py")), line, done.args[1:])


def check_advice(module, message: str, arguments: Sequence) -> None:
    """Check that a command has every flag that its error names, apart from `x.py --flag` and what the user typed."""
    known = {flag for action in module.parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])(?<!\.py )--[a-z][a-z-]+", message)) - known
    assert not {flag for flag in named if not any(flag in str(word) for word in arguments)}, message


def call(module, *arguments) -> tuple[int, str, str]:
    """Run a command's main() as its file does when started; (exit code, stdout, stderr)."""
    prog, before = f"{module.__name__}.py", sys.argv
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        sys.argv = [prog, *map(str, arguments)]
        try:
            command_line.run(prog, module.main)
            code = 0
        except SystemExit as left:
            code = left.code
        finally:
            sys.argv = before
    if code:
        check_advice(module, err.getvalue(), arguments)
    return code, out.getvalue(), err.getvalue()


def same(a, b) -> bool:
    """Bit equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def largest_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of a single value, relative to the largest one of y, which is in double precision."""
    return ((x.double() - y).abs().max() / y.abs().max()).item()


def trained(folder: Path, *arguments, options: Sequence = (*TINY, "--device", "cpu")) -> Path:
    """A short run in this process, which saves the start of another; its folder."""
    code, _, err = call(train, *options, "--output-dir", folder, *arguments)
    assert code == 0, err
    return sorted(folder.iterdir())[-1]


def rows(run: Path) -> list[dict[str, str]]:
    """What `metrics.csv` of a run has."""
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# a large rate, so that a few steps make models whose images depend on every option
FEW_STEPS = ["--device", "cpu", "--precision", "fp32", "--timesteps", 20, "--lr", 0.02, "--batch-size", 16]
short_run = partial(trained, options=FEW_STEPS)
FEW_DRAWN = ["--device", "cpu", "--num-images", 20, "--steps", 3]


@pytest.fixture(scope="session")
def short_digits_run(tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("digits"), "--dataset", "digits", "--steps", 30, "--no-class-conditional")


@pytest.fixture(scope="session")
def class_images(tmp_path_factory):
    """Dark cats and bright dogs, so that the class matters; mirrored ones count, as in every folder."""
    images, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, low, high in (("cats", 0, 60), ("dogs", 190, 256)):
        (images / name).mkdir()
        for i in range(60):
            pixels = random.integers(low, high, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name / f"{i}.png")
    return images


@pytest.fixture(scope="session")
def short_class_run(class_images, tmp_path_factory):
    options = ["--dataset", "folder", "--data-dir", class_images, "--image-size", 16]
    return short_run(tmp_path_factory.mktemp("classes"), *options, "--steps", 20)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """60 uninterrupted steps, in a folder of their own."""
    folder = tmp_path_factory.mktemp("whole")
    options = ["--steps", 60, "--sample-every", 40, "--save-every", 7]
    done = run_forked("train.py", *TINY, *options, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder / "00000-true-digits"


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """A small comparison: (its folder, its options, its rows)."""
    from comparing import small_experiment

    return small_experiment(tmp_path_factory.mktemp("experiment"))


def known_features(images: torch.Tensor) -> torch.Tensor:
    """What the stand-in for Inception gives: the channels' means and deviations, and a corner's values, (N, 9)."""
    values = images.float() / 64
    return torch.cat([values.mean((2, 3)), values.std((2, 3)), values[:, :, 0, 0]], dim=1)


@pytest.fixture
def stand_in(monkeypatch):
    """torch-fidelity with a network whose features are known in Inception's place, so that no weights are needed."""
    registry = pytest.importorskip("torch_fidelity.registry")

    class StandIn(registry.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("2048",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "2048"

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            return (known_features(images),)

    monkeypatch.setitem(registry.FEATURE_EXTRACTORS_REGISTRY, "inception-v3-compat", StandIn)


@pytest.fixture
def values() -> list[torch.Tensor]:
    """Three tensors of two images, in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
