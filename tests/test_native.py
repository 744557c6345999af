"""The C++ libraries: compiled once, for vectors of every width, without a wrong access; and torch where they lack."""

import subprocess
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, run_forked

from kernels import cell_input, convolution, liquid_kernel, native
from liquid_diffusion import RealLiquidCell

resource = pytest.importorskip("resource")
needs_compiler = pytest.mark.skipif(not native.available(native.FP32), reason="no C++ compiler")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_is_no_library_and_no_file(tmp_path, monkeypatch, compiler):
    """One that is not there, one that fails."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        native.compiled_file(native.FP32, "this processor")
    assert native.loaded.__wrapped__(native.FP32) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_compiler
def test_it_is_compiled_once_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    small = replace(native.FP32, sources=("products.cpp",))
    path = native.compiled_file(small, "this processor")
    assert capsys.readouterr().err == "compiling the C++ kernels for this processor, once\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert native.compiled_file(small, "this processor") == path
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        native.compiled_file(small, "another processor")


@pytest.mark.parametrize(
    "command",
    [
        "train.py --dataset digits --dry-run --precision fp32",
        "train.py --dataset digits --dry-run --precision bf16",
        "sample.py --num-images 1 --steps 2",
    ],
)
def test_a_command_says_that_there_is_no_compiler(tmp_path, command):
    name, *flags = command.split()
    flags += ["--output", str(tmp_path / "grid.png")] * (name == "sample.py")
    done = run_forked(name, *flags, CXX="no-such-compiler", TORCH_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "without C++ kernels, at half the speed: no C++ compiler (g++) works here" in done.stdout + done.stderr


def test_without_it_torch_computes(monkeypatch):
    torch.manual_seed(0)
    cell = RealLiquidCell(4, 8, 8, num_steps=2, tau_range=(0.5, 4))
    x, embedding = torch.randn(1, 4, 8, 8), torch.randn(1, 8)
    monkeypatch.setattr(native, "call", lambda *_: pytest.fail("the library was called"))
    with torch.no_grad():
        with native.plain_torch():
            expected = cell(x, embedding)
        monkeypatch.setattr(native, "available", lambda library: False)
        assert torch.equal(cell(x, embedding), expected)


@needs_compiler
@pytest.mark.parametrize("lanes", [4, 16])  # 8 are those of AVX2
def test_vectors_of_every_width_compute_the_same(monkeypatch, lanes):
    """The compiler makes vectors that the processor lacks of those it has, so each source's every width is tried."""
    torch.manual_seed(0)
    cell = RealLiquidCell(20, 20, 8, num_steps=3, tau_range=(0.5, 4))
    layer = convolution.Conv3x3(20, 20)
    x, embedding = torch.randn(2, 20, 9, 10), torch.randn(2, 8)

    def outcome(cell, layer, x, embedding):
        output = cell(layer(x), embedding)
        return [output, *torch.autograd.grad(output.square().sum(), [*cell.parameters(), *layer.parameters()])]

    flags = (*native.FLAGS, f"-DLANES={lanes}", "-Og", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")
    flags += ("-Wno-uninitialized", "-Wno-maybe-uninitialized")  # GCC 12 finds such in its own header for AVX-512
    library = replace(native.FP32, name=f"lanes{lanes}", flags=flags)
    for module in (native, liquid_kernel, cell_input, convolution):
        monkeypatch.setattr(module, "FP32", library)
    native.lanes.cache_clear()
    try:
        assert native.loaded(library) is not None, "it does not compile, or has warnings"
        assert native.lanes() == lanes
        found = outcome(cell, layer, x, embedding)
    finally:
        native.lanes.cache_clear()
    exact = outcome(cell.double(), layer.double(), x.double(), embedding.double())
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@needs_compiler
def test_no_function_touches_what_is_not_its_own(tmp_path):
    """The driver's arrays are exactly as long as they must be, and a sanitizer watches every access."""
    program = tmp_path / "driver"
    sources = [ROOT / "tests" / "kernel_driver.cpp", *(ROOT / "kernels" / name for name in native.FP32.sources)]
    flags = ["-O0", "-march=native", "-std=c++17", "-fopenmp"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("the compiler has no sanitizer here")
    assert built.returncode == 0, built.stderr

    def without_limits():  # a sanitizer reserves terabytes, and a command that ran in this process has set a limit
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            most = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (most, most))

    result = subprocess.run([str(program)], capture_output=True, text=True, preexec_fn=without_limits)
    assert (result.returncode, result.stdout) == (0, "good\n"), result.stderr
