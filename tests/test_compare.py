"""`compare.py` as a user meets it: equal conditions, budgets that hold, an interruption that costs nothing."""

import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import ForkedCommand, call, refused, run_forked, start_command, wait_for

import compare
import evaluate
import training.loop
from choices import ARMS
from images.batches import BANK_SIZE, held_out_bank
from images.datasets import load_images
from lab import speed
from lab.classifier.training import save_and_check, train_classifier
from lab.comparison import jobs, procedure, samples
from lab.comparison.experiment import Experiment, Training
from lab.comparison.verdict import Cost, Result
from models import build_model, multiply_adds
from training import run_log
from training.checkpoint import read_model, read_resume
from training.run_folder import read_config
from training.step import TrainStep

TINY = ["--dataset", "digits", "--timesteps", 8, "--batch-size", 8, "--device", "cpu"]
GOES_ON = "compare.py: interrupted: the same command goes on from here"


def compared(folder, *options, bank=50, pictures=False) -> list[dict[str, str]]:
    """The rows of comparison.csv of a tiny comparison, with few measurements on the way and quick ones of speed.

    bank: the number of held-out images; a process of its own measures BANK_SIZE.
    """
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch("lab.comparison.experiment.MEASUREMENTS", 2))
        patches.enter_context(mock.patch.multiple(speed, SECONDS=0.01, RATE_ROUNDS=5))
        patches.enter_context(mock.patch.object(run_log, "save_loss_curves"))  # a training run's own plot
        patches.enter_context(mock.patch.object(held_out_bank, "__defaults__", (bank,)))
        for picture in () if pictures else ("save_curves", "save_labelled_rows"):
            patches.enter_context(mock.patch.object(procedure, picture))
        code, _, err = call(compare, *TINY, "--output-dir", folder, *options)
    assert code == 0, err
    return table(folder / "comparison.csv")


def table(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Two arms, two seeds, two rates: a folder and its rows."""
    folder = tmp_path_factory.mktemp("experiment")
    options = ["--arms", "inspired", "unet:38k", "--seeds", 2, "--lrs", 1e-3, 1e-2, "--amount", 160]
    options += ["--sweep-share", 0.5, "--reference", "inspired"]
    return folder, options, compared(folder, *options, bank=BANK_SIZE, pictures=True)


def test_every_arm_and_seed_has_its_row_and_the_files_are_there(experiment):
    folder, _, rows = experiment
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("inspired", "0"), ("inspired", "1"), ("unet:38k", "0"), ("unet:38k", "1"),
    ]  # fmt: skip
    assert list(rows[0]) == list(Result.__dataclass_fields__)
    text = (folder / "comparison.md").read_text()
    assert all(word in text for word in ("`inspired`", "`unet:38k`", "`wiener`", "no verdict", "Parameter-efficiency"))
    for name in ("curves.png", "grid.png"):
        assert (folder / name).stat().st_size > 10_000


def test_all_arms_train_under_the_same_conditions(experiment):
    folder, _, rows = experiment
    configs = [read_config(path.parent)["train"] for path in sorted(folder.glob("runs/*share1/*/config.json"))]
    assert len(configs) == 4
    own = {"model", "model_config", "lr", "seed", "output_dir"}
    assert len({json.dumps({k: v for k, v in config.items() if k not in own}) for config in configs}) == 1
    assert {row["images"] for row in rows} == {"160"}
    losses = {path.parent.parent.name: read_model(path.parent)[1] for path in folder.glob("runs/*/*/model.safetensors")}
    assert {about["prediction_type"] for about in losses.values()} == {"edm"}


def test_each_arm_takes_the_rate_that_was_best_for_it_in_the_sweep(experiment):
    folder, _, rows = experiment
    sweep = table(folder / "sweep.csv")
    assert [(row["arm"], float(row["lr"])) for row in sweep] == [
        (arm, lr) for arm in ("inspired", "unet:38k") for lr in (1e-3, 1e-2)
    ]
    assert {row["images"] for row in sweep} == {"80"}
    for arm in ("inspired", "unet:38k"):
        best = min((row for row in sweep if row["arm"] == arm), key=lambda row: float(row["eps_mse"]))["lr"]
        assert {row["lr"] for row in rows if row["arm"] == arm} == {best}


def test_the_short_runs_of_a_sweep_are_measured_at_their_end_alone(experiment):
    """A measurement of a large model costs as much as hundreds of its steps; curves are drawn of the whole runs."""
    measured = {
        share: [sum(bool(row["held_out_loss"]) for row in table(path)) for path in experiment[0].glob(f"runs/{runs}")]
        for share, runs in (("half", "*share0.5/*/metrics.csv"), ("whole", "*share1/*/metrics.csv"))
    }
    assert measured == {"half": [1] * 4, "whole": [2] * 4}


@pytest.mark.parametrize("images, times", [(150_000, 10), (10_672, 4), (400, 2)])
def test_few_images_are_measured_less_often(images, times):
    """A measurement of the bank costs as much as training on some 700 images, of every arm."""
    settings = compare.parser().parse_args(["--amount", str(images)])
    config = Experiment(settings, None, Path(), {}).config(Training("unet:4m", 1e-3, 0, 1))
    assert len({*range(config.sample_every, config.steps, config.sample_every), config.steps}) == times


def test_the_same_command_again_trains_nothing_and_says_the_same(experiment):
    folder, options, rows = experiment
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/checkpoint.pt")}
    text = (folder / "comparison.md").read_text()
    assert compared(folder, *options, bank=BANK_SIZE, pictures=True) == rows
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/checkpoint.pt")} == before
    assert (folder / "comparison.md").read_text() == text


def begun(experiment, folder: Path) -> tuple[list, list[dict[str, str]]]:
    """Make a folder that goes on after the sweep of the experiment: (options to train one arm there, its rows)."""
    source, options, rows = experiment
    for name in ("costs.csv", "comparison.json", "sweep.csv"):
        shutil.copy(source / name, folder / name)
    options = [option for option in options if option != "unet:38k"]
    return [*TINY, *options, "--output-dir", folder], [row for row in rows if row["arm"] == "inspired"]


def slowly() -> None:
    """Let training runs of a few steps last long enough to be stopped. A sleep costs no work, and plots would."""
    run_log.save_loss_curves = mock.Mock()
    step = TrainStep.__call__
    TrainStep.__call__ = lambda self, progress: (time.sleep(0.1), step(self, progress))[1]


def slowly_and_forked() -> None:
    """Let training runs side by side also be forks, which need no import; a test below has them spawned."""
    slowly()
    fork = multiprocessing.get_context("fork")

    def pipe():
        ours, theirs = fork.Pipe()
        os.register_at_fork(after_in_child=ours.close)  # a spawned process does not have this end either
        return ours, theirs

    context = mock.Mock(Process=fork.Process, Pipe=pipe)
    jobs.multiprocessing = mock.Mock(get_context=lambda _: context)


def test_an_interrupted_comparison_ends_with_the_same_figures(experiment, tmp_path):
    options, rows = begun(experiment, tmp_path)
    process = ForkedCommand("compare.py", *options, prepare=slowly)
    wait_for(lambda: list(tmp_path.glob("runs/*seed1*/*/checkpoint.pt")), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == GOES_ON
    assert [row["seed"] for row in table(tmp_path / "comparison.csv")] == ["0"]
    assert compared(tmp_path, *options, bank=BANK_SIZE) == rows


def processes_that_train(parent: int) -> set[int]:
    """The ids of those that a comparison has started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            started_by = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if started_by == parent and b"resource_tracker" not in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_trainings_side_by_side_end_with_the_figures_of_one_after_the_other_also_when_interrupted(experiment, tmp_path):
    options, rows = begun(experiment, tmp_path)
    options += ["--jobs", 2]
    process = ForkedCommand("compare.py", *options, prepare=slowly_and_forked)
    wait_for(lambda: len(list(tmp_path.glob("runs/*share1/*/checkpoint.pt"))) > 1, process)
    below = processes_that_train(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == GOES_ON
    assert len(below) == 2 and not any(Path(f"/proc/{child}").exists() for child in below)
    saved = {path.parent: read_resume(path)["step"] for path in tmp_path.glob("runs/*share1/*/checkpoint.pt")}
    assert compared(tmp_path, *options) == rows  # by spawned processes, which measure with the whole bank
    assert all(read_resume(run / "checkpoint.pt")["step"] >= step for run, step in saved.items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_while_a_process_starts_ends_in_one_line(experiment, tmp_path):
    """In a fresh interpreter, from the shell."""
    process = start_command("compare.py", *begun(experiment, tmp_path)[0], "--jobs", 2, start_new_session=True)
    wait_for(lambda: processes_that_train(process.pid), process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of a command
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    *bars, said = errors.strip().split("\n")
    assert said == GOES_ON
    assert all("|" in bar for bar in bars), errors  # none, if the first process was still being started


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["training", "comparison"])
def test_when_a_process_is_killed_the_trainings_that_are_left_save_and_end(victim, experiment, tmp_path):
    shutil.copy(experiment[0] / "costs.csv", tmp_path)
    options = [*TINY, "--arms", "inspired", "--lrs", 4e-3, "--amount", 80_000, "--seeds", 2, "--jobs", 2]
    process = ForkedCommand("compare.py", *options, "--output-dir", tmp_path, prepare=slowly_and_forked)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/*/metrics.csv"))) > 1, process)
    pair = processes_that_train(process.pid)
    os.kill(min(pair) if victim == "training" else process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)  # reads until all that could write have ended
    assert "Traceback" not in errors
    assert len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) == (1 if victim == "training" else 2)
    if victim == "training":
        last = errors.strip().splitlines()[-1]
        assert process.returncode == 1 and last.startswith("compare.py: failed: inspired lr 0.004 seed "), errors
        assert last.endswith(": its process was ended; the same command goes on from here")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """That of the digits, hardly trained."""
    path, data = tmp_path_factory.mktemp("classifier") / "digits.safetensors", load_images("digits", "unused")
    save_and_check(path, train_classifier(data, images=600), data, "")
    return path


def by_evaluate(run: Path, *options) -> dict:
    """What `evaluate.py` says of 20 samples of a run by the classifier."""
    few = ["--num-images", 20, "--bound-images", 2, "--device", "cpu", "--output", run / "e.json"]
    with mock.patch.object(held_out_bank, "__defaults__", (50,)):
        code, _, err = call(evaluate, "--checkpoint", run, *few, *options)
    assert code == 0, err
    return json.loads((run / "e.json").read_text())["classifier"]


def slow_drawing() -> None:
    """Let it last long enough to be stopped."""
    draw = samples.sample_images
    samples.sample_images = lambda *a, **b: (time.sleep(0.5), draw(*a, **b))[1]


def test_the_samples_of_an_earlier_comparison_are_measured_also_when_that_is_stopped(experiment, classifier, tmp_path):
    """The figures are those of `evaluate.py`; a run whose weights are gone keeps its row, and none is trained."""
    source, options, before = experiment
    folder = shutil.copytree(source, tmp_path / "copy")
    (lost,) = folder.glob("runs/unet-38k-*seed1-share1")
    shutil.rmtree(lost)
    options = [*options, "--output-dir", folder]
    measuring = [*options, "--classifier", classifier, "--num-images", 20]
    assert "FD" not in (folder / "comparison.md").read_text()

    process = ForkedCommand("compare.py", *TINY, *measuring, prepare=slow_drawing)
    wait_for(lambda: table(folder / "comparison.csv")[0]["fd"], process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip().splitlines()[-1] == GOES_ON, errors
    assert not table(folder / "comparison.csv")[1]["fd"]
    rows = compared(folder, *measuring[:-4], "--jobs", 2, *measuring[-4:])
    own = ("fd", "kid", "recognised")
    assert [{k: v for k, v in row.items() if k not in own} for row in rows] == [
        {k: v for k, v in row.items() if k not in own} for row in before
    ]
    for row in (rows[0], rows[2]):
        (run,) = folder.glob(f"runs/{row['arm'].replace(':', '-')}-*seed{row['seed']}-share1/*")
        found = by_evaluate(run, "--classifier", classifier)
        assert float(row["fd"]) == pytest.approx(found["fd"]["value"], rel=1e-3)
        assert float(row["kid"]) == pytest.approx(found["kid"]["value"], rel=1e-3)
    assert rows[3]["fd"] == rows[0]["recognised"] == ""
    text = (folder / "comparison.md").read_text()
    assert "20 samples" in text and "in 8 steps" in text and f"{float(rows[2]['fd']):.3f} |" in text

    with mock.patch.object(samples, "distances", side_effect=AssertionError):
        assert compared(folder, *measuring) == rows
    for flag, value in (("--num-images", 30), ("--eps-scale", 1)):
        code, out, err = call(compare, *TINY, *measuring, flag, value)
        assert (code, out) == (2, "") and flag in err and "use another --output-dir" in err
    assert compared(folder, *options, "--num-images", 0) == rows
    assert (folder / "comparison.md").read_text() == text

    settings = json.loads((folder / "comparison.json").read_text())  # as it was before the flags
    del settings["distances"]["guided_share"], settings["distances"]["eps_scale"]
    (folder / "comparison.json").write_text(json.dumps(settings))
    code, out, err = call(compare, *TINY, *measuring)
    assert (code, out) == (2, "") and "--eps-scale" in err
    assert compared(folder, *measuring, "--eps-scale", 1) == rows


def test_with_classes_all_arms_learn_them_and_are_drawn_with_guidance(classifier, tmp_path):
    options = ["--arms", "inspired", "unet:38k", "--reference", "inspired", "--seeds", 1, "--lrs", 1e-2]
    options += ["--amount", 80, "--class-conditional", "--guidance", 50, "--classifier", classifier, "--num-images", 20]
    for row in compared(tmp_path, *options):
        (run,) = tmp_path.glob(f"runs/{row['arm'].replace(':', '-')}-*/*")
        assert read_config(run)["train"]["class_conditional"]
        network = build_model(ARMS[row["arm"]][0], in_channels=1, num_classes=10, **ARMS[row["arm"]][1])
        assert int(row["parameters"]) == sum(p.numel() for p in network.parameters())
        found = by_evaluate(run, "--classifier", classifier, "--guidance", 50)
        for name in ("fd", "recognised"):
            assert float(row[name]) == pytest.approx(found[name]["value"], rel=1e-5)
        other = by_evaluate(run, "--classifier", classifier, "--guidance", 1)
        assert float(row["fd"]) != pytest.approx(other["fd"]["value"], rel=1e-4)
    assert "guidance 50" in (tmp_path / "comparison.md").read_text()
    code, _, err = call(compare, *TINY, "--output-dir", tmp_path, "--lrs", 1e-2, "--amount", 80)
    assert code == 2 and "--class-conditional" in err, err


def test_without_a_classifier_one_line_says_why_and_how_to_train_one(experiment):
    folder, options, _ = experiment
    with mock.patch.object(procedure, "save_curves"):
        _, out, _ = call(compare, *TINY, "--output-dir", folder, *options)
    (said,) = (line for line in out.splitlines() if line.startswith("FD and KID are not measured: "))
    assert "python -m lab.classifier --dataset digits --image-size 8 " in said


def test_a_sweep_of_the_whole_amount_is_the_first_seed_of_the_best_rate(tmp_path):
    options = ["--arms", "inspired", "--reference", "inspired", "--seeds", 2, "--lrs", 1e-3, 1e-2, "--amount", 40]
    rows = compared(tmp_path, *options)
    sweep = table(tmp_path / "sweep.csv")
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert rows[0] == min(sweep, key=lambda row: float(row["eps_mse"]))


def test_the_bar_is_as_long_as_what_is_left_to_train(tmp_path):
    options = ["--arms", "inspired", "--reference", "inspired", "--seeds", 2, "--lrs", 1e-3, 1e-2, "--amount", 40]

    def trainings(*seeds) -> float:
        """The length of the bar, in training runs."""
        with mock.patch.object(procedure, "bar_of_seconds", wraps=procedure.bar_of_seconds) as bar:
            compared(tmp_path, *options, *seeds)
        speed_of_arm = float(table(tmp_path / "costs.csv")[0]["images_per_second"])
        return bar.call_args.args[0] * speed_of_arm / 40

    assert trainings() == pytest.approx(3)  # the better one of the sweep is the first seed
    assert trainings() == 0
    assert trainings("--seeds", 3) == pytest.approx(1)
    *lines, _ = (tmp_path / "comparison.csv").read_text().splitlines()
    (tmp_path / "comparison.csv").write_text("\n".join(lines) + "\n")  # as if stopped just before it was written
    assert trainings("--seeds", 3) == 0


def test_a_sweep_that_is_mostly_warm_up_is_said_to_be(tmp_path, capsys):
    options = ["--arms", "true:pooled", "unet:38k", "--lrs", 1e-3, 1e-2, "--amount", 160_000, "--budget", "images"]
    settings = compare.parser().parse_args(list(map(str, [*options, "--sweep-share", 0.05])))
    comparison = Experiment(settings, None, tmp_path, {})
    assert comparison.steps("unet:38k", 0.05) == 1000  # of which 200 are warm-up
    procedure.warn_of_short_sweeps(comparison, ["unet:38k"])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "--sweep-share" in said and "unet:38k" in said and "true" not in said
    for share in (0.1, 1):  # 2000 steps; and the whole, which is no shorter than itself
        settings.sweep_share = share
        procedure.warn_of_short_sweeps(comparison, ["unet:38k"])
    assert capsys.readouterr().out == ""


def test_results_alone_are_enough_to_go_on_with_another_arm(experiment, tmp_path):
    """What a repository keeps of a comparison: its tables, no weights."""
    folder, options, rows = experiment
    for name in ("costs.csv", "comparison.csv", "sweep.csv", "curves.csv", "comparison.json"):
        shutil.copy(folder / name, tmp_path / name)
    options = ["true:pooled" if option == "unet:38k" else option for option in options]
    added = compared(tmp_path, *options)
    assert added[:4] == rows and [row["arm"] for row in added[4:]] == ["true:pooled"] * 2
    assert "`unet:38k`" in (tmp_path / "comparison.md").read_text()


def test_a_budget_of_multiply_adds_holds_within_a_hundredth(tmp_path):
    def planned(amount: float, costs: dict[str, Cost]) -> dict[str, int]:
        """The images that each arm trains on."""
        settings = compare.parser().parse_args(["--budget", "flops", "--amount", str(amount), "--batch-size", "8"])
        return {arm: 8 * Experiment(settings, None, tmp_path, costs).steps(arm, 1) for arm in costs}

    rows = compared(
        tmp_path, "--arms", "inspired", "true:pooled", "--seeds", 1, "--lrs", 4e-3, "--budget", "flops",
        "--amount", 1e8, "--reference", "inspired",
    )  # fmt: skip
    costs = {row["arm"]: Cost("", 0, int(row["multiply_adds"]), 3 * int(row["multiply_adds"]), 1.0, "") for row in rows}
    assert {row["arm"]: int(row["images"]) for row in rows} == planned(1e8, costs)
    assert int(rows[0]["images"]) != int(rows[1]["images"])
    for row in rows:
        assert float(row["training_multiply_adds"]) == 3 * int(row["images"]) * int(row["multiply_adds"])
    for arm, images in planned(3e9, costs).items():
        assert images * costs[arm].training_multiply_adds == pytest.approx(3e9, rel=0.01)


def test_a_budget_of_seconds_is_images_at_the_speed_measured_before(tmp_path, monkeypatch):
    """What an arm costs is counted once; counted at every step, it doubled the time of a comparison."""
    counted = []
    monkeypatch.setattr(procedure, "multiply_adds", lambda *a: (counted.append(a), multiply_adds(*a))[1])
    monkeypatch.setattr(procedure, "training_rates", lambda configs, *_: dict(zip(configs, (40.0, 100.5), strict=True)))
    options = ["--seeds", 1, "--lrs", 4e-3, "--budget", "seconds", "--amount", 2, "--reference", "inspired"]
    rows = compared(tmp_path, "--arms", "inspired", "true:pooled", *options)
    assert len(counted) == 2
    assert [int(row["images"]) for row in rows] == [80, 200]  # whole batches of 8
    for row in rows:
        assert float(row["seconds"]) == pytest.approx(2, rel=0.01)
    costs = table(tmp_path / "costs.csv")
    assert {cost["arm"]: cost["images_per_second"] for cost in costs} == {"inspired": "40.0", "true:pooled": "100.5"}
    for cost, row in zip(costs, rows, strict=True):
        model = build_model(ARMS[row["arm"]][0], in_channels=1)
        assert int(cost["parameters"]) == sum(p.numel() for p in model.parameters())
        assert int(cost["training_multiply_adds"]) == 3 * int(cost["multiply_adds"])

    text = (tmp_path / "costs.csv").read_text().replace(costs[0]["machine"], "an abacus")
    (tmp_path / "costs.csv").write_text(text)
    assert compared(tmp_path, "--arms", "inspired", *options) == rows  # trained here, of the abacus's seconds
    code, _, err = call(compare, *TINY, "--output-dir", tmp_path, "--arms", "unet:38k", *options)
    assert code == 2 and "costs.csv" in err and "an abacus" in err and err.count("\n") == 1, err


def test_other_budgets_take_all_seconds_from_the_machine_that_measured_last(tmp_path, monkeypatch):
    options = ["--seeds", 1, "--lrs", 4e-3, "--amount", 80]
    monkeypatch.setattr(procedure, "training_rates", lambda configs, *_: dict.fromkeys(configs, 10.0))
    assert compared(tmp_path, "--arms", "true:pooled", *options)[0]["seconds"] == "8.0"
    monkeypatch.setattr(procedure, "training_rates", lambda configs, *_: dict.fromkeys(configs, 20.0))
    monkeypatch.setattr(procedure, "machine_name", lambda _: "an abacus")
    assert compared(tmp_path, "--arms", "true:pooled", *options)[0]["seconds"] == "8.0"
    rows = compared(tmp_path, "--arms", "true:pooled", "inspired", *options)
    assert {row["seconds"] for row in rows} == {"4.0"}
    assert {point["seconds"] for point in table(tmp_path / "curves.csv")} == {"2.0", "4.0"}


def test_what_would_mix_two_comparisons_is_refused(experiment, tmp_path):
    folder, _, _ = experiment
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("runs"))
    for flag, value in (("--batch-size", 16), ("--amount", 900), ("--timesteps", 9)):
        options = [*TINY, "--lrs", 1e-3, 1e-2, "--amount", 160, "--sweep-share", 0.5, flag, value]
        code, out, err = call(compare, *options, "--output-dir", copy)
        assert (code, out, err.count("\n")) == (2, "", 1) and flag in err, err


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--arms", "unet:3k"),
        ("--budget", "hours"),
        ("--amount", 0),
        ("--seeds", 0),
        ("--lrs", "nan"),
        ("--num-images", 15),
        ("--guidance", 2),
        ("--guided-share", 0.5),
        ("--classifier", "nowhere"),
        ("--output-dir", "/proc/none"),
    ],
)
def test_a_bad_value_is_refused_by_its_flag(flag, value, tmp_path):
    code, _, err = call(compare, *TINY, "--output-dir", tmp_path / "x", flag, value)
    assert code == 2 and err.startswith(f"compare.py: error: {flag}: ") and err.count("\n") == 1, err


def test_a_refusal_leaves_the_shell_with_2_and_one_line():
    refused(run_forked("compare.py", "--arms", "horse"), "compare.py: error: --arms", "horse")


def test_the_clock_stands_still_while_a_run_is_measured(tmp_path, monkeypatch):
    """A measurement that lasts two seconds is no second of the budget."""
    slow = training.loop.held_out_loss
    monkeypatch.setattr(training.loop, "held_out_loss", lambda *a: (time.sleep(2), slow(*a))[1])
    (row,) = compared(tmp_path, "--arms", "true:pooled", "--seeds", 1, "--lrs", 4e-3, "--amount", 24)
    assert float(row["seconds"]) < 2
    assert read_resume(next(tmp_path.glob("runs/*/*/checkpoint.pt")))["seconds"] < 2
