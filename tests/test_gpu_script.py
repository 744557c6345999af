"""`lab/gpu.sh` without a GPU and with a stand-in for Python: what it runs, skips, and tries again."""

import os
import subprocess

from conftest import ROOT

STAND_IN = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in *benchmark.py*) [ -f {broken} ] && exit 3 ;; esac
exit 0
"""


def test_done_items_are_skipped_failed_ones_are_tried_again_and_data_brings_more(tmp_path):
    calls, broken, results = tmp_path / "calls", tmp_path / "broken", tmp_path / "results"
    (tmp_path / "python").write_text(STAND_IN.format(calls=calls, broken=broken))
    (tmp_path / "python").chmod(0o755)

    def run(**environment) -> list[str]:
        calls.write_text("")
        command = ["bash", ROOT / "lab/gpu.sh", results]
        environment = os.environ | {"PYTHON": str(tmp_path / "python")} | environment
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return [line.removeprefix("-m ").split()[0] for line in calls.read_text().splitlines()]

    broken.touch()
    assert run() == ["pytest", "benchmark.py", "train.py"]
    assert (results / "benchmark.txt").read_text() == "stopped with code 3\n"
    broken.unlink()
    assert run() == ["benchmark.py"]
    assert run() == []
    assert run(DATA_DIR="images") == ["train.py", *["compare.py"] * 4]
