"""What `benchmark.py` times of torchdiffeq and ncps does the work of our cell."""

from unittest import mock

import pytest
import torch

from lab.benchmark import peers
from lab.benchmark.convolutions import convolutions
from models import build_model


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
