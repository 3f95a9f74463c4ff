"""Time a training step of the built-in model on long clips, dense and sparse in turn.

nabla train builtin --output runs/builtin
python -m benchmarks.training_study runs/builtin
python -m benchmarks.training_step runs/builtin
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.training_study import SIZE, SPARSE, configure, parse_options
from nabla_attn.bench.measure import Timing
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.moving_shapes.dataset import WorldSet
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.training.model import load_parts
from nabla_attn.training.setup import prepare
from nabla_attn.training.trainer import Trainer

STEPS = 2


def main() -> None:
    """Write one record: the median over the rounds of the seconds of a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of `nabla train builtin`")
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_options(parser, "training_step")
    options.steps, options.validation = STEPS, 1
    data = WorldSet(load_pipeline("builtin"), clips=4, seed=0, **SIZE)
    seconds: dict[str, list[float]] = {name: [] for name in ("dense", *SPARSE)}
    density: dict[str, float] = {}
    for turn in range(options.rounds + 1):
        for name, found in seconds.items():
            # Every round takes the same clips.
            config = configure(options, 0, "pretrain", name)
            run = prepare(config, load_parts(options.run / "study" / "start"), data)
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(run, Path(folder))
                trainer.fit()
            layers = run.sparsity.densities()
            if layers:
                density[name] = round(sum(layers) / len(layers), 4)
            if turn > 0:
                found.append(trainer.seconds / STEPS)
            print(name, round(trainer.seconds / STEPS, 3), flush=True)  # noqa: T201
    settings = {"rounds": options.rounds, "steps": STEPS, "tokens": 4096, **SIZE}
    numbers = {name: Timing(tuple(found)).to_dict() for name, found in seconds.items()}
    RunRecord(
        kind="training_step",
        config=settings,
        seed=0,
        versions=collect_versions(),
        device=describe_device(torch.device("cpu")),
        numbers=numbers | {"density": density},
    ).save(options.output)


if __name__ == "__main__":
    main()
