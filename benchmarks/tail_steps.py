"""At which steps a tail helps a video and at which it harms it, on held-out prompts.

A tail lowers the error of attention's output, yet videos with `_tail-mean` are further from dense
ones than videos without a tail. Here it estimates dropped blocks in some steps only, or the first
step is dense.

    python -m benchmarks.tail_steps; then `python -m benchmarks.pages`

Run it again after an interruption, or with a larger --count: prompts of the record are kept.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.judging import make_video
from benchmarks.tails import earlier
from nabla_attn.evaluation.metrics import measure_ssim
from nabla_attn.generation.pipeline import load_pipeline, model_directory, model_identity
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.moving_shapes.judge import JUDGE, score
from nabla_attn.moving_shapes.scene import describe, held_out_scenes
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.schedule import Schedule

RULE = "topk-0.1"
TAILS = ("mean", "first")
FIRST_SEED = 1000
"""Other noise than that of the study with these prompts."""


def cases(steps: int) -> dict[str, dict[str, Any]]:
    """Name of each case -> its schedule as JSON has it."""
    found: dict[str, dict[str, Any]] = {"no tail": {"algorithm": RULE}}
    found["no tail, first step dense"] = {"algorithm": RULE, "dense_first_steps": 1}
    for tail in TAILS:
        name = f"{RULE}_tail-{tail}"
        found[tail] = {"algorithm": name}
        found[f"{tail}, first step dense"] = {"algorithm": name, "dense_first_steps": 1}
        for start in (1, 2, 4):
            before = {str(step): RULE for step in range(start)}
            found[f"{tail} from step {start} on"] = {"algorithm": name, "step_overrides": before}
        after = {str(step): RULE for step in range(2, steps)}
        found[f"{tail} in steps 0 and 1"] = {"algorithm": name, "step_overrides": after}
    return found


def main() -> None:
    """Measure what the record lacks, prompt by prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="number of prompts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tail_steps.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline, defaults = load_pipeline("builtin"), ModelDefaults.load(model_directory("builtin"))
    sizes = {name: getattr(defaults, name) for name in ("height", "width", "frames", "steps")}
    request = GenerationRequest("", guidance=defaults.guidance, sparse_algo="dense", **sizes)
    schedules = cases(defaults.steps)
    config = sizes | {"guidance": defaults.guidance, "judge": JUDGE, "cases": schedules}
    config |= {"first_seed": FIRST_SEED} | model_identity(pipeline)
    prompts = earlier(options.output, config)
    for index, scene in enumerate(held_out_scenes(options.count)[len(prompts) :], len(prompts)):
        asked = replace(request, prompt=describe(scene), seed=FIRST_SEED + index)
        dense, _ = make_video(pipeline, asked, None)
        rows = {"dense": {"ssim": 1.0, "outline": score(dense, scene)["outline"]}}
        for name, given in schedules.items():
            schedule = Schedule.from_dict(given)
            own = replace(asked, sparse_algo=str(schedule.algorithm), schedule=schedule)
            video, _ = make_video(pipeline, own, None)
            ssim = round(float(np.mean(measure_ssim(video, dense))), 4)
            rows[name] = {"ssim": ssim, "outline": score(video, scene)["outline"]}
        prompts.append({"prompt": asked.prompt, "seed": asked.seed, "rows": rows})
        device = describe_device(pipeline.device)
        numbers = {"results": prompts}
        RunRecord("tail_steps", config, 0, collect_versions(), device, numbers).save(options.output)
        print(f"{index + 1}/{options.count} {asked.prompt}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
