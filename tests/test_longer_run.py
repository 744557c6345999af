"""Resuming a run with another length: a learning rate that jumps is said before it trains."""

import re

from conftest import TINY, call, trained

import train
from training.step import learning_rate


def test_a_rate_that_jumps_since_the_run_now_has_another_length_is_said(light, tmp_path):
    run = trained(tmp_path, *TINY, "--steps", 4)
    code, out, _ = call(train, "--resume", run)
    assert code == 0 and "rate " not in out  # nothing is left to train
    code, out, _ = call(train, "--resume", run, "--steps", 8, "--dry-run")
    (before, after) = re.findall(r"^rate +the learning rate goes up again, from (\S+) to (\S+): .* later$", out, re.M)[
        0
    ]
    assert code == 0 and before == f"{learning_rate(8e-3, 4, 1):.3g}" and after == f"{learning_rate(8e-3, 4, 0.5):.3g}"
    code, out, _ = call(train, "--resume", run, "--steps", 8)
    assert code == 0 and out.index("rate ") < out.index("done: ")
    code, out, _ = call(train, "--resume", run, "--steps", 8)
    assert code == 0 and "rate " not in out


def test_a_shorter_run_s_rate_goes_down(light, tmp_path):
    run = trained(tmp_path, *TINY, "--steps", 2)
    assert call(train, "--resume", run, "--steps", 40, "--save-every", 1)[0] == 0
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"steps": 40', '"steps": 400'))  # as if interrupted at step 40
    code, out, _ = call(train, "--resume", run, "--steps", 50, "--dry-run")
    assert code == 0 and re.search(r"^rate +the learning rate goes down, from .* sooner$", out, re.M), out
