"""The statistics of a comparison against scipy and closed forms; a table claims no more than its seeds allow."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lab.comparison.verdict import (
    Cost,
    Point,
    Result,
    by_arm,
    interval,
    markdown,
    paired_differences,
    parameter_ratio,
    read_rows,
    save_curves,
    save_rows,
    speeds,
)
from runtime.errors import UserError


def result(arm: str, seed: int, eps_mse: float, parameters: int = 38_000) -> Result:
    return Result(arm, seed, parameters, 10**6, 0.004, 1000, 3e9, 12.5, eps_mse)


def test_the_interval_is_student_s():
    values = np.random.default_rng(0).normal(3, 2, 7)
    mean, half = interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert math.isnan(interval([1.0])[1])


def test_paired_differences_are_those_of_common_seeds():
    a = [result("a", seed, 0.03 + 0.001 * seed) for seed in range(4)]
    b = [result("b", seed, 0.02 + 0.001 * seed) for seed in (1, 2, 3, 9)]
    assert paired_differences(a, b) == pytest.approx([0.01] * 3)
    assert paired_differences(a, []) == []


def test_the_paired_interval_in_the_table_is_scipys():
    random = np.random.default_rng(1)
    ours, theirs = random.normal(0.033, 0.001, 5), random.normal(0.034, 0.001, 5)
    results = [result("true", i, x) for i, x in enumerate(ours)] + [result("other", i, x) for i, x in enumerate(theirs)]
    expected = stats.ttest_rel(theirs, ours).confidence_interval(0.95)
    row = next(line for line in markdown(results, None, "true").splitlines() if line.startswith("| `other`"))
    middle, half = map(float, row.split("|")[-2].split("±"))
    assert (middle - half, middle + half) == pytest.approx((expected.low, expected.high), abs=2e-5)


def test_fewer_than_three_seeds_give_figures_and_no_verdict():
    results = [result(arm, seed, 0.03) for arm in ("true", "other") for seed in range(2)]
    text = markdown(results, None, "true")
    assert "0.03000 ± 0.00000" in text and "no verdict" in text
    assert "no verdict" not in markdown([*results, result("true", 2, 0.03), result("other", 2, 0.03)], None, "true")


@pytest.mark.parametrize("equivalent", [50_000, 100_000, 900_000])
def test_the_ratio_finds_the_u_net_that_matches(equivalent):
    """Along a loss that falls linearly in log(parameters), the interpolation is exact."""

    def loss(parameters):
        return 0.05 - 0.002 * math.log(parameters)

    ladder = [(p, loss(p)) for p in (38_000, 150_000, 600_000, 2_400_000)]
    found = parameter_ratio(loss(equivalent), 40_000, ladder[::-1])  # in any order
    assert found.bound == "" and found.value == pytest.approx(equivalent / 40_000)


def test_beyond_the_ladder_the_ratio_is_a_bound():
    ladder = [(38_000, 0.034), (150_000, 0.032)]
    assert str(parameter_ratio(0.035, 38_000, ladder)) == "< 1"
    assert str(parameter_ratio(0.030, 38_000, ladder)) == "> 3.9"
    with pytest.raises(ValueError, match="at least one"):
        parameter_ratio(0.03, 38_000, [])


def test_the_ratio_has_an_interval_only_with_enough_seeds():
    def results(seeds):
        found = []
        for seed in range(seeds):
            shift = 0.0001 * seed
            found += [result("true", seed, 0.0325 + shift), result("unet:38k", seed, 0.034 + shift)]
            found += [result("unet:150k", seed, 0.031 + 1.5 * shift, 150_000)]
        return found

    assert "95 % interval over seeds" in markdown(results(3), None, "true")
    assert "no interval" in markdown(results(2), None, "true")


def test_samples_are_compared_as_errors_are():
    """FDs beside the errors, by scipy's interval, and a ratio of their own: here each falls along a line of its own."""

    def fd(parameters):
        return 20 - math.log(parameters)

    random = np.random.default_rng(2)
    noise = {arm: random.normal(0, 0.01, 4) for arm in ("true", "unet:38k", "unet:600k")}
    sizes = {"true": 38_000, "unet:38k": 38_000, "unet:600k": 600_000}
    results = [
        replace(result(arm, seed, 0.03, sizes[arm]), fd=fd(90_000 if arm == "true" else sizes[arm]) + noise[arm][seed])
        for arm in sizes
        for seed in range(4)
    ]
    text = markdown(results, 0.06, "true")
    assert f"in FD: {90 / 38:.2g} (95 % interval" in text and "ratio of `true` in held-out eps-MSE: < 1" in text
    pair = ([r.fd for r in results if r.arm == arm] for arm in ("unet:600k", "true"))
    expected = stats.ttest_rel(*pair).confidence_interval(0.95)
    cells = next(line for line in text.splitlines() if line.startswith("| `unet:600k`")).split("|")
    middle, half = map(float, cells[-2].split("±"))
    assert (middle - half, middle + half) == pytest.approx((expected.low, expected.high), abs=2e-3)
    mean, deviation = map(float, cells[-3].split("±"))
    values = [r.fd for r in results if r.arm == "unet:600k"]
    assert (mean, deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-3)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_row_whose_samples_were_not_measured_has_its_error_alone():
    results = [replace(result(arm, seed, 0.03), fd=2.0) for arm in ("true", "other") for seed in range(4)]
    results[0] = result("true", 0, 0.03)
    lost = [result("lost", seed, 0.04) for seed in range(4)]
    text = markdown([*results, *lost, result("unet:38k", 0, 0.035)], None, "true")
    other, gone = (next(line for line in text.splitlines() if line.startswith(f"| `{a}`")) for a in ("other", "lost"))
    assert other.endswith("| 2.000 ± 0.000 | +0.000 ± 0.000 |") and gone.endswith("± 0.00000 |  |  |")
    assert "in held-out eps-MSE: > 1" in text and "in FD:" not in text and "recognised" not in text
    assert "| FD |" not in markdown(lost, None, "true")


def test_rows_are_ordered_by_loss_and_the_closed_form_stands_last():
    results = [result("worse", 0, 0.04), result("true", 0, 0.03)]
    arms = [line.split("`")[1] for line in markdown(results, 0.06, "true").splitlines()[2:] if "|" in line]
    assert arms == ["true", "worse", "wiener"]


def test_rows_are_written_and_read_or_refused(tmp_path):
    results = [result("true", 0, 0.1 + 0.2), result("unet:38k", 1, 0.033)]
    save_rows(results, tmp_path / "comparison.csv")
    assert read_rows(Result, tmp_path / "comparison.csv") == results  # to the last bit
    assert read_rows(Result, tmp_path / "none.csv") == []
    lines = (tmp_path / "comparison.csv").read_text().splitlines()
    assert all(line.endswith(",,,") for line in lines[1:])  # FD, KID, recognised
    older = [line.removesuffix(",fd,kid,recognised").removesuffix(",,,") for line in lines]
    (tmp_path / "comparison.csv").write_text("\n".join(older) + "\n")
    assert read_rows(Result, tmp_path / "comparison.csv") == results
    (tmp_path / "comparison.csv").write_text("arm,seed\ntrue,x\n")
    with pytest.raises(UserError, match=r"comparison\.csv"):
        read_rows(Result, tmp_path / "comparison.csv")


def test_curves_of_runs_of_unequal_length_or_of_none_are_drawn(tmp_path):
    results = [result("true", 0, 0.03), result("true", 1, 0.031), result("unet:38k", 0, 0.033), result("lost", 0, 0.1)]
    points = [Point("true", seed, n, n / 9, 1 / n) for seed in (0, 1) for n in (1, 10, 100)][:-1]
    points += [Point("unet:38k", 0, n, n / 9, 1 / n) for n in (2, 20)]
    save_curves(results, points, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert list(by_arm(results)) == ["true", "unet:38k", "lost"]


def test_speeds_are_told_as_run_and_by_torch_alone_where_that_was_measured(tmp_path):
    """Costs from before that column was there are read, too."""
    costs = [Cost("true", 38_000, 7 * 10**7, 2 * 10**8, 220.4, "a machine", 106.0)]
    save_rows(costs, tmp_path / "costs.csv")
    assert read_rows(Cost, tmp_path / "costs.csv") == costs
    lines = [line.rsplit(",", 1)[0] for line in (tmp_path / "costs.csv").read_text().splitlines()]
    (tmp_path / "costs.csv").write_text("\n".join(lines) + "\n")
    (older,) = read_rows(Cost, tmp_path / "costs.csv")
    assert older.images_per_second == 220.4 and math.isnan(older.plain_images_per_second)
    assert "| `true` | 220 | 106 | a machine |" in speeds({"true": costs[0]}, ["true"])
    assert "| `true` | 220 |  | a machine |" in speeds({"true": older}, ["true"])
