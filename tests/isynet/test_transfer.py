"""Weights made for one data set, fine-tuned on a small set of grey images."""

import gzip
import struct

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import isynet
from isynet.cli import app
from isynet.data.catalogue import open_source


def test_digits_are_whole_and_never_mirrored():
    pytest.importorskip("sklearn")
    train, test = (open_source("digits", split, 32) for split in ("train", "test"))
    assert (len(train), len(test), train.classes[7]) == (1438, 359, "7")
    generator = torch.Generator().manual_seed(0)
    first, labels = train.draw(torch.arange(200), generator)
    again, _ = train.draw(torch.arange(200), generator)
    assert first.shape == (200, 1, 32, 32)
    assert torch.equal(first, again)
    # Each of the 8 pixels is a square of 4.
    assert torch.equal(first[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), first)
    assert first.max() == 1
    assert labels.unique().tolist() == list(range(10))
    with pytest.raises(ValueError, match="a size of at least 8 is needed, got 7"):
        open_source("digits", "train", 7)


def idx_folder(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (8, 12, 12), np.uint8)
        head = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(head + images.tobytes())
        labels = bytes(range(8))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, 8) + labels
        )
    return folder


@pytest.mark.parametrize("data", ["digits", "idx"])
def test_colour_weights_are_fine_tuned_on_grey_images(tmp_path, data):
    if data == "digits":
        pytest.importorskip("sklearn")
    else:
        data = str(idx_folder(tmp_path / "idx"))
    weights = tmp_path / "colour.safetensors"
    net = isynet.create("1x3 1x3 h0", num_classes=4)
    isynet.save(net, weights)
    options = [f"--from={weights}", f"--data={data}", "--size=16", "--steps=1", "--batch=4"]
    options += ["--learning-rate=1e-9", "--augment=0", f"--output={tmp_path / 'out'}"]
    result = CliRunner().invoke(app, ["train", *options])
    assert result.exit_code == 0, result.output
    tuned = isynet.create(tmp_path / "out/weights.safetensors")
    assert (tuned.in_chans, tuned.num_classes) == (3, 10 if data == "digits" else 8)
    first, second = next(net.parameters()), next(tuned.parameters())
    assert torch.allclose(first, second, atol=1e-6)


def test_from_takes_weights_only():
    result = CliRunner().invoke(app, ["train", "--from=isynet-n0", "--data=digits"])
    assert result.exit_code == 2
    assert "--from takes a .safetensors file, got isynet-n0" in result.output
