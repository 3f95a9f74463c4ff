"""The loop of `nabla train`: steps, validation, checkpoints, and what happens when they fail."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import torch

from nabla_attn.distributed import stop_signals
from nabla_attn.training.checkpoint import Checkpoints, SaveFailed, read_state, verify
from nabla_attn.training.config import differences, to_plain
from nabla_attn.training.loader import to_device
from nabla_attn.training.metrics import MetricsLogger, StepMetrics
from nabla_attn.training.setup import TrainRun
from nabla_attn.training.state import collect, restore, whole_tensor

# (steps done, the transformer with the weights that would be saved) -> numbers for the log.
Sample = Callable[[int, Any], dict[str, float]]
OnLog = Callable[[StepMetrics], None]
# Entries of every checkpoint's state.
_NEEDED = ("config", "processes", "skipped", "seconds", "best", "feed")


def rate_share(
    step: int, steps: int, *, warmup: int, start: float, final: float, decay: str = "linear"
) -> float:
    """Learning rate of a step, counted from 0, as a share of the full one.

    Args:
        step: Number of steps before it.
        steps: Number of steps in all.
        warmup: Number of steps of linear warm-up.
        start: Share of the steps after which the decay begins.
        final: Share of the learning rate that is left at the end.
        decay: "constant", "linear" or "cosine".
    """
    warm = min(1.0, (step + 1) / max(warmup, 1))
    done = step / max(steps, 1)
    past = (done - start) / (1 - start) if done > start else 0.0
    left = {
        "constant": 1.0,
        "linear": 1 - past,
        "cosine": (1 + math.cos(math.pi * past)) / 2,
    }[decay]
    return warm * (final + (1 - final) * left)


class Trainer:
    """Trains a run from its last checkpoint, or from the start.

    Args:
        run: The run, as `prepare` builds it.
        folder: The run folder, with `checkpoints` and `log.csv`.
        on_log: Called with the metrics of every logged step, on the first process.
        sample: Function that generates samples, called every `watch.sample` steps on the first
            process.
    """

    def __init__(
        self,
        run: TrainRun,
        folder: Path,
        *,
        on_log: OnLog = lambda metrics: None,
        sample: Sample | None = None,
    ) -> None:
        self.run, self.folder, self.on_log, self.sample = run, folder, on_log, sample
        self.config = run.config
        policy = self.config.checkpoint
        self.checkpoints = Checkpoints(folder / "checkpoints", policy.keep, policy.best)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.best = float("inf")
        self.measured: float | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return bool(self.run.accelerator.is_main_process)

    def resume(self, *, allow_changes: bool = False) -> int:
        """Continue from the last checkpoint, if there is one.

        Args:
            allow_changes: Whether the configuration or number of processes may have changed.

        Returns:
            The number of steps that are done.

        Raises:
            ValueError: Something changed, all of it named; or the checkpoint is damaged.
        """
        path = self.checkpoints.latest()
        if path is None:
            return 0
        state = self._verified(path)
        if state["step"] > self.config.steps:
            raise ValueError(
                f"{path} is past the end: steps={self.config.steps}. Raise steps, or choose "
                "another --output."
            )
        changes = differences(
            state["config"] | {"processes": state["processes"]},
            to_plain(self.config) | {"processes": self.run.accelerator.num_processes},
        )
        if changes and not allow_changes:
            raise ValueError(
                f"{path} was trained differently: {'; '.join(changes)}. Pass --allow-changes to "
                "continue with the new values, or choose another --output."
            )
        restore(self.run, path)
        if not changes or state["feed"].keys() == self.run.loader.state_dict().keys():
            self._restore_loader(state["feed"], bool(changes))
        self.step, self.skipped = state["step"], state["skipped"]
        # Checkpoints of older versions do not have it.
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.seconds = state["seconds"]
        self.best = float("inf") if state["best"] is None else state["best"]
        return self.step

    def fit(self) -> None:
        """Train to the last step; a checkpoint is there at the end.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the checkpoint is saved first.
            ValueError: Too many steps in a row had no finite loss.
            SaveFailed: The last checkpoint could not be written.
        """
        logger = None
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            logger = MetricsLogger(self.folder, self.step, self.config.watch.tensorboard)
        try:
            with stop_signals() as stop:
                while self.step < self.config.steps:
                    self._advance(logger)
                    if self._is_stopped(stop):
                        self._save(is_last=True)
                        raise KeyboardInterrupt
                self._save(is_last=True)
        finally:
            if logger:
                logger.close()

    def validate(self) -> float:
        """Mean objective over the held-out clips, with fixed noise and the averaged weights."""
        run = self.run
        run.sparsity.set_target()
        run.module.eval()
        # Not through DDP's wrapper: nothing is synchronised without gradients.
        module = run.module if self.config.sharding == "fsdp" else run.bare
        totals = torch.zeros(2, device=run.accelerator.device, dtype=torch.float64)
        with torch.no_grad(), run.averaged(), run.accelerator.autocast():
            for batch, generator, weight in run.loader.validation():
                loss = run.objective(module, to_device(batch, run.accelerator.device), generator)[
                    "loss"
                ]
                totals += torch.tensor([float(loss) * weight, weight]).to(totals)
        run.module.train()
        total, count = run.accelerator.reduce(totals).tolist()
        return float(total / count)

    def _advance(self, logger: MetricsLogger | None) -> None:
        """One step with everything that follows it."""
        started = time.perf_counter()
        numbers = self._optimise()
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        numbers["tokens_per_second"] = numbers.pop("tokens") / seconds
        layers = self.run.sparsity.densities() if self._is_due(self.config.watch.log) else []
        if layers:
            numbers["density"] = sum(layers) / len(layers)
        self.measured = None
        if self._is_due(self.config.watch.validate) and self.run.loader.held_out:
            self.measured = numbers["validation"] = self.validate()
        is_best = self.measured is not None and self.measured < self.best
        if self.measured is not None:
            self.best = min(self.best, self.measured)
        if self.is_main and self.sample and self._is_due(self.config.watch.sample):
            numbers |= self._take_sample(self.sample)
        numbers |= {"seconds": self.seconds, "skipped": float(self.skipped)}
        if self._is_due(self.config.watch.log) or "validation" in numbers:
            self._log(logger, StepMetrics(self.step, self.config.steps, numbers, layers))
        is_saved = self._is_due(self.config.checkpoint.every)
        if self.step < self.config.steps and (
            is_saved or (is_best and self.config.checkpoint.best)
        ):
            self._save()

    def _optimise(self) -> dict[str, float]:
        """One optimiser step; a step whose loss is not finite changes nothing."""
        run, config = self.run, self.config
        run.sparsity.set_step(self.step)
        run.module.train()
        optim = config.optim
        rate = optim.lr * rate_share(
            self.step,
            config.steps,
            warmup=optim.warmup,
            start=optim.warmup / config.steps,
            final=optim.final,
            decay=optim.decay,
        )
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, torch.Tensor] = {}
        tokens = 0
        for turn, (batch, generator) in enumerate(run.loader.step(self.step)):
            batch = to_device(batch, run.accelerator.device)
            tokens += len(batch["latents"]) * run.tokens(batch["latents"].shape[1:])
            is_last = turn == config.accumulation - 1
            with nullcontext() if is_last else run.accelerator.no_sync(run.module):
                with run.accelerator.autocast():
                    terms = run.objective(run.module, batch, generator)
                # Processes of one sequence hold parts of its gradient; DDP takes their mean.
                scale = config.context_parallel / config.accumulation
                run.accelerator.backward(terms["loss"] * scale)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / config.accumulation
        limit = config.optim.max_norm or float("inf")
        norm = whole_tensor(run.accelerator.clip_grad_norm_(run.trained(), limit))
        names = list(sums)
        means = run.accelerator.reduce(torch.stack([sums[name] for name in names]), "mean")
        numbers = dict(zip(names, means.tolist(), strict=True))
        numbers |= {"lr": rate, "norm": float(norm)}
        self._update(math.isfinite(numbers["loss"]) and math.isfinite(numbers["norm"]))
        replicas = run.loader.replicas
        return numbers | {"tokens": float(tokens * replicas)}

    def _update(self, is_finite: bool) -> None:
        run = self.run
        if is_finite:
            run.optimizer.step()
            if run.average is not None:
                run.average.step(run.trained())
        run.optimizer.zero_grad(set_to_none=True)
        self.skipped += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.max_skipped:
            last = self.checkpoints.latest()
            raise ValueError(
                f"no finite loss in {self.skipped_in_a_row} steps in a row, up to step "
                f"{self.step + 1}: stopped. The last checkpoint is {last or 'not there'}. Lower "
                "optim.lr or check the data."
            )

    def _save(self, *, is_last: bool = False) -> None:
        """Save a checkpoint; a failure only warns unless it is the last one."""
        write = collect(self.run)
        if not self.is_main:
            return
        state = {
            "config": to_plain(self.config),
            "processes": self.run.accelerator.num_processes,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds,
            "validation": self.measured,
            "best": self.best if math.isfinite(self.best) else None,
            "feed": self.run.loader.state_dict(),
        }
        try:
            self.checkpoints.save(self.step, state, write)
        except SaveFailed as error:
            if is_last:
                raise
            warnings.warn(f"{error} Training continues.", stacklevel=2)

    def _verified(self, path: Path) -> dict[str, Any]:
        """The state of a checkpoint whose files are whole; offers the one before where not."""
        try:
            state = read_state(path)
            if missing := [name for name in _NEEDED if name not in state]:
                raise ValueError(f"{path} is not a checkpoint of a run: it lacks {missing[0]}.")
            if self.is_main:
                verify(path)
        except ValueError as error:
            before = self.checkpoints.before(path)
            remedy = f"to continue from {before.name}" if before else "to start anew"
            raise ValueError(f"{error} Remove {path} {remedy}.") from error
        return state

    def _restore_loader(self, state: dict[str, Any], has_changes: bool) -> None:
        try:
            self.run.loader.load_state_dict(state)
        except ValueError:
            # Other data or another batch size has no such position; the order starts anew.
            if not has_changes:
                raise

    def _take_sample(self, sample: Sample) -> dict[str, float]:
        """Take a sample on the first process; the others wait where they meet it next."""
        try:
            with self.run.averaged():
                return sample(self.step, self.run.bare)
        except OSError as error:
            warnings.warn(f"sample of step {self.step} not written: {error}.", stacklevel=2)
            return {}

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _is_stopped(self, stop: Event) -> bool:
        """Whether any process received a signal to stop; all of them agree."""
        if self.run.accelerator.num_processes == 1:
            return stop.is_set()
        flag = torch.tensor(float(stop.is_set()), device=self.run.accelerator.device)
        return bool(self.run.accelerator.reduce(flag).item() > 0)

    def _log(self, logger: MetricsLogger | None, metrics: StepMetrics) -> None:
        if logger is not None:
            logger.add(metrics)
            self.on_log(metrics)
