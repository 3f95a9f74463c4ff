"""`apply`: put NABLA into a diffusers pipeline or model; the handle takes it out again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nabla_attn.config import SparseConfig, as_config
from nabla_attn.machine import load_min_tokens
from nabla_attn.mapping import check_pairing
from nabla_attn.models.hook import STATE_NAME
from nabla_attn.models.modules import unwrap
from nabla_attn.models.state import ModelState, Settings
from nabla_attn.models.steps import StepCounter
from nabla_attn.models.table import find_row, row_of
from nabla_attn.models.telemetry import Report, Telemetry
from nabla_attn.models.trained import trained_algorithm
from nabla_attn.schedule import Schedule


def apply(
    target: Any,
    algorithm: SparseConfig | str | None = None,
    *,
    schedule: Schedule | None = None,
    backend: str = "auto",
    telemetry: bool = True,
    keep_first_frame: bool = False,
    min_tokens: int | str | Path | None = None,
    pair_queries: str | None = None,
) -> "Handle":
    """Run the video self-attention of a pipeline's transformers, or of one model, with NABLA.

    Applying again replaces what was applied before.

    Args:
        target: a diffusers pipeline or transformer, compiled or wrapped ones included.
        algorithm: such as "nabla-0.7" or "nabla-0.6_sta-11-3-3"; None takes the schedule's,
            or without one what the checkpoint's config says it was trained with.
        schedule: which algorithm runs at which step and layer; None is the algorithm's default.
        backend: "auto" or one of `nabla_attn.backends.NAMES`.
        telemetry: measure density and kept mass for `Handle.report`.
        keep_first_frame: every block attends the first latent frame, whatever its score.
        min_tokens: below this many video tokens attention stays dense; instead of the schedule's.
            "auto" takes what `nabla bench --crossover` measured on this machine, or stays at the
            schedule's with a warning; any other string is the path of such a record.
        pair_queries: "union" or "pool": two neighbouring query blocks share one map, as in
            `nabla_attention`.

    Returns:
        A handle; also a context manager, at whose end the models are as they were before: with
        what was applied then, or without NABLA.

    Raises:
        ValueError: unknown or refused model class, no algorithm or two different ones, an
            unknown backend, or `min_tokens` that is not a number, "auto" or a record.
    """
    is_model = isinstance(target, nn.Module)
    models = {"transformer": target} if is_model else _transformers(target)
    if algorithm is None and schedule is None:
        algorithm = _trained_algorithm(models)
    check_pairing(pair_queries)
    rules = _schedule(algorithm, schedule)
    if min_tokens is not None and min_tokens != "auto":
        tokens = load_min_tokens(min_tokens) if isinstance(min_tokens, str | Path) else min_tokens
        rules = replace(rules, min_tokens=tokens)
    settings = Settings(
        schedule=rules,
        has_auto_min_tokens=min_tokens == "auto",
        backend=_checked_backend(backend),
        telemetry=telemetry,
        keep_first_frame=keep_first_frame,
        pair_queries=pair_queries,
    )
    steps, collector = StepCounter(None if is_model else target), Telemetry()
    handle = Handle(collector)
    for name, hooked in models.items():
        model = unwrap(hooked)
        state = ModelState(name, model, row_of(model), settings, steps, collector)
        handle.models.append((model, state))
    handle.before = _applied(target)
    for (model, state), hooked in zip(handle.models, models.values(), strict=True):
        remove(model)
        state.install(model, hooked if hasattr(hooked, "_orig_mod") else model)
    return handle


@contextmanager
def replaced(
    target: Any, algorithm: SparseConfig | str | None, **options: Any
) -> Iterator["Handle | None"]:
    """Run a pipeline or model with another algorithm for the time of the block.

    Unlike `with apply(...)`, it can ask for the model's own dense attention.

    Args:
        target: as in `apply`; for dense attention any pipeline.
        algorithm: as in `apply`; None without a `schedule=` is dense: NABLA is taken out.
        options: the other arguments of `apply`.

    Yields:
        The handle of `apply`; None for dense attention.

    Raises:
        ValueError: as in `apply`.
    """
    if algorithm is not None or options.get("schedule") is not None:
        with apply(target, algorithm, **options) as handle:
            yield handle
        return
    before = _applied(target)
    for model, _ in before:
        remove(model)
    try:
        yield None
    finally:
        _apply_again(before)


def remove(model: nn.Module) -> None:
    """Take NABLA out of a model; also out of a copy, which has no handle. No effect without it."""
    model = unwrap(model)
    state = _state_of(model)
    if state is not None:
        state.uninstall(model)


class Handle:
    """What `apply` did. Leaving it as a context manager brings back what was applied before it.

    Attributes:
        models: the models, each with its state.
        before: the models that had NABLA before, with their states then.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self.models: list[tuple[nn.Module, ModelState]] = []
        self.before: list[tuple[nn.Module, ModelState]] = []
        self.telemetry = telemetry

    def remove(self) -> None:
        """Restore the models bit for bit. No effect on what was applied after this handle."""
        for model, state in self.models:
            if _state_of(model) is state:
                state.uninstall(model)

    def report(self) -> Report:
        """Density and kept mass of the last generation per step, layer and head.

        Raises:
            ValueError: `apply` was called with telemetry=False.
        """
        if not all(state.settings.telemetry for _, state in self.models):
            raise ValueError("nothing was measured. Use apply(..., telemetry=True).")
        return self.telemetry.report()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        ours = {id(model) for model, state in self.models if _state_of(model) is state}
        self.remove()
        _apply_again([pair for pair in self.before if id(pair[0]) in ours])


def _applied(target: Any) -> list[tuple[nn.Module, ModelState]]:
    """The models of a pipeline, or the one model, that carry NABLA, with their states."""
    is_model = isinstance(target, nn.Module)
    parts = [target] if is_model else (getattr(target, "components", None) or {}).values()
    models = [unwrap(part) for part in parts if isinstance(part, nn.Module)]
    states = [(model, _state_of(model)) for model in models]
    return [(model, state) for model, state in states if state is not None]


def _state_of(model: nn.Module) -> ModelState | None:
    return model.__dict__.get(STATE_NAME)


def _apply_again(before: list[tuple[nn.Module, ModelState]]) -> None:
    """Put back what was there, instead of what is there now."""
    for model, state in before:
        remove(model)
        state.install_again(model)


def _trained_algorithm(models: dict[str, nn.Module]) -> SparseConfig:
    found = {trained_algorithm(unwrap(model)) for model in models.values()} - {None}
    if len(found) != 1:
        trained = f"trained with {sorted(map(str, found))}" if found else "trained with none"
        raise ValueError(
            f"give an algorithm such as 'nabla-0.7', or a schedule: the checkpoint was {trained}."
        )
    return found.pop()  # type: ignore[return-value]


def _schedule(algorithm: SparseConfig | str | None, schedule: Schedule | None) -> Schedule:
    if schedule is not None and algorithm is None:
        return schedule
    assert algorithm is not None
    config = as_config(algorithm)
    if schedule is None:
        return Schedule.default(config)
    if schedule.algorithm != config:
        raise ValueError(
            f"the algorithm {config} and the schedule's {schedule.algorithm} differ. Give one."
        )
    return schedule


def _checked_backend(backend: str) -> str:
    from nabla_attn import backends

    known = ("auto", *backends.NAMES)
    if backend not in known:
        raise ValueError(f"unknown backend {backend!r}; expected one of {known}.")
    return backend


def _transformers(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's models that have a row, refusals included, so that they are named."""
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise ValueError(
            f"expected a diffusers pipeline or transformer: got {type(pipeline).__name__}."
        )
    modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    known = {name: part for name, part in modules.items() if find_row(unwrap(part)) is not None}
    found = known or {name: part for name, part in modules.items() if "transformer" in name}
    if not found:
        raise ValueError(
            f"{type(pipeline).__name__} has no transformer: its parts are {sorted(modules)}."
        )
    return found
