"""`benchmark.py`: what it counts and what it compares is what it says. No test looks at how fast anything was."""

import json
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import BF16_FLAGS, call

import benchmark
from kernels import native
from lab import speed
from lab.benchmark import sections
from lab.benchmark.processes import peak_memory
from lab.benchmark.report import goals, markdown
from training.config import TrainConfig

needs_compiler = pytest.mark.skipif(not native.available(native.FP32), reason="no C++ compiler")


def test_what_does_not_work_here_is_a_reason_and_the_best_of_the_rest_counts():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    fp32, bf16 = sections.Variant("fp32", False), sections.Variant("bf16", True)
    bench = sections.Bench(torch.device("cpu"), 8, 8, 1e-4, [fp32, bf16])
    report = sections.by_variant({("a", fp32): lambda: None, ("a", bf16): too_large, ("b", bf16): too_large}, bench)
    assert report["a"]["best"] == "fp32" and report["a"]["seconds"] > 0
    assert report["a"]["variants"]["bf16, compiled"] == {"reason": "out of memory"}
    assert report["b"] == {"best": None, "seconds": None, "variants": {"bf16, compiled": {"reason": "out of memory"}}}


def test_what_is_timed_by_plain_torch_has_a_best_of_its_own_and_does_without_kernels(monkeypatch):
    """bf16 has no plain twin here, so there is no kernel in it, and it counts for both readings."""
    seconds = {"fp32": 2.0, "bf16": 3.0, "fp32, plain torch": 4.0, "bf16, plain torch": 9.0}

    def in_turn(calls, device, length, warmed_up):
        return {(name, v): [seconds[str(v)]] for name, v in calls}

    monkeypatch.setattr(sections, "in_turn", in_turn)
    fp32, bf16 = sections.Variant("fp32", False), sections.Variant("bf16", False)
    plain = sections.Variant("fp32", False, plain=True)
    bench, ready = sections.Bench(torch.device("cpu"), 8, 8, 1e-4, [fp32, bf16]), {}

    def step(variant):
        return lambda: ready.update({str(variant): native.ready(native.FP32, torch.zeros(1))})

    monkeypatch.setattr(native, "available", lambda library: True)
    found = sections.by_variant({("a", v): step(v) for v in (fp32, bf16, plain)}, bench)["a"]
    assert (found["best"], found["seconds"]) == ("fp32", 2.0)
    assert found["plain"] == {"best": "bf16", "seconds": 3.0}
    assert list(found["variants"]) == ["fp32", "bf16", "fp32, plain torch"]
    assert ready == {"fp32": True, "bf16": True, "fp32, plain torch": False}
    found = sections.by_variant({("a", v): step(v) for v in (fp32, plain)}, bench)["a"]
    assert found["plain"] == {"best": "fp32, plain torch", "seconds": 4.0}
    assert "plain" not in sections.by_variant({("a", fp32): step(fp32)}, bench)["a"]


def test_where_there_is_no_kernel_the_report_says_why(monkeypatch, tiny_report):
    report = tiny_report[1]
    gpu = sections.measure_kernels(sections.Bench(torch.device("cuda"), 8, 8, 1, []))
    monkeypatch.setattr(sections, "available", lambda library: False)
    no_compiler = sections.measure_kernels(sections.Bench(torch.device("cpu"), 8, 8, 1, []))
    for found, words in ((gpu, "CPUs"), (no_compiler, "no C++ compiler")):
        (line,) = [
            line for line in markdown(report | {"kernels": found}).splitlines() if "C++ kernels were not" in line
        ]
        assert words in line and line.endswith(".")


def test_peak_memory_is_that_of_the_step_and_not_of_who_asks():
    """This process holds half a GiB, which the kernel would count to a child; a step of that few images needs less."""
    ballast = torch.ones(2**27)
    found = peak_memory(TrainConfig(dataset="synthetic", batch_size=32, device="cpu", precision="fp32"), 32, 1)
    detail_drive = 32 * 48 * 32 * 32 * 4  # one tensor that the backward pass needs
    assert detail_drive < found["step_bytes"] < ballast.nbytes
    assert found["step_bytes"] < found["peak_bytes"] < 4 * 2**30


@pytest.fixture(scope="module")
def tiny_report(tmp_path_factory):
    """A run of all that needs no process of its own, on tiny images: (its folder, its report, what it printed)."""
    folder = tmp_path_factory.mktemp("benchmark")
    small = {"LARGE": "unet:38k-flat", "BATCHES": (1, 2), "SIDES": (8, 16), "ODE_STEPS": ((1, 1, 1), (2, 2, 2))}
    small |= {"SAMPLES": 2, "SAMPLING_STEPS": 3, "KERNEL_BATCHES": (1, 2)}
    bf16, once = mock.patch("runtime.hardware.cpu_flags", lambda: BF16_FLAGS), mock.patch.object(speed, "ROUNDS", 1)
    options = ["--device", "cpu", "--batch-size", 2, "--image-size", 8, "--seconds", 1e-6, "--no-compile"]
    options += ["--sections", "sampling", "peers", "convolutions", "kernels", "growth", "--output-dir", folder]
    with mock.patch.multiple(sections, **small), bf16, once:
        code, out, err = call(benchmark, *options)
    assert code == 0, err
    return folder, json.loads((folder / "benchmark.json").read_text()), out


def test_a_run_writes_its_conditions_and_every_figure(tiny_report):
    folder, report, out = tiny_report
    assert report["settings"]["sections"] == ["train", "sampling", "peers", "convolutions", "kernels", "growth"]
    assert report["threads"] == torch.get_num_threads() and report["machine"].endswith("threads")
    arms = ["true", "inspired", "unet:38k", "unet:150k", "unet:38k-flat"]
    assert list(report["train"]) == list(report["sampling"]["arms"]) == list(report["convolutions"]["arms"]) == arms
    libraries = {"fp32": native.FP32, "bf16": native.AMX}
    plain = [f"{precision}, plain torch" for precision, library in libraries.items() if native.available(library)]
    for arm in arms:
        trained, drawn = report["train"][arm], report["sampling"]["arms"][arm]
        assert list(trained["variants"]) == list(drawn["variants"]) == ["fp32", "bf16", *plain]
        for part in (trained, trained["plain"]) if plain else (trained,):
            assert part["images_per_second"] == pytest.approx(2 / part["seconds"])
            assert part["seconds"] == trained["variants"][part["best"]]["seconds"]
        for part in (drawn, drawn["plain"]) if plain else (drawn,):
            assert part["images_per_second"] == pytest.approx(2 / part["seconds"])
        assert "plain torch" not in trained["best"] + drawn["best"]
        alone = report["convolutions"]["arms"][arm]
        assert alone["step_over_convolutions"] == alone["seconds_a_step"] / alone["convolutions_seconds"]
    assert list(report["peers"]["cell"]["peers"]) == [
        "ours",
        "torchdiffeq",
        "ncps ltc",
        "ncps cfc",
        "ncps cfc-unrolled",
    ]
    assert report["peers"]["torchdiffeq_largest_difference"] < 1e-5
    growth = report["growth"]
    assert (list(growth["batch_size"]), list(growth["image_side"])) == (["1", "2"], ["8", "16"])
    assert list(growth["ode_steps"]) == ["1 1 1", "2 2 2"]
    assert out.count("| ") > 100 and (folder / "benchmark.md").read_text() in out
    assert (folder / "benchmark.png").stat().st_size > 10_000


def test_the_ratios_are_of_what_they_say(tiny_report):
    _, report, _ = tiny_report
    values = {name: value for name, value, _ in goals(report)}
    train, cells = report["train"], report["peers"]["cell"]["peers"]
    expected = train["true"]["images_per_second"] / train["unet:38k"]["images_per_second"]
    assert values["training images/s over `unet:38k`'s"] == expected
    assert values["ncps LTC, over our detail cell on the same pixels"] == pytest.approx(
        cells["ncps ltc"]["seconds"] / cells["ours"]["seconds"]
    )
    assert values["a million training images"] == pytest.approx(1e6 / train["true"]["images_per_second"])
    assert values["`python sample.py`, process start to PNG"] is None  # its section was left out
    assert "gives another output" not in markdown(report)
    different = report | {"peers": report["peers"] | {"torchdiffeq_largest_difference": 0.1}}
    assert "gives another output" in markdown(different)


@needs_compiler
def test_the_kernels_section_has_every_cell_and_layer_and_its_ratios_are_of_what_they_say(tiny_report):
    _, report, out = tiny_report
    found, threads = report["kernels"], sorted({1, torch.get_num_threads()})
    rows = [(row["cell"], row["side"], row["batch_size"], row["threads"]) for row in found["cells"]]
    cells = (("detail", 8), ("local", 4), ("global", 2))
    assert rows == [(*cell, batch, number) for cell in cells for batch in (1, 2) for number in threads]
    names = {"torch", "ours", "convolutions, torch", "convolutions, ours"}
    assert all(row[part].keys() == names for row in found["cells"] for part in ("forward", "training"))
    row = found["cells"][0]
    over = row["training"]["ours"] / row["training"]["convolutions, torch"]
    (line,) = [
        line.strip("| ").split(" | ")
        for line in out.split("steps of the cell, forward and backward")[1].split("\n\n")[0].splitlines()
        if line.startswith(f"| detail, 32 channels, 8x8, 7 steps | 1 | {threads[0]} |")
    ]
    assert line[4] == "-" and line[-2] == f"{over:.3g}"  # nothing was compiled
    assert list(found["arms"]) == ["true", "inspired", "unet:38k", "unet:150k"]
    assert [row["layer"] for row in found["arms"]["true"]["layers"]] == [f"{name} cell's input" for name, _ in cells]
    for arm in found["arms"].values():
        for who in ("torch", "ours"):
            calls = [row["calls_a_step"] * row["training"][who] for row in arm["layers"]]
            assert arm["sum"]["training"][who] == pytest.approx(sum(calls))


def test_memory_processes_and_start_are_run_by_their_sections(tmp_path, monkeypatch):
    """What they do takes processes of its own and is tested apart; here that their figures reach the table."""
    monkeypatch.setattr(sections, "LARGE", "unet:38k-flat")
    monkeypatch.setattr(sections, "peak_memory", lambda *_: {"peak_bytes": 3 * 2**30, "step_bytes": 2**30})
    monkeypatch.setattr(sections, "one_against_two", lambda *_: {"two_over_one": 1.25})
    monkeypatch.setattr(sections, "sampling_command", lambda *_: {"seconds": 12.5})
    options = ["--device", "cpu", "--batch-size", 2, "--image-size", 8, "--seconds", 1e-6, "--no-compile"]
    code, out, err = call(benchmark, *options, "--sections", "memory", "processes", "start", "--output-dir", tmp_path)
    assert code == 0, err
    for value in ("| 3,072 | MiB |", "| 1,024 | MiB |", "| 1.25 | x |", "| 12.5 | s |"):
        assert value in out


def test_an_interruption_says_what_is_measured(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(sections.SECTIONS, "sampling", interrupted)
    monkeypatch.setitem(sections.SECTIONS, "train", lambda _: {"true": {"images_per_second": 1.0}})
    options = ["--device", "cpu", "--output-dir", tmp_path, "--sections"]
    assert call(benchmark, *options, "sampling")[::2] == (130, "benchmark.py: interrupted\n")
    code, _, err = call(benchmark, *options, "train", "sampling")
    assert (code, err) == (130, f"benchmark.py: interrupted: {tmp_path / 'benchmark.json'} has train\n")
    assert json.loads((tmp_path / "benchmark.json").read_text())["train"]["true"]["images_per_second"] == 1


def test_two_processes_divide_a_batch(monkeypatch):
    """Forked here from a process that has imported torch; `benchmark.py` spawns them."""
    monkeypatch.setattr("lab.benchmark.processes.ROUNDS", 1)
    forked = partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(torch.multiprocessing, "spawn", forked)
    config = TrainConfig(dataset="synthetic", batch_size=2, device="cpu", precision="fp32")
    report = sections.one_against_two(config, 8, 2, steps=1)
    assert report["gradient_bytes_a_step"] == 4 * 38_307
    assert report["one_process"]["threads"] == 2 and report["two_processes"]["threads_each"] == 1
    one, two = (report[name]["images_per_second"] for name in ("one_process", "two_processes"))
    assert report["two_over_one"] == two / one


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--batch-size", 0),
        ("--sections", "lunch"),
        ("--seconds", 0),
        ("--image-size", 12),
        ("--device", "tpu"),
        ("--output-dir", "/proc/none"),
    ],
)
def test_a_bad_value_is_refused_by_its_flag(flag, value, tmp_path):
    code, _, err = call(benchmark, "--output-dir", tmp_path / "x", flag, value)
    assert code == 2 and err.startswith(f"benchmark.py: error: {flag}: ") and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists()


def test_a_missing_package_is_named_with_the_file_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PACKAGES", ("torch", "no_such_package"))
    code, _, err = call(benchmark, "--output-dir", tmp_path, "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1) and "no_such_package" in err and "requirements-compare.txt" in err
