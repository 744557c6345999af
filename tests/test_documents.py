"""What the documents promise: README's Python lines run, commands have the flags they are shown with, links work."""

import re
import shlex

import pytest
from conftest import ROOT

import benchmark
import compare
import evaluate
import export
import sample
import train
from data import render_font
from lab.classifier import __main__ as classifier

COMMANDS = {f"{module.__name__}.py": module for module in (train, sample, evaluate, compare, benchmark, export)}
COMMANDS |= {"classifier": classifier, "render_font.py": render_font}
PAGES = ["README.md", "RESULTS.md", "pretrained/README.md", "data/README.md"]
LONGEST = {"README.md": 120, "RESULTS.md": 250}  # lines


def test_the_python_lines_of_readme_run_and_say_the_shapes_that_they_print(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.count("torch.Size") == 3


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_exist_with_their_flags(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    shown = re.findall(
        r"python (?:-m lab\.|data/)?"
        r"((?:classifier\b|(?:train|sample|evaluate|compare|benchmark|export|render_font)\.py)[^`|#\n]*)",
        text,
    )
    for line in shown:
        command, *words = shlex.split(line.replace("[", "").replace("]", ""))
        known = {flag for action in COMMANDS[command].parser()._actions for flag in action.option_strings}
        unknown = {word.split("=")[0] for word in words if word.startswith("--")} - known
        assert not unknown, line
    assert shown or page not in LONGEST


@pytest.mark.parametrize("page", [*PAGES, "LOG.md"])
def test_the_links_and_pictures_of_a_page_are_there(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [
        target for target in targets if "://" not in target and not (ROOT / page).parent.joinpath(target).exists()
    ]
    assert not missing
    assert len(text.splitlines()) <= LONGEST.get(page, 10**6)
