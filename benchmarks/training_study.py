"""Measure training with sparse attention on the built-in world; each run is a row of one record.

Pretraining: long clips, 4,096 tokens, dense and sparse, from the built-in model's weights after its
short ones. Distillation: students of the densely trained result, before
and after. Run it again after an interruption: what the record holds is not repeated.

    nabla train builtin --output runs/builtin
    python -m benchmarks.training_study runs/builtin
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.judging import judge_prompts
from nabla_attn.config import parse
from nabla_attn.generation.pipeline import load_pipeline, model_directory
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.moving_shapes.dataset import WorldSet
from nabla_attn.moving_shapes.recipe import builtin
from nabla_attn.moving_shapes.train import build_pipeline, save_model
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.schedule import Schedule
from nabla_attn.training.config import TrainConfig
from nabla_attn.training.model import load_parts, save_pipeline
from nabla_attn.training.sections import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimConfig,
    SparsityConfig,
    WatchConfig,
)
from nabla_attn.training.setup import prepare
from nabla_attn.training.state import whole_weights
from nabla_attn.training.trainer import Trainer

START = "clips-128"
SPARSE = ("nabla-0.45", "nabla-0.4_sta-3-1-1")
STUDENTS = ("nabla-0.2", "sta-7-1-1", "nabla-0.1_sta-3-1-1")
SIZE: dict[str, Any] = {"frames": 61, "height": 128, "width": 128}


def configure(options: argparse.Namespace, seed: int, kind: str, algorithm: str) -> TrainConfig:
    """Return the configuration of one run: "pretrain", "distill" or "lora"."""
    is_pretraining = kind == "pretrain"
    rate = {"pretrain": 3e-4, "distill": 1e-4, "lora": 3e-3}[kind]
    return TrainConfig(
        recipe="pretrain" if is_pretraining else "distill",
        data=DataConfig(folder="world", validation=options.validation, **SIZE),
        objective=ObjectiveConfig(kind="flow" if is_pretraining else "distill", shift=4.0),
        sparsity=SparsityConfig(algorithm=algorithm),
        optim=OptimConfig(lr=rate, max_norm=1.0, warmup=5, decay="linear", final=0.1),
        lora=LoraConfig(rank=16 if kind == "lora" else 0),
        steps=options.steps,
        precision="bfloat16",
        checkpoint=CheckpointConfig(every=10**6, best=False),
        watch=WatchConfig(validate=10**6, sample=10**6, tensorboard=False),
        seed=seed,
    )


def train_one(
    config: TrainConfig, model: Path, data: Any, result: Path | None = None
) -> dict[str, Any]:
    """Train from `model`; returns the validation error before and after, and the density."""
    run = prepare(config, load_parts(model), data)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(run, Path(folder))
        before = trainer.validate()
        density = run.sparsity.densities()
        trainer.fit()
        after = trainer.validate()
    if result is not None:
        save_pipeline(run.parts, whole_weights(run), result, run.sparsity.asked)
    return {
        "before": before,
        "after": after,
        "density": round(sum(density) / len(density), 4) if density else 1.0,
    }


def judge(model: Path, algorithm: str, count: int) -> dict[str, float]:
    """Return the share of right answers on held-out prompts, sparse in every step."""
    defaults = ModelDefaults.load(model_directory("builtin"))
    config = parse(algorithm)
    request = GenerationRequest(
        "",
        **SIZE,
        steps=defaults.steps,
        guidance=defaults.guidance,
        sparse_algo=str(config),
        schedule=None if config.is_dense else Schedule(algorithm=config),
    )
    return judge_prompts(load_pipeline(str(model)), request, count).numbers["summary"]["right"]


class Study:
    """The record, written after every row."""

    def __init__(self, path: Path, options: argparse.Namespace, start: str = START) -> None:
        self._path = path
        self._config = {name: getattr(options, name) for name in ("steps", "clips", "validation")}
        self._config |= {"start": start, **SIZE}
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            record = RunRecord.load(path)
            if record.config != self._config:
                raise ValueError(f"{path} was made with other settings. Remove it or rename it.")
            self.rows = record.numbers["rows"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the first row with these values."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def has(self, **key: Any) -> bool:
        """Return whether a row exists."""
        return self.find(**key) is not None

    def add(self, **row: Any) -> None:
        """Add a row, and write the record."""
        self.rows.append(row)
        self.save(row)

    def save(self, row: dict[str, Any]) -> None:
        """Write the record, and print its new row."""
        print(row, flush=True)  # noqa: T201
        RunRecord(
            kind="training_study",
            config=self._config,
            seed=0,
            versions=collect_versions(),
            device=describe_device(torch.device("cpu")),
            numbers={"rows": self.rows},
        ).save(self._path)


def study_seed(
    study: Study, options: argparse.Namespace, seed: int, start: Path, work: Path
) -> None:
    """Make all runs of one seed."""
    data = WorldSet(load_pipeline("builtin"), clips=options.clips, seed=seed, **SIZE)
    for algorithm in ("dense", *SPARSE):
        key = {"run": "pretrain", "algorithm": algorithm, "seed": seed}
        result = result_of(key, work)
        if not study.has(**key) or not result.exists():
            numbers = train_one(
                configure(options, seed, "pretrain", algorithm), start, data, result
            )
            if not study.has(**key):
                study.add(**key, **numbers)
    plans = [("distill", algorithm) for algorithm in STUDENTS] + [("lora", STUDENTS[0])]
    for kind, algorithm in plans:
        key = {"run": kind, "algorithm": algorithm, "seed": seed}
        if study.has(**key):
            continue
        config = configure(options, seed, kind, algorithm)
        student = None if kind == "lora" else result_of(key, work)
        study.add(**key, **train_one(config, teacher_of(seed, work), data, student))


def result_of(row: dict[str, Any], work: Path) -> Path:
    """Return the folder of the trained pipeline of a row."""
    return work / f"{row['run']}-{row['algorithm']}-{row['seed']}"


def teacher_of(seed: int, work: Path) -> Path:
    """Return the folder of the densely trained pipeline of a seed."""
    return result_of({"run": "pretrain", "algorithm": "dense", "seed": seed}, work)


def judge_rows(study: Study, count: int, work: Path) -> None:
    """Judge the trained models, and students before their training."""
    for row in study.rows:
        if row["run"] == "lora" or row.get("judged") == count:
            continue
        teacher = teacher_of(row["seed"], work)
        if row["run"] == "distill":
            row["zero_shot_right"] = judge(teacher, row["algorithm"], count)
        row["right"] = judge(result_of(row, work), row["algorithm"], count)
        row["judged"] = count
        study.save(row)


def parse_options(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Parse the options of a script, with those that all scripts have, and set the threads."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / f"{name}.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")
    return options


def main() -> None:
    """Run the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of `nabla train builtin`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--validation", type=int, default=8)
    parser.add_argument("--judge", type=int, default=0, help="held-out prompts; 0 judges nothing")
    options = parse_options(parser, "training_study")
    study = Study(options.output, options)
    work = options.run / "study"
    start = work / "start"
    if not start.exists():
        config = builtin()
        save_model(build_pipeline(config, options.run, options.run / START), start)
    for seed in range(options.seeds):
        study_seed(study, options, seed, start, work)
    if options.judge:
        judge_rows(study, options.judge, work)


if __name__ == "__main__":
    main()
