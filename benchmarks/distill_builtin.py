"""Distil the shipped model for sparse attention: errors and judged videos, before and after.

In the form of the paper's Table 2 (arXiv:2507.13546), on the built-in world. Run it again after an
interruption: rows that the record holds are not repeated.

    python -m benchmarks.distill_builtin runs/distill_builtin
"""

import argparse
from pathlib import Path

from benchmarks.training_study import (
    SIZE,
    STUDENTS,
    Study,
    configure,
    judge,
    parse_options,
    result_of,
    train_one,
)
from nabla_attn.generation.pipeline import load_pipeline, model_directory
from nabla_attn.moving_shapes.dataset import WorldSet


def main() -> None:
    """Train and judge every student; each is a row of the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder of the students")
    parser.add_argument("--students", nargs="+", default=STUDENTS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clips", type=int, default=72)
    parser.add_argument("--validation", type=int, default=8)
    parser.add_argument("--judge", type=int, default=16, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    options = parse_options(parser, "distill_builtin")
    study, teacher = Study(options.output, options, start="builtin"), model_directory("builtin")
    data = WorldSet(load_pipeline("builtin"), clips=options.clips, seed=options.seed, **SIZE)
    if not study.has(algorithm="dense"):
        right = judge(teacher, "dense", options.judge)
        study.add(run="teacher", algorithm="dense", seed=options.seed, density=1.0, right=right)
    for algorithm in options.students:
        key = {"run": "distill", "algorithm": algorithm, "seed": options.seed}
        if study.has(**key):
            continue
        result = result_of(key, options.work)
        numbers = train_one(
            configure(options, options.seed, "distill", algorithm), teacher, data, result
        )
        # Without training there is no seed.
        known = study.find(algorithm=algorithm, judged=options.judge)
        zero_shot = known["zero_shot_right"] if known else judge(teacher, algorithm, options.judge)
        right = judge(result, algorithm, options.judge)
        study.add(**key, **numbers, zero_shot_right=zero_shot, right=right, judged=options.judge)


if __name__ == "__main__":
    main()
