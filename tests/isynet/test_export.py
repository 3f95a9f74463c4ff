"""ONNX files: equal to PyTorch, or none."""

import numpy as np
import pytest
import torch

import isynet

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("text", ["1x5 2x3s,1+ 1x3,3+le2 h64", "1x3d,1 2x5d+ h0"])
def test_files_give_the_logits_of_pytorch_for_any_batch(text, tmp_path):
    net = isynet.create(text, num_classes=7, in_chans=1)
    net(torch.randn(8, 1, 32, 32))
    done = isynet.export(net, tmp_path / "a.onnx", size=(32, 24))
    assert done.error < 1e-5 and done.size == (32, 24) and net.training
    session = onnxruntime.InferenceSession(str(done.path))
    images = torch.randn(5, 1, 32, 24)
    found = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, net.eval()(images).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("isynet.onnx_file.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="differs from PyTorch"):
        isynet.export(isynet.create("1x3 h0", 3), tmp_path / "a.onnx", size=16)
    assert not list(tmp_path.iterdir())
