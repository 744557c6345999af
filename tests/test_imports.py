"""What modules import: nothing from above them in README's list, and at a command's start nothing slow but torch."""

import ast
import re
import subprocess
import sys

from conftest import ROOT

COMMANDS = ("train", "sample", "evaluate", "compare", "benchmark")


def levels() -> list[list[str]]:
    """The modules as README lists them, from the commands down."""
    listed = (ROOT / "README.md").read_text().split("## How it fits together")[1].split("\n    ", 1)[1].split("\n\n")[0]
    return [re.findall(r"(\w+)\.py", line) for line in listed.splitlines()]


def test_no_module_imports_from_one_above_it():
    height = {module: -number for number, modules in enumerate(levels()) for module in modules}
    assert height.keys() == {path.stem for path in ROOT.glob("*.py")}
    for module in height:
        for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            above = [name for name in names if height.get(name, -1000) > height[module]]
            assert not above, f"{module}.py imports {above}"


def test_a_command_starts_without_what_takes_seconds_to_import_and_few_runs_need():
    slow = {"torch._dynamo", "torchvision", "matplotlib", "diffusers", "sklearn", "scipy.stats", "torchdiffeq", "ncps"}
    code = f"import {', '.join(COMMANDS)}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not slow & set(done.stdout.split())
