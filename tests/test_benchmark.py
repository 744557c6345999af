"""`benchmark.py`: what it counts and what it compares is what it says. No test looks at how fast anything was."""

import json
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import call
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from kernels import convolution, native
from kernels.convolution import Conv3x3
from lab import speed
from lab.benchmark import kernels, peers, sections
from lab.benchmark.convolutions import Convolution, convolutions, seconds_alone
from lab.benchmark.processes import peak_memory
from lab.benchmark.report import goals, markdown
from models import build_model
from training.config import TrainConfig

needs_compiler = pytest.mark.skipif(not native.available(native.FP32), reason="no C++ compiler")
BF16 = {"avx512_bf16"}  # what a processor that multiplies in bf16 has; others compute the same, slowly


class Net(nn.Module):
    """A stem, a recurrent convolution called three times, and a strided depthwise one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.recurrent = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)

    def forward(self, x, t):
        h = self.stem(x)
        for _ in range(3):
            h = self.recurrent(h)
        return self.down(h)


def by_hand(channels, batch, side, *, groups=1, stride=1, bias=True, input_gradient=True):
    c_in, c_out = channels
    options = ((stride, stride), (1, 1), (1, 1), False, (0, 0), groups)
    shapes = (batch, c_in, side, side), (c_out, c_in // groups, 3, 3), (batch, c_out, side // stride, side // stride)
    return Convolution(*shapes, bias, options, input_gradient)


def test_the_convolutions_of_a_small_network_are_those_counted_by_hand():
    assert convolutions(Net(), (3, 8, 8), batch_size=5) == Counter(
        {
            by_hand((3, 4), 5, 8, input_gradient=False): 1,
            by_hand((4, 4), 5, 8, bias=False): 3,
            by_hand((4, 4), 5, 8, groups=4, stride=2): 1,
        }
    )


def test_work_and_bytes_of_one_convolution_by_hand():
    c = by_hand((3, 4), 2, 8, input_gradient=False)
    assert c.multiply_adds == 2 * 4 * 8 * 8 * 3 * 9
    assert c.training_multiply_adds == 2 * c.multiply_adds
    x, w, y = 2 * 3 * 64, 4 * 3 * 9, 2 * 4 * 64
    assert c.training_bytes("fp32") == 4 * 2 * (x + w + y)
    assert by_hand((3, 4), 2, 8).training_bytes("bf16") == 2 * 3 * (x + w + y)


@pytest.mark.parametrize("arm", ["true", "inspired", "unet:38k"])
def test_the_convolutions_of_a_model_are_all_of_its_convolutions(arm):
    model = build_model(sections.ARMS[arm][0])
    with FlopCounterMode(display=False) as counter, torch.no_grad(), native.plain_torch():
        model(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.long))
    flops = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    counts = convolutions(model, (3, 16, 16), batch_size=4)
    assert 2 * sum(count * c.multiply_adds for c, count in counts.items()) == flops
    assert sum(count for c, count in counts.items() if not c.input_gradient) == 1  # the stem's


def test_every_ode_step_but_the_first_from_zeros_is_a_recurrent_convolution():
    counts = convolutions(build_model("true", ode_steps=(2, 4, 9)), (3, 32, 32), batch_size=1)
    recurrent = {c.input[-1]: n for c, n in counts.items() if not c.bias}
    assert recurrent == {8: 1, 16: 3, 32: 8}


def test_the_time_alone_is_the_sum_over_calls_of_what_is_best_for_each(monkeypatch):
    """Passes that take 1 s, but 0.5 s in one form; a clock that nobody waits for."""
    times = {"forward": 1.0, "backward": 1.0}

    def in_turn(calls, device, seconds):
        return {name: [0.5 if name[:2] == ("bf16", "contiguous") else times[name[2]]] for name in calls}

    monkeypatch.setattr("lab.benchmark.convolutions.in_turn", in_turn)
    monkeypatch.setattr("runtime.hardware.cpu_flags", lambda: BF16)
    alone, rows = seconds_alone(convolutions(Net(), (3, 8, 8), 2), torch.device("cpu"), seconds=0.1)
    assert alone == pytest.approx(5 * (0.5 + 0.5))  # five calls per step
    assert [row["calls_a_step"] for row in rows] == [1, 3, 1]
    assert {row["best"] for row in rows} == {"bf16 contiguous"}
    assert len(rows[0]["seconds"]) == 2 * 2 * 2


def test_the_cell_driven_by_torchdiffeq_is_the_same_function_with_the_same_gradients():
    torch.manual_seed(0)
    found = []
    model = build_model("true")
    for driven in (False, True):
        if driven:
            peers.drive_by_torchdiffeq(model)
        cell = peers.detail_cell(model)
        assert (type(cell) is peers.TorchdiffeqCell) == driven
        torch.manual_seed(1)
        inputs = peers.cell_inputs(cell, 2, 8, torch.device("cpu"))
        peers.forward_backward(cell, inputs, "fp32")()
        found.append([cell(*inputs), inputs[0].grad, *(p.grad for p in cell.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


def test_a_whole_model_driven_by_torchdiffeq_takes_as_many_steps_and_one_convolution_more_a_cell():
    model = build_model("true")
    ours = sum(convolutions(model, (3, 16, 16), 1).values())
    theirs = sum(convolutions(peers.drive_by_torchdiffeq(model), (3, 16, 16), 1).values())
    assert theirs == ours + 3  # torchdiffeq does not know that W_rec * 0 = 0


def test_another_function_is_not_taken_for_the_same():
    cell = peers.detail_cell(build_model("true"))
    other = peers.detail_cell(build_model("true"))
    inputs = peers.cell_inputs(cell, 1, 8, torch.device("cpu"))
    assert peers.largest_difference(cell, cell, inputs) == 0
    assert peers.largest_difference(cell, other, inputs) > 0.01


@pytest.mark.parametrize("kind, elements, unfolds", [("ltc", 1, 7), ("cfc", 1, None), ("cfc-unrolled", 7, None)])
def test_an_ncps_cell_sees_every_pixel_with_the_detail_cells_width(kind, elements, unfolds):
    cell = peers.detail_cell(build_model("true"))
    features, _ = peers.cell_inputs(cell, 2, 8, torch.device("cpu"))
    pixels = peers.as_pixels(features, kind)
    assert pixels.shape == (2 * 8 * 8, 32 + 24)
    assert torch.equal(pixels[8 * 8 + 3], features[1, :, 0, 3])
    peer = peers.PixelCell(kind, pixels.shape[1], cell.recurrent.out_channels, cell.num_steps)
    with mock.patch.object(peer.cell, "forward", wraps=peer.cell.forward) as forward:
        assert peer(pixels).shape == (128, 32)
    assert forward.call_args.args[0].shape == (128, elements, 56)
    assert peer.cell.state_size == 32 and getattr(peer.cell.rnn_cell, "_ode_unfolds", None) == unfolds
    peers.forward_backward(peer, (pixels,), "fp32")()
    assert pixels.grad.abs().sum(1).min() > 0


def test_at_most_so_many_pixels_are_timed(monkeypatch):
    monkeypatch.setitem(peers.PIXELS, "ltc", 100)
    assert peers.as_pixels(torch.zeros(2, 5, 8, 8), "ltc").shape == (100, 5)


def test_calls_take_turns_and_a_slow_one_has_fewer_rounds(monkeypatch):
    clock, order = [0.0], []

    def takes(name, seconds):
        order.append(name)
        clock[0] += seconds

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    calls = {"quick": lambda: takes("quick", 2.0), "slow": lambda: takes("slow", 11.0)}
    assert speed.in_turn(calls, torch.device("cpu"), seconds=1.0, warmed_up=True) == {
        "quick": [2.0] * 5,
        "slow": [11.0] * 3,
    }
    assert order == ["quick", "slow"] * 3 + ["quick"] * 2


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


@needs_compiler
@pytest.mark.parametrize("name, steps", [("detail", 7), ("local", 5), ("global", 3)])
def test_what_is_timed_of_a_cell_is_the_cell_and_the_convolutions_that_the_model_calls(name, steps):
    model = kernels.true_model()
    cell, shape = model.processor.cells[name], kernels.input_shapes(model, 16)[name]
    embedding = torch.randn(2, cell.time.in_features)
    (x,) = kernels.randoms((2, *shape))  # raises nothing: the cell reads this shape
    with torch.no_grad(), native.plain_torch():
        expected, features, offset = cell(x, embedding), cell.input(x), cell.time(embedding)
        for function in (kernels.Steps(cell), kernels.KernelSteps(cell)):
            torch.testing.assert_close(function(features, offset), expected, rtol=1e-4, atol=1e-5)
    (recurrent, times), *_ = [
        (c, n) for c, n in convolutions(model, (3, 16, 16), 2).items() if not c.bias and c.input[2:] == shape[1:]
    ]
    assert times == steps - 1
    seen = []
    with mock.patch.object(kernels, "convolution_passes", lambda *found: seen.append(found) or {}):
        assert set(kernels.cell_calls(model, name, shape, 2, compile=False)) == {"torch", "ours"}
    assert seen == [(recurrent, times)]


@needs_compiler
def test_both_timed_forms_of_a_convolution_are_called_as_often_as_it_says():
    counter = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counter[function] += 1
            return function(*args, **(kwargs or {}))

    found = kernels.convolution_passes(by_hand((8, 16), 2, 4), 3)
    for who, (forward, backward) in {
        "torch": (torch.ops.aten.convolution, torch.ops.aten.convolution_backward),
        "ours": (torch.ops.liquid.convolution, torch.ops.liquid.convolution_backward),
    }.items():
        for part, backwards in (("forward", 0), ("training", 3)):
            counter.clear()
            with Count():
                found[who][part]()
            assert (counter[forward.default], counter[backward.default]) == (3, backwards)


@needs_compiler
def test_the_gradients_that_are_timed_are_those_of_all_inputs_and_weights():
    cell = kernels.true_model().processor.detail_cell
    inputs = kernels.randoms((2, 64, 8, 8), (2, 64))
    ours, by_torch = (
        kernels.both_passes(steps(cell), inputs, [cell.recurrent.weight], torch.ones(2, 32, 8, 8))
        for steps in (kernels.KernelSteps, kernels.Steps)
    )
    assert not ours["forward"]().requires_grad
    assert len(ours["training"]()) == 3
    for one, other in zip(ours["training"](), by_torch["training"](), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@needs_compiler
@pytest.mark.parametrize("arm", ["inspired", "unet:38k", "unet:150k"])
def test_the_convolutions_timed_for_an_arm_are_those_that_reach_our_kernel(arm):
    name, own = sections.ARMS[arm]
    model, reached = build_model(name, **own), Counter()

    def keep(layer, inputs, output):
        if convolution.pays(layer, inputs[0]):
            reached[inputs[0].shape[1:], output.shape[1:]] += 1

    for layer in model.modules():
        if isinstance(layer, Conv3x3):
            layer.register_forward_hook(keep)
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long))
    found = Counter()
    for c, count in kernels.our_convolutions(arm, 16, 4).items():
        assert c.input[0] == 4
        found[c.input[1:], c.output[1:]] += count
    assert found == reached and reached.total() > 3


@needs_compiler
def test_the_largest_errors_are_small_and_those_of_another_result_large():
    errors = kernels.largest_errors(8, 2)
    assert list(errors) == ["global", "local", "detail"]
    found = [value for both in errors.values() for part in both.values() for value in part.values()]
    assert len(found) == 3 * 2 * 4 and min(found) > 0 and max(found) < 1e-4
    with mock.patch.object(kernels.KernelSteps, "forward", lambda self, features, offset: (
            1.5 * kernels.Steps.forward(self, features, offset))):  # fmt: skip
        wrong = kernels.largest_errors(8, 2)["local"]
    assert wrong["ours"] == pytest.approx(dict.fromkeys(wrong["ours"], 0.5), rel=1e-3)
    assert max(wrong["torch"].values()) < 1e-4


def test_the_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), kernels.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


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
    bf16, once = mock.patch("runtime.hardware.cpu_flags", lambda: BF16), mock.patch.object(speed, "ROUNDS", 1)
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
    plain = ["fp32, plain torch"] if native.available(native.FP32) else []
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
