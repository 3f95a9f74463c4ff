"""Choose the prompt of `make demo`: not the best one, but the median of 32 by SSIM to dense.

Of an even number two are in the middle: the one is taken whose outline, with dense attention, is
closer to the median outline of all. Prompts are of combinations that training shows. Run it again
after an interruption, or with a larger --count: videos in the folder are not made again.

    python -m benchmarks.choose_demo runs/judged
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.judging import make_video, trained_scenes
from nabla_attn.evaluation.metrics import measure_ssim
from nabla_attn.generation.pipeline import load_pipeline, model_directory, model_identity
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.moving_shapes.judge import score
from nabla_attn.moving_shapes.scene import describe
from nabla_attn.record import RunRecord, collect_versions, describe_device

ALGORITHM = "topk-0.07_sta-17-1-1_tail-first"
"""The first algorithm that the demo compares with dense attention."""


def main() -> None:
    """Make what is missing, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", type=Path, help="folder of frames, as of judge_builtin --videos")
    parser.add_argument("--count", type=int, default=32, help="number of prompts")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo_choice.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    defaults = ModelDefaults.load(model_directory("builtin"))
    sizes = {name: getattr(defaults, name) for name in ("height", "width", "frames", "steps")}
    request = GenerationRequest("", guidance=defaults.guidance, **sizes)
    pipeline = load_pipeline("builtin")
    prompts: list[dict[str, Any]] = []
    for seed, scene in enumerate(trained_scenes(options.count)):
        asked = replace(request, prompt=describe(scene), seed=seed)
        dense, sparse = (
            make_video(pipeline, asked.with_algo(algo), options.videos / "trained" / algo)[0]
            for algo in ("dense", ALGORITHM)
        )
        ssim = round(float(np.mean(measure_ssim(sparse, dense))), 4)
        looks = {"ssim": ssim, "outline": score(dense, scene)["outline"]}
        prompts.append({"prompt": describe(scene), "seed": seed} | looks)
        print(prompts[-1], flush=True)  # noqa: T201
    chosen = choose(prompts)
    config = sizes | {"guidance": defaults.guidance, "sparse_algo": ALGORITHM}
    config |= model_identity(pipeline)
    numbers = {"count": len(prompts), "chosen": chosen, "prompts": prompts}
    device = describe_device(pipeline.device)
    RunRecord("demo choice", config, 0, collect_versions(), device, numbers).save(options.output)
    print("median:", chosen)  # noqa: T201


def choose(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The median by SSIM; of two in the middle the one with the more usual outline."""
    ranked = sorted(prompts, key=lambda entry: entry["ssim"])
    usual = statistics.median(entry["outline"] for entry in prompts)
    middle = ranked[(len(ranked) - 1) // 2 : len(ranked) // 2 + 1]
    return min(middle, key=lambda entry: abs(entry["outline"] - usual))


if __name__ == "__main__":
    main()
