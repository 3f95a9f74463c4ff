"""Choose the prompt of `make demo`: not the best one, but the median of 32 by SSIM to dense.

Prompts are of combinations that training shows. Run it again after an interruption, or with a
larger --count: videos in the folder are not made again.

    python -m benchmarks.choose_demo runs/judged
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.judging import make_video, trained_scenes
from nabla_attn.evaluation.metrics import measure_ssim
from nabla_attn.generation.pipeline import load_pipeline, model_directory, model_identity
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.moving_shapes.scene import describe
from nabla_attn.record import RunRecord, collect_versions, describe_device

ALGORITHM = "topk-0.25_tail-first"
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
        prompts.append({"prompt": describe(scene), "seed": seed, "ssim": ssim})
        print(prompts[-1], flush=True)  # noqa: T201
    ranked = sorted(prompts, key=lambda entry: entry["ssim"])
    chosen = ranked[(len(ranked) - 1) // 2]
    config = sizes | {"guidance": defaults.guidance, "sparse_algo": ALGORITHM}
    config |= model_identity(pipeline)
    numbers = {"count": len(prompts), "chosen": chosen, "prompts": prompts}
    device = describe_device(pipeline.device)
    RunRecord("demo choice", config, 0, collect_versions(), device, numbers).save(options.output)
    print("median:", chosen)  # noqa: T201


if __name__ == "__main__":
    main()
