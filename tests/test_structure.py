"""The house: which folder may import from which, no circles, and nothing slow at a command's start."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

COMMANDS = ("train", "sample", "evaluate", "compare", "benchmark")
NETWORKS = {"liquid_diffusion", "liquid_diffusion_inspired", "baselines", "diffusion", "models"}

# part -> the parts that it may import besides itself; each module in the root is a part of its own
MAY_IMPORT = {
    "runtime": set(),
    "kernels": {"runtime"},
    "liquid_diffusion": {"diffusion", "kernels"},
    "liquid_diffusion_inspired": {"diffusion", "kernels", "liquid_diffusion"},
    "baselines": {"diffusion", "kernels", "liquid_diffusion"},
    "diffusion": set(),
    "models": {"kernels", "liquid_diffusion", "liquid_diffusion_inspired", "baselines", "diffusion"},
    "images": {"runtime"},
    "training": {"images", "kernels", "runtime", *NETWORKS},
    "lab": {"training", "images", "kernels", "runtime", *NETWORKS},
    "train": {"training", "images", "runtime", *NETWORKS},
    "sample": {"lab", "training", "images", "runtime", *NETWORKS},
    "evaluate": {"lab", "training", "images", "runtime", *NETWORKS},
    "compare": {"lab", "training", "images", "runtime", *NETWORKS},
    "benchmark": {"lab", "training", "images", "runtime", *NETWORKS},
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


def test_a_command_starts_without_what_takes_seconds_to_import_and_few_runs_need():
    slow = {"torch._dynamo", "torchvision", "matplotlib", "diffusers", "sklearn", "scipy.stats", "torchdiffeq", "ncps"}
    code = f"import {', '.join(COMMANDS)}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not slow & set(done.stdout.split())
