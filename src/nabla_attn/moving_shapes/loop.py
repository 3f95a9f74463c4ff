"""The training loop: any module, any loss, resumable, stopped safely by Ctrl-C.

Every step draws its batch and its noise from a seed made of (recipe seed, stage, step), so there is
no random state to save, and a resumed run takes exactly the steps of an uninterrupted one.
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nabla_attn.distributed import stop_signals
from nabla_attn.files import whole_file
from nabla_attn.machine import computes_bfloat16
from nabla_attn.moving_shapes.recipe import MuonConfig
from nabla_attn.training.metrics import StepMetrics
from nabla_attn.training.trainer import OnLog, rate_share


@dataclass(frozen=True)
class RecipeStep:
    """The position of one step, and its random numbers."""

    number: int
    total: int
    rng: random.Random
    generator: torch.Generator

    @property
    def progress(self) -> float:
        """Share of the stage that is done, 0 at the first step."""
        return self.number / self.total


def step_at(seed: int, stage: str, number: int, total: int) -> RecipeStep:
    """Build the step `number` of a stage from the recipe's seed."""
    rng = random.Random(f"{seed} {stage} {number}")
    return RecipeStep(number, total, rng, torch.Generator().manual_seed(rng.getrandbits(63)))


def autocast(device: torch.device) -> torch.autocast:
    """Products in bfloat16, where the device computes in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device))


@dataclass
class Stage:
    """One run of the loop.

    Attributes:
        name: Name of the stage, its checkpoint and its log lines; it also seeds the steps.
        folder: Folder of the checkpoint and `log.jsonl`.
        module: The network; trained in place, holding the averaged weights at the end.
        loss_at: Function from a step to its scalar loss.
        is_hidden: Function that says which parameters Muon takes.
        optim: Optimiser settings.
        steps: Number of steps.
        seed: The recipe's seed.
        save_every: Steps between checkpoints.
        on_log: Called with the metrics of every step.
    """

    name: str
    folder: Path
    module: nn.Module
    loss_at: Callable[[RecipeStep], Tensor]
    is_hidden: Callable[[str, nn.Parameter], bool]
    optim: MuonConfig
    steps: int
    seed: int
    save_every: int = 200
    on_log: OnLog = field(default=lambda metrics: None)


class FloatMuon(torch.optim.Muon):
    """`torch.optim.Muon` with its matrix products in float32.

    torch makes them in bfloat16, which takes a CPU without instructions for it many times as long.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalise(gradient.lerp(buffer, group["momentum"]), group)
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalise(matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
    """About the nearest matrix of orthonormal rows or columns, by Newton-Schulz steps.

    Args:
        matrix: Any matrix.
        group: `ns_coefficients`, `ns_steps` and `eps` of `torch.optim.Muon`.
    """
    a, b, c = group["ns_coefficients"]
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class MuonWithAdamW:
    """Step `torch.optim.Muon` on hidden weights and `torch.optim.AdamW` on all others.

    Muon takes matrices only, so a convolution's kernel is stepped through a view
    [out, in * taps] that shares its memory.

    Args:
        module: The network to train.
        is_hidden: Function from a name and parameter to whether Muon takes it.
        config: Learning rates and weight decay.
    """

    def __init__(
        self,
        module: nn.Module,
        is_hidden: Callable[[str, nn.Parameter], bool],
        config: MuonConfig,
    ) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self._hidden = [p for name, p in named if is_hidden(name, p)]
        self._views = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._hidden]
        rest = [p for name, p in named if not is_hidden(name, p)]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        if self._views:
            own = torch.optim.Muon if computes_bfloat16(self._views[0].device) else FloatMuon
            muon = own(self._views, lr=config.muon_lr, weight_decay=config.muon_weight_decay)
            self._optimizers.append((muon, config.muon_lr))
        adamw = torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._optimizers.append((adamw, config.adamw_lr))

    def step(self, scale: float) -> None:
        """Take one step with every learning rate multiplied by `scale`, and drop the gradients."""
        for view, parameter in zip(self._views, self._hidden, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
        for parameter in (*self.parameters, *self._views):
            parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """State of both optimisers."""
        return [optimizer.state_dict() for optimizer, _ in self._optimizers]

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        """Take up a state given by `state_dict`."""
        for (optimizer, _), state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


class _StageRun:
    """A stage's moving parts: optimiser, average, position."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.optimizer = MuonWithAdamW(stage.module, stage.is_hidden, stage.optim)
        self.average = {k: v.clone() for k, v in stage.module.state_dict().items()}
        self.step = 0
        self.seconds = 0.0
        self.checkpoint = stage.folder / f"{stage.name}.checkpoint"

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.stage.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.step = state["step"]
        self.seconds = state["seconds"]

    def save(self) -> None:
        state = {
            "module": self.stage.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        with whole_file(self.checkpoint) as temporary:
            torch.save(state, temporary)

    def _share(self) -> float:
        optim, steps = self.stage.optim, self.stage.steps
        return rate_share(
            self.step, steps, warmup=optim.warmup, start=optim.flat, final=optim.final
        )

    def advance(self) -> float:
        """Take one step and return its loss."""
        stage = self.stage
        loss = stage.loss_at(step_at(stage.seed, stage.name, self.step, stage.steps))
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.parameters, stage.optim.clip)
        self.optimizer.step(self._share())
        self.step += 1
        # Early averages would be mostly the start; let the horizon grow with the steps taken.
        decay = min(stage.optim.average, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in stage.module.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return float(loss.detach())


def run_stage(stage: Stage) -> dict[str, Any]:
    """Train a stage from its checkpoint, or from the start, to its end.

    Args:
        stage: The stage. Its module holds the averaged weights afterwards.

    Returns:
        A record: name, steps, seconds, and the mean loss of every twentieth of the stage.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the checkpoint is saved first.
        ValueError: The loss is not finite.
    """
    run = _StageRun(stage)
    if run.checkpoint.exists():
        run.load()
    log = stage.folder / "log.jsonl"
    stage.folder.mkdir(parents=True, exist_ok=True)
    stage.module.train()
    with stop_signals() as stop:
        while run.step < stage.steps:
            started = time.perf_counter()
            loss = run.advance()
            run.seconds += time.perf_counter() - started
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise ValueError(
                    f"{stage.name}: the loss must be finite: got {loss} at step {run.step}. Run "
                    "the same command again to continue from the last checkpoint."
                )
            numbers = {"loss": loss, "seconds": run.seconds}
            stage.on_log(StepMetrics(run.step, stage.steps, numbers, stage=stage.name))
            line = {"stage": stage.name, "step": run.step, "steps": stage.steps} | numbers
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if stop.is_set() or run.step % stage.save_every == 0 or run.step == stage.steps:
                run.save()
            if stop.is_set():
                raise KeyboardInterrupt
    stage.module.load_state_dict(deepcopy(run.average))
    stage.module.eval()
    return {
        "stage": stage.name,
        "steps": stage.steps,
        "seconds": round(run.seconds, 1),
        "losses": _loss_curve(log, stage.name),
    }


def _loss_curve(log: Path, stage: str, points: int = 20) -> list[float]:
    """Mean loss of equal parts of a stage, from its log; a repeated step counts once."""
    lines = _read_lines(log)
    losses = {line["step"]: line["loss"] for line in lines if line["stage"] == stage}
    ordered = [losses[step] for step in sorted(losses)]
    size = max(1, -(-len(ordered) // points))
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [round(sum(part) / len(part), 5) for part in parts]


def _read_lines(log: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log; a kill or a full disk may have cut others."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)
