"""The house: which folder may import from which, no circles, and nothing slow at a command's start."""

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import baselines
import choices
import liquid_diffusion
import models
import train
from images import datasets
from lab.benchmark import sections

COMMANDS = ("train", "sample", "evaluate", "compare", "benchmark", "export", "lab.classifier.__main__")
NETWORKS = {"liquid_diffusion", "liquid_diffusion_inspired", "baselines", "diffusion", "models"}

# part -> the parts that it may import besides itself; each module in the root is a part of its own
MAY_IMPORT = {
    "choices": set(),
    "runtime": set(),
    "data": {"runtime"},
    "kernels": {"runtime"},
    "liquid_diffusion": {"choices", "diffusion", "kernels"},
    "liquid_diffusion_inspired": {"diffusion", "kernels", "liquid_diffusion"},
    "baselines": {"diffusion", "kernels", "liquid_diffusion"},
    "diffusion": {"choices"},
    "models": {"kernels", "liquid_diffusion", "liquid_diffusion_inspired", "baselines", "diffusion"},
    "images": {"choices", "runtime"},
    "training": {"choices", "images", "kernels", "runtime", *NETWORKS},
    "lab": {"choices", "training", "images", "kernels", "runtime", *NETWORKS},
    "train": {"choices", "training", "images", "runtime", "models"},
    "sample": {"choices", "lab", "training", "runtime"},
    "evaluate": {"choices", "lab", "training", "runtime"},
    "compare": {"choices", "lab", "training", "images", "runtime"},
    "benchmark": {"choices", "lab", "runtime"},
    "export": {"lab", "runtime", "training"},
}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name, apart from the tests."""
    files = [*ROOT.glob("*.py"), *(path for part in MAY_IMPORT for path in (ROOT / part).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imports() -> dict[str, set[str]]:
    """module -> the project's modules that it imports, anywhere in its file."""
    known, found = modules(), {}
    for name, path in known.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{path}: imports are absolute"
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = named & known.keys()
    return found


def test_every_part_imports_only_from_the_parts_below_it():
    assert {name.split(".")[0] for name in modules()} == MAY_IMPORT.keys()
    for name, used in imports().items():
        part = name.split(".")[0]
        beyond = {other.split(".")[0] for other in used} - {part} - MAY_IMPORT[part]
        assert not beyond, f"{name} imports from {beyond}"


def test_no_module_imports_itself_through_others():
    order = list(TopologicalSorter(imports()).static_order())  # raises CycleError
    assert order.index("runtime.errors") < order.index("training.loop") < order.index("train")


def test_the_root_has_at_most_twelve_modules_and_each_folder_says_what_lives_in_it():
    assert sum("." not in name for name in modules()) <= 12
    for path in ROOT.rglob("__init__.py"):
        if path.relative_to(ROOT).parts[0] in MAY_IMPORT:
            (docstring,) = ast.parse(path.read_text()).body
            lines = docstring.value.value.strip().splitlines()
            assert 2 <= len(lines) <= 10
            names = {other.stem for other in path.parent.glob("*.py")} - {"__init__"}
            assert all(f"`{name}`" in docstring.value.value for name in names), path


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after running this code."""
    code = f"{code}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_a_command_knows_its_flags_without_torch():
    """`--help` and mistyped flags are answered at once; the import of torch takes seconds."""
    slow = {"torch", "numpy", "PIL", "tqdm", "scipy"}
    for command in COMMANDS:
        assert not slow & imported_by(f"import {command}; {command}.parser().format_help()"), command


@pytest.mark.parametrize(
    "command, words",
    [
        ("train", ["--help"]),
        ("sample", ["--help"]),
        ("evaluate", ["--help"]),
        ("compare", ["--help"]),
        ("benchmark", ["--help"]),
        ("export", ["--help"]),
        ("export", ["--checkpoint", "nowhere"]),
        ("lab/classifier/__main__", ["--help"]),
        ("lab/classifier/__main__", ["--images", "0"]),
        ("train", ["--lr", "5"]),
        ("train", ["--init", "nowhere"]),
        ("train", ["--resume", "nowhere"]),
        ("train", ["--dataset", "folder", "--data-dir", "nowhere"]),
        ("sample", ["--no-such-flag"]),
        ("sample", ["--checkpoint", "nowhere"]),
        ("sample", ["--output", "grid.jpg"]),
        ("sample", ["--gif", "grid.png"]),
        ("evaluate", ["--checkpoint", "nowhere"]),
        ("compare", ["--dataset", "folder", "--data-dir", "nowhere"]),
        ("benchmark", ["--image-size", "9"]),
        ("data/render_font", ["--help"]),
        ("data/render_font", ["nowhere", "--output", "nowhere"]),
    ],
)
def test_help_and_what_is_wrong_with_the_flags_are_said_before_torch_is_imported(command, words):
    code = f"import runpy, sys\nsys.argv = {[f'{command}.py', *words]}\n"
    code += f"try: runpy.run_path('{command}.py', run_name='__main__')\n"
    code += "except SystemExit as left: print(); print(left.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{0 if words == ['--help'] else 2} False", done.stderr


def test_what_the_flags_offer_is_what_there_is():
    assert tuple(name for name in models.NETWORKS if ":" not in name) == choices.MODELS
    assert tuple(baselines.ABLATIONS) == choices.ABLATIONS
    assert tuple(liquid_diffusion.STEP_FRACTION) == choices.STEP_SOLVERS
    assert set(choices.DATASETS) == {*datasets.DOWNLOADS, "digits", "folder"}
    assert tuple(sections.SECTIONS) == choices.SECTIONS
    liquid, shown = inspect.signature(liquid_diffusion.TrueLiquidDiffusionModel), train.parser().format_help().split()
    for name in ("channels", "ode_steps"):
        assert f"(default: {' '.join(map(str, liquid.parameters[name].default))})" in " ".join(shown)


def test_a_command_starts_without_what_takes_long_to_import_and_few_runs_need():
    slow = {"torch._dynamo", "torchvision", "matplotlib", "diffusers", "sklearn", "scipy.stats", "torchdiffeq", "ncps"}
    slow |= {"triton", "sympy"}
    for work in ("lab.drawing", "training.loop", "lab.comparison.procedure", "lab.benchmark.procedure"):
        assert not slow & imported_by(f"import {work}"), work
