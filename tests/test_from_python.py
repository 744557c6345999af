"""Called from Python and not from a shell: in any thread, with text or Paths."""

import json
import signal
import threading
from pathlib import Path

import pytest
import torch

from images.datasets import load_images
from images.pictures import save_grid
from runtime import command_line
from training.checkpoint import load_model
from training.config import TrainConfig
from training.loop import train

SHORT = {"dataset": "digits", "epochs": None, "timesteps": 4, "batch_size": 8, "device": "cpu", "precision": "fp32"}


def test_a_run_in_a_thread_handles_no_signals_and_is_the_same_run(light, tmp_path):
    before = [signal.getsignal(number) for number in command_line.STOP_SIGNALS]
    finished, failed = [], []

    def run() -> None:
        try:
            finished.append(train(TrainConfig(steps=1, output_dir=tmp_path / "thread", **SHORT)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed, failed
    assert before == [signal.getsignal(number) for number in command_line.STOP_SIGNALS]
    other = train(TrainConfig(steps=1, output_dir=str(tmp_path / "main"), **SHORT))
    assert (other / "model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_paths_may_be_text_or_paths(light, tmp_path):
    config = TrainConfig(steps=1, output_dir=tmp_path, data_dir=Path("data"), **SHORT)
    assert (config.output_dir, config.data_dir) == (str(tmp_path), "data")
    run = train(config)
    assert json.loads((run / "config.json").read_text())["train"]["output_dir"] == str(tmp_path)
    assert train(TrainConfig(steps=2, output_dir=tmp_path, **SHORT), resume=str(run)) == run
    for path in (run, str(run), str(run / "model.safetensors")):
        assert load_model(path)[2]["dataset"] == "digits"
    assert load_images("digits", tmp_path).train.equal(load_images("digits", str(tmp_path)).train)
    save_grid(torch.zeros(1, 1, 4, 4), str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").exists()


def test_a_signal_that_another_language_handles_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)  # what it answers then
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was set"))
    with command_line.stop_signals() as received:
        assert received == []
