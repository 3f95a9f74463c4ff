"""What limits the outlines of the built-in model: its VAE, the length of a clip, steps, captions.

Outlines are measured by the judge. The VAE row encodes and decodes true clips; the others are
generated with dense attention, in lengths from one frame on, for combinations that training shows
and for held-out ones. Run it again after an interruption: rows that the record holds are kept.

    python -m benchmarks.outline_limits --count 4 --videos runs/judged
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.judging import SCENES, make_video
from nabla_attn.evaluation.metrics import measure_fidelity
from nabla_attn.generation.pipeline import load_pipeline, model_directory, model_identity
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.moving_shapes.judge import JUDGE, score
from nabla_attn.moving_shapes.scene import Scene, describe, render
from nabla_attn.record import RunRecord, check_settings, collect_versions, describe_device

IMAGE_SHIFT = 20.0
"""Shift of the noise levels that the model learnt single frames with."""

CASES = (
    *(("VAE alone", "held-out", frames, 0) for frames in (1, 33)),
    *(
        (f"generated, {frames} frame{'s' * (frames > 1)}", which, frames, steps)
        for frames in (1, 33)
        for steps in (1, 2, 4)
        for which in ("trained", "held-out")
    ),
)
"""What is measured: name, captions, frames and steps; in the order of their cost."""


def main() -> None:
    """Measure what the record lacks, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=4, help="number of scenes of a row")
    parser.add_argument("--max-frames", type=int, default=33, help="longer rows are left out")
    parser.add_argument("--steps", type=int, nargs="+", help="of the rows; 0 is the VAE alone")
    parser.add_argument("--videos", type=Path, help="folder of frames, as of judge_builtin")
    record = Path("benchmarks/results/outline_limits.json")
    parser.add_argument("--output", type=Path, default=record)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline, defaults = load_pipeline("builtin"), ModelDefaults.load(model_directory("builtin"))
    config = {"workload": "outlines", "height": defaults.height, "width": defaults.width}
    config |= {"guidance": defaults.guidance, "judge": JUDGE} | model_identity(pipeline)
    known = (
        check_settings(options.output, config).numbers["rows"] if options.output.exists() else []
    )
    rows: list[dict[str, Any]] = list(known)
    for name, which, frames, steps in CASES:
        key = {"name": name, "captions": which, "frames": frames, "steps": steps}
        is_asked = frames <= options.max_frames and steps in (options.steps or (steps,))
        if not is_asked or any(key.items() <= row.items() for row in rows):
            continue
        scenes = SCENES[which](options.count)
        request = GenerationRequest(
            "",
            height=defaults.height,
            width=defaults.width,
            frames=frames,
            steps=steps or 1,
            guidance=defaults.guidance,
        )
        videos = options.videos and options.videos / which / "dense"
        keep = videos if (frames, steps) == (defaults.frames, defaults.steps) else None
        looks = [
            measure(pipeline, scene, replace(request, seed=seed), steps, keep)
            for seed, scene in enumerate(scenes)
        ]
        names = looks[0].keys()
        means = {name: round(statistics.fmean(look[name] for look in looks), 4) for name in names}
        rows.append(key | {"count": len(looks)} | means)
        numbers = {"rows": rows}
        device = describe_device(pipeline.device)
        RunRecord("outline limits", config, 0, collect_versions(), device, numbers).save(
            options.output
        )
        print(rows[-1], flush=True)  # noqa: T201


def measure(
    pipeline: Any, scene: Scene, request: GenerationRequest, steps: int, videos: Path | None
) -> dict[str, float]:
    """Outline, worst frame, right or wrong shape; of the VAE alone the PSNR to the truth too."""
    if steps:
        asked = replace(request, prompt=describe(scene))
        own = pipeline.scheduler
        if request.frames == 1:
            pipeline.scheduler = type(own).from_config(own.config, flow_shift=IMAGE_SHIFT)
        video, _ = make_video(pipeline, asked, videos)
        pipeline.scheduler = own
        found: dict[str, float] = {}
    else:
        true = render(scene, request.frames, request.height, request.width)
        video = through_vae(pipeline.vae, true)
        psnr = measure_fidelity(video, true).psnr
        assert psnr is not None, "the VAE loses something"
        found = {"psnr": psnr}
    right = score(video, scene)
    return {
        "outline": right["outline"],
        "outline_min": right["outline_min"],
        "shape": float(right["shape"]),
        **found,
    }


@torch.no_grad()
def through_vae(vae: Any, video: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A video encoded and decoded again: uint8 [frames, height, width, 3]."""
    x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    decoded = vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample[0]
    pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).numpy()


if __name__ == "__main__":
    main()
