"""Judge the built-in model on prompts with each algorithm; writes one record each.

Prompts are held-out combinations, or with --trained such as training showed, with other noise.

Run it again after an interruption: prompts that a record already holds are not repeated.

    python -m benchmarks.judge_builtin dense topk-0.07_sta-17-1-1_tail-first

With adapters, and what these ask for besides (their guidance):

    python -m benchmarks.judge_builtin topk-0.05_tail-first --lora builtin

A student of `distill_builtin.py` is judged in a folder of its own, so that no record of the shipped
model is in the way; `judge_distilled_ALGORITHM.json` is such a record, of the first judge:

    python -m benchmarks.judge_builtin nabla-0.4_block-1-16-16 --output runs/judged \\
        --model runs/students/distill-nabla-0.4_block-1-16-16-0
"""

import argparse
from pathlib import Path

import torch

from benchmarks.judging import judge_prompts
from nabla_attn.config import parse
from nabla_attn.generation.pipeline import load_pipeline, model_directory
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.moving_shapes.judge import JUDGE
from nabla_attn.schedule import Schedule


def main() -> None:
    """Judge one algorithm after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithms", nargs="+")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--lora", action="append", default=[], help="as of `nabla generate`")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--trained", action="store_true", help="combinations that training showed")
    parser.add_argument("--videos", type=Path, help="folder where frames are kept to judge again")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    defaults = ModelDefaults.load(model_directory(options.model), options.lora)
    pipeline = load_pipeline(options.model, lora=options.lora)
    for algorithm in options.algorithms:
        config = parse(algorithm)
        request = GenerationRequest(
            "",
            height=defaults.height,
            width=defaults.width,
            frames=defaults.frames,
            steps=defaults.steps,
            guidance=defaults.guidance,
            sparse_algo=str(config),
            # Sparse from the first step: a window's default schedule starts with 12 dense steps,
            # more than this model takes in all.
            schedule=None if config.is_dense else Schedule(algorithm=config),
        )
        which, label = "trained" if options.trained else "held-out", str(config)
        label = f"lora_{label}" if options.lora else label
        record = judge_prompts(
            pipeline,
            request,
            options.count,
            captions=which,
            videos=options.videos and options.videos / which / label,
            path=options.output / f"judge-{JUDGE}_{which}_{label}.json",
            report=_show(algorithm),
        )
        print(algorithm, record.numbers["summary"])  # noqa: T201


def _show(algorithm: str):
    return lambda done, total: print(f"{algorithm} {done}/{total}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
