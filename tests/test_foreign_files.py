"""Files of another program, or of this one in the wrong place: refused in one line that says what to name."""

import json
import shutil

import pytest
from conftest import call

import compare
import evaluate
import sample
import train
from runtime.errors import UserError
from training.checkpoint import read_model
from training.run_folder import read_config


@pytest.mark.parametrize(
    "content", ["[1, 2]", '"text"', "3", "null", "{}", '{"train": [1]}', '{"train": {"data_dir": 5}}']
)
def test_a_config_of_another_program_is_refused_by_every_command_that_reads_it(content, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / "config.json").write_text(content)
    for module, flag in ((train, "--resume"), (evaluate, "--checkpoint")):
        code, out, err = call(module, flag, run)
        assert (code, out, err.count("\n")) == (2, "", 1) and f"{run}/config.json: not the config of a run" in err, err


@pytest.mark.parametrize("content", ["[1, 2]", '"text"', "null", "{}", '{"a": 1}', "[" * 99_999, "\xff"])
def test_settings_of_another_program_are_refused(content, tmp_path):
    (tmp_path / "comparison.json").write_text(content, encoding="latin1")
    code, out, err = call(compare, "--dataset", "digits", "--output-dir", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"{tmp_path}/comparison.json" in err and "use another --output-dir" in err


@pytest.mark.parametrize("name", ["costs.csv", "comparison.csv", "sweep.csv"])
@pytest.mark.parametrize("content", ["x,y\n1,2\n", "arm\na\n", "\0\0", "\xff"])
def test_tables_of_another_program_are_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="latin1")
    code, out, err = call(compare, "--dataset", "digits", "--output-dir", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"{tmp_path / name}: not of a comparison" in err and "use another --output-dir" in err


def test_the_folder_of_runs_is_refused_with_a_run_to_name(whole_run, tmp_path):
    for i in range(2):
        shutil.copytree(whole_run, tmp_path / f"runs/0000{i}-true-digits")
    runs = tmp_path / "runs"
    for module, flag in ((sample, "--checkpoint"), (evaluate, "--checkpoint"), (train, "--resume")):
        for named, such_as in (
            (runs, "00001-true-digits"),
            (runs / "00000", "00000-true-digits"),
            (runs / "00009-gone", "00001-true-digits"),
        ):
            code, out, err = call(module, flag, named)
            assert (code, out, err.count("\n")) == (2, "", 1) and str(named) in err, err
            assert f"name one of the runs in {runs}, such as {runs / such_as}" in err, err


def test_the_runs_of_a_comparison_are_found(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "runs/true-lr0.1-seed0-share1/00000-true-digits")
    with pytest.raises(UserError, match=str(run)):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json", "metrics.csv", "loss.png"])
def test_another_file_of_a_run_is_refused_with_its_weights_to_name(name, whole_run):
    code, out, err = call(sample, "--checkpoint", whole_run / name)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"{whole_run / name}: " in err and f"name {whole_run / 'model.safetensors'}" in err


def test_a_run_that_has_saved_nothing_and_a_folder_of_nothing_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="name a run folder or its weights"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"train": {}}))
    with pytest.raises(UserError, match="nothing was saved yet"):
        read_model(tmp_path)
    assert read_config(tmp_path) == {"train": {}}
    (tmp_path / "checkpoint.pt").write_text("")
    with pytest.raises(UserError, match=r"name the model\.safetensors of its run"):
        read_model(tmp_path / "checkpoint.pt")
