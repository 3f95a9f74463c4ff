import json
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from nabla_attn.evaluation.metrics import measure_fidelity


def flat(value, frames=2, height=16, width=13):
    return np.full((frames, height, width, 3), value, np.uint8)


def test_psnr_of_a_constant_error():
    result = measure_fidelity(flat(100), flat(105))
    assert result.psnr == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
    assert result.psnr_frames == pytest.approx([result.psnr] * 2)


def test_ssim_of_constants_by_hand():
    # Without variance only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1).
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 140 + c1) / (100**2 + 140**2 + c1)
    result = measure_fidelity(flat(100), flat(140))
    assert result.ssim == pytest.approx(expected, abs=1e-9)


def test_ssim_of_a_checkerboard_and_its_inverse_by_hand():
    rows, columns = np.indices((24, 24))
    board = np.where((rows + columns) % 2, 255, 0).astype(np.uint8)[None, ..., None]
    board = np.repeat(board, 3, axis=-1)
    kernel = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    patch = board[0, :11, :11, 0].astype(float)
    mean, inverse = (kernel * patch).sum(), (kernel * (255 - patch)).sum()
    variance = (kernel * patch**2).sum() - mean**2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mean * inverse + c1) / (mean**2 + inverse**2 + c1)
    expected *= (-2 * variance + c2) / (2 * variance + c2)
    result = measure_fidelity(board, 255 - board)
    assert result.ssim == pytest.approx(expected, abs=1e-6)
    assert result.ssim < -0.9


@pytest.mark.parametrize("level", [20, 128, 235])
def test_ssim_is_that_of_torchmetrics(level):
    rng = np.random.default_rng(0)
    frames = [
        np.clip(level + rng.normal(0, 12, (2, 32, 24, 3)), 0, 255).astype(np.uint8)
        for _ in range(2)
    ]
    exact = [
        structural_similarity_index_measure(
            *(torch.from_numpy(x[i : i + 1]).permute(0, 3, 1, 2).double() for x in frames),
            data_range=255.0,
        ).item()
        for i in range(2)
    ]
    assert measure_fidelity(*frames).ssim_frames == pytest.approx(exact, abs=1e-9)


def test_identical_videos():
    result = measure_fidelity(flat(9), flat(9))
    assert result.psnr == math.inf
    assert result.ssim == pytest.approx(1)
    assert result.to_dict()["psnr"] is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_one_identical_frame_does_not_make_the_video_infinite():
    other = flat(100)
    other[1] += 10
    result = measure_fidelity(other, flat(100))
    assert result.psnr_frames[0] == math.inf
    assert result.psnr == pytest.approx(10 * math.log10(255**2 / 50), abs=1e-4)
    assert result.to_dict()["psnr_frames"][0] is None


def test_no_wrap_around_of_uint8():
    result = measure_fidelity(flat(0), flat(255))
    assert result.psnr == pytest.approx(0, abs=1e-4)


def test_shapes_must_match():
    with pytest.raises(ValueError, match="one shape"):
        measure_fidelity(flat(0, frames=2), flat(0, frames=3))
    with pytest.raises(ValueError, match="11x11"):
        measure_fidelity(flat(0, height=8), flat(0, height=8))
    with pytest.raises(ValueError, match="uint8"):
        measure_fidelity(flat(0) / 255, flat(0))
