"""Recorded maps with known contents, for the tests of the viewer."""

import numpy as np
import torch

from nabla_attn.generation.map_file import RecordedMaps, Selection
from nabla_attn.record import RunRecord


def make_maps(
    blocks=(5, 3, 4), grid=(5, 22, 29), counts=(20, 8, 4), has_scores=True, seed=0, block=(1, 8, 8)
):
    """Random maps: some rows nearly empty, some full."""
    rng = np.random.default_rng(seed)
    selection = Selection((0, 10, 19), (0, 3, 7), tuple(range(counts[2])), has_scores)
    count = int(np.prod(blocks))
    shape = (3, 3, counts[2], count)
    probs = rng.dirichlet(np.full(count, 0.3), size=shape)
    kept = probs > 1.5 / count
    kept |= probs == probs.max(axis=-1, keepdims=True)
    scores = np.rint((np.log2(np.maximum(probs, 2.0**-24)) / 24 + 1) * 255).astype(np.uint8)
    step = np.linspace(0.9, 0.2, counts[0])[:, None, None]
    density = torch.tensor(step * rng.uniform(0.5, 1, counts)).float()
    return RecordedMaps(
        algorithm="nabla-0.7",
        blocks=blocks,
        block=block,
        grid=grid,
        selection=selection,
        masks=torch.from_numpy(np.packbits(kept, axis=-1)),
        scores=torch.from_numpy(scores if has_scores else np.zeros(0, np.uint8)),
        density=density,
        true_mass=density**0.3,
        best_mass=density**0.2,
    )


def make_frames(count=17, height=176, width=232):
    """A video of the moving-shapes world."""
    from nabla_attn.moving_shapes import render, sample_scene

    return render(sample_scene(3, 3), count, height, width)


def make_record(prompt="a small red circle moving right"):
    """The record of such a run."""
    config = {"prompt": prompt, "frames": 17, "width": 232, "height": 176, "steps": 20}
    return RunRecord(
        "generate", config | {"model": "builtin"}, 3, {}, "a processor (1 thread)",
        {"seconds": {"transformer": 12.3}},
    )  # fmt: skip
