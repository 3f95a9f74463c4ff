"""Training with sparse attention, measured on the built-in world; one record, one row a run.

Pretraining: the last stage of the built-in model, 4,096 tokens, dense and sparse from the weights
of the stage before. Distillation: students of the densely trained result, before
and after. Run it again after an interruption: rows that the record holds are not repeated.

    nabla train builtin --output runs/builtin
    python benchmarks/training_study.py runs/builtin
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from nabla_attn.config import parse
from nabla_attn.evaluation.judging import judge_prompts
from nabla_attn.generation.pipeline import load_pipeline, model_directory
from nabla_attn.generation.request import GenerationRequest, ModelDefaults
from nabla_attn.record import RunRecord, collect_versions, describe_device
from nabla_attn.schedule import Schedule
from nabla_attn.training.builtin import build_pipeline, save_model
from nabla_attn.training.config import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimConfig,
    SparsityConfig,
    TrainConfig,
    WatchConfig,
)
from nabla_attn.training.data import WorldSet
from nabla_attn.training.model import load_parts, save_pipeline
from nabla_attn.training.recipes import builtin
from nabla_attn.training.setup import prepare
from nabla_attn.training.state import whole_weights
from nabla_attn.training.trainer import Trainer

START = "clips-128"
SPARSE = "nabla-0.45"
STUDENTS = ("nabla-0.2", "sta-7-1-1", "nabla-0.1_sta-3-1-1")
SIZE = {"frames": 61, "height": 128, "width": 128}


def configure(options: argparse.Namespace, seed: int, kind: str, algorithm: str) -> TrainConfig:
    """The configuration of one run: "pretrain", "distill" or "lora"."""
    is_pretraining = kind == "pretrain"
    rate = {"pretrain": 3e-4, "distill": 1e-4, "lora": 1e-3}[kind]
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
    """Train from `model`; the validation error before and after, seconds a step, density."""
    run = prepare(config, load_parts(model), data)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(run, Path(folder))
        before = trainer.validate()
        density = run.sparsity.densities()
        trainer.fit()
        after = trainer.validate()
    if result is not None:
        save_pipeline(run.parts, whole_weights(run), result, config.sparsity.algorithm)
    return {
        "before": before,
        "after": after,
        "seconds_per_step": round(trainer.seconds / config.steps, 3),
        "density": round(sum(density) / len(density), 4) if density else 1.0,
    }


def judge(model: Path, algorithm: str, count: int) -> dict[str, float]:
    """Share of right answers on held-out prompts, sparse in every step."""
    if not count:
        return {}
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

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self._path = path
        self._config = {name: getattr(options, name) for name in ("steps", "clips", "validation")}
        self._config |= {"judge": options.judge, "start": START, **SIZE}
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            record = RunRecord.load(path)
            if record.config != self._config:
                raise ValueError(f"{path} was made with other settings. Remove it or rename it.")
            self.rows = record.numbers["rows"]

    def has(self, **key: Any) -> bool:
        """Whether a row is there."""
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, **row: Any) -> None:
        """Keep a row."""
        print(row, flush=True)  # noqa: T201
        self.rows.append(row)
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
    """All runs of one seed."""
    data = WorldSet(load_pipeline("builtin"), clips=options.clips, seed=seed, **SIZE)
    teacher = work / f"dense-{seed}"
    for algorithm in ("dense", SPARSE):
        key = {"run": "pretrain", "algorithm": algorithm, "seed": seed}
        result = teacher if algorithm == "dense" else work / f"sparse-{seed}"
        if not study.has(**key) or not result.exists():
            numbers = train_one(
                configure(options, seed, "pretrain", algorithm), start, data, result
            )
            if not study.has(**key):
                study.add(**key, **numbers, right=judge(result, algorithm, options.judge))
    plans = [("distill", algorithm) for algorithm in STUDENTS] + [("lora", STUDENTS[0])]
    for kind, algorithm in plans:
        key = {"run": kind, "algorithm": algorithm, "seed": seed}
        if study.has(**key):
            continue
        result = work / f"{kind}-{algorithm}-{seed}"
        config = configure(options, seed, kind, algorithm)
        is_lora = kind == "lora"
        numbers = train_one(config, teacher, data, None if is_lora else result)
        right = {} if is_lora else judge(result, algorithm, options.judge)
        zero_shot = {} if is_lora else judge(teacher, algorithm, options.judge)
        study.add(**key, **numbers, right=right, zero_shot_right=zero_shot)


def main() -> None:
    """Run the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of `nabla train builtin`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--validation", type=int, default=16)
    parser.add_argument("--judge", type=int, default=8, help="held-out prompts; 0 is none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "training_study.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")
    study = Study(options.output, options)
    work = options.run / "study"
    start = work / "start"
    if not start.exists():
        config = builtin()
        save_model(build_pipeline(config, options.run, options.run / START), start)
    for seed in range(options.seeds):
        study_seed(study, options, seed, start, work)


if __name__ == "__main__":
    main()
