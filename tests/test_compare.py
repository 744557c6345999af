"""`compare.py` as a user meets it: equal conditions, budgets that hold, an interruption that costs nothing."""

import json
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest
from comparing import TINY, compared, table
from conftest import call, refused, run_forked

import compare
import training.loop
from choices import ARMS
from images.batches import BANK_SIZE
from lab.comparison import procedure
from lab.comparison.experiment import Experiment, Training
from lab.comparison.verdict import Cost, Result
from models import build_model, multiply_adds
from training.checkpoint import read_model, read_resume
from training.run_folder import read_config


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
