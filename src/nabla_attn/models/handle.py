"""`apply`: put NABLA into a diffusers pipeline or model; the handle takes it out again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from nabla_attn import backends
from nabla_attn.config import SparseConfig, as_config
from nabla_attn.machine import load_min_tokens
from nabla_attn.models.applied import AppliedModel, applied_to
from nabla_attn.models.method_parts import (
    LayerParts,
    algorithm_of,
    attach,
    is_method_part,
    make_parts,
    named_method_parts,
    read_method_parts,
    save_method_parts,
)
from nabla_attn.models.modules import trained_algorithm, unwrap
from nabla_attn.models.plan import Layer, Observer
from nabla_attn.models.planner import ApplySettings, Planner
from nabla_attn.models.report import Report, Telemetry
from nabla_attn.models.steps import StepCounter
from nabla_attn.models.table import find_row, row_of
from nabla_attn.schedule import Schedule


def apply(
    target: Any,
    algorithm: SparseConfig | str | None = None,
    *,
    schedule: Schedule | None = None,
    backend: str = "auto",
    telemetry: bool = True,
    min_tokens: int | str | Path | None = None,
    allow_mismatch: bool = False,
    parts: str | Path | None = None,
) -> "Handle":
    """Run the video self-attention of a pipeline's transformers, or of one model, with NABLA.

    Applying again replaces what was applied before.

    Args:
        target: A diffusers pipeline or transformer; it may be compiled or wrapped.
        algorithm: An algorithm such as "nabla-0.7" or "nabla-0.6_sta-11-3-3"; None takes that of
            the schedule, or without one that of `parts`, or what the checkpoint's config says it
            was trained with.
        schedule: The algorithm of every step and layer; None is the algorithm's default schedule.
        backend: "auto" or one of `nabla_attn.backends.NAMES`.
        telemetry: Whether to measure density and kept mass for `Handle.report`.
        min_tokens: Number of video tokens below which attention stays dense, instead of that of
            the schedule. "auto" takes what `nabla bench --crossover` measured on this machine, or
            keeps the schedule's with a warning; any other string is the path of such a record.
        allow_mismatch: Whether a schedule that was calibrated for another model, size, number of
            steps or version is followed with a warning, instead of being refused.
        parts: File of trained parts, such as VSA's gate, for the methods that have them. Without
            it they are those that are in the model, or do nothing.

    Returns:
        A handle; also a context manager, at whose end the models are as they were before: with
        what was applied then, or without NABLA.

    Raises:
        ValueError: Unknown or refused model class, no algorithm or two different ones, a schedule
            of another model, an unknown backend, `min_tokens` that is not a number, "auto" or
            a record, or `parts` of another model or of methods that the schedule does not have.
    """
    is_model = isinstance(target, nn.Module)
    models = {"transformer": target} if is_model else _transformers(target)
    if algorithm is None and schedule is None:
        algorithm = _trained_algorithm(models) if parts is None else algorithm_of(parts)
    rules = _schedule(algorithm, schedule)
    if allow_mismatch:
        rules = replace(rules, allow_mismatch=True)
    if min_tokens is not None and min_tokens != "auto":
        tokens = load_min_tokens(min_tokens) if isinstance(min_tokens, str | Path) else min_tokens
        rules = replace(rules, min_tokens=tokens)
    settings = ApplySettings(
        schedule=rules,
        has_auto_min_tokens=min_tokens == "auto",
        backend=_checked_backend(backend),
        telemetry=telemetry,
    )
    steps, collector = StepCounter(None if is_model else target), Telemetry()
    found = {} if parts is None else _parts_for(models, parts, rules)
    pairs: Pairs = []
    for name, hooked in models.items():
        model = unwrap(hooked)
        planner = Planner(name, model, row_of(model), settings, steps, collector)
        applied = AppliedModel(planner)
        applied.parts = found.get(name, {})
        pairs.append((model, applied))
    before = _applied(target)
    for (model, applied), hooked in zip(pairs, models.values(), strict=True):
        remove(model)
        applied.install(model, hooked if hasattr(hooked, "_orig_mod") else model)
    return Handle(pairs, before, collector)


@contextmanager
def replaced(
    target: Any, algorithm: SparseConfig | str | None, **options: Any
) -> Iterator["Handle | None"]:
    """Run a pipeline or model with another algorithm for the time of the block.

    Unlike `with apply(...)`, it can ask for the model's own dense attention.

    Args:
        target: As in `apply`; for dense attention any pipeline.
        algorithm: As in `apply`; None without a `schedule=` is dense: NABLA is taken out.
        options: The other arguments of `apply`.

    Yields:
        The handle of `apply`; None for dense attention.

    Raises:
        ValueError: As in `apply`.
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


def load_method_parts(target: Any, file: str | Path) -> None:
    """Put the trained parts of a file into a pipeline's transformers, or one model, to stay there.

    Whatever is applied later finds them, if its methods have such parts.

    Args:
        target: A pipeline, or a model that a row of the list supports.
        file: What `Handle.save_method_parts` or training wrote.

    Raises:
        ValueError: It is no such file, or one of other models.
    """
    is_model = isinstance(target, nn.Module)
    found = {"transformer": target} if is_model else _transformers(target)
    models = {name: unwrap(model) for name, model in found.items()}
    for name, parts in read_method_parts(models, file).items():
        attach(models[name], parts)


def remove(model: nn.Module) -> None:
    """Remove NABLA from a model, or from a copy, which has no handle. No effect without it."""
    model = unwrap(model)
    applied = applied_to(model)
    if applied is not None:
        applied.uninstall(model)


Pairs = list[tuple[nn.Module, AppliedModel]]


class Handle:
    """What `apply` did. Leaving it as a context manager brings back what was applied before it."""

    def __init__(self, models: Pairs, before: Pairs, telemetry: Telemetry) -> None:
        self._models = models
        self._before = before
        self._telemetry = telemetry

    def __repr__(self) -> str:
        names = ", ".join(type(model).__name__ for model, _ in self._models)
        state = "" if any(self._is_ours(*pair) for pair in self._models) else ", removed"
        return f"<NABLA in {names}: {self.schedule}{state}>"

    def remove(self) -> None:
        """Restore the models bit for bit. No effect on what was applied after this handle."""
        for model, applied in self._models:
            if self._is_ours(model, applied):
                applied.uninstall(model)

    @property
    def schedule(self) -> Schedule:
        """The schedule that the models follow."""
        return self._settings.schedule

    def set_schedule(self, schedule: Schedule | SparseConfig | str) -> None:
        """Follow another schedule from the next forward on.

        Args:
            schedule: A schedule, or an algorithm such as "nabla-0.7", which gets its default one.

        Raises:
            ValueError: The schedule names a layer that a model does not have.
        """
        rules = schedule if isinstance(schedule, Schedule) else Schedule.default(schedule)
        settings = replace(self._settings, schedule=rules)
        for _, applied in self._models:
            applied.planner.check(rules)
        for _, applied in self._models:
            applied.planner.use(settings)

    @property
    def layers(self) -> list[Layer]:
        """The layers of all models in order, each with `path`, `model`, `index`, `num_heads`."""
        return [layer for _, applied in self._models for layer in applied.planner.layers]

    @property
    def model_class(self) -> str:
        """The class of the first model."""
        return self._models[0][1].planner.class_name

    @property
    def num_layers(self) -> int:
        """The largest number of attention layers that one of the models has."""
        return max(layer.index for layer in self.layers) + 1

    @property
    def num_heads(self) -> int:
        """The largest number of heads that one of the layers has."""
        return max(layer.num_heads for layer in self.layers)

    def method_parameters(self) -> list[nn.Parameter]:
        """Parameters of the trained parts of the schedule's methods, for an optimiser.

        Parts that a model does not have yet are made here, at the element that changes nothing.
        They are in the model, beside the attention modules' own weights, until `remove`.
        """
        found = []
        for model, applied in self._models:
            applied.add_parts(model, make_parts(model, self.schedule.method_names))
            found += [p for name, p in model.named_parameters() if is_method_part(name)]
        return found

    def save_method_parts(self, path: str | Path) -> None:
        """Write the trained parts that are in the models as one file, for `apply(parts=...)`.

        Raises:
            ValueError: There are none.
        """
        weights: dict[str, Any] = {}
        for model, applied in self._models:
            weights |= named_method_parts(applied.planner.name, dict(model.named_parameters()))
        if not weights:
            raise ValueError(
                f"{self.schedule.algorithm} has no trained parts here. method_parameters() makes "
                "those of methods that have some, such as vsa-0.1."
            )
        save_method_parts(Path(path), weights, self.schedule.algorithm)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Have a function called after every sparse attention call, from the next forward on.

        Args:
            observer: Given an `AttentionCall`: queries, keys, values and the map that was used.

        Returns:
            A function that ends it.
        """
        layers = self.layers
        for layer in layers:
            layer.observers.append(observer)

        def stop() -> None:
            for layer in layers:
                if observer in layer.observers:
                    layer.observers.remove(observer)

        return stop

    def report(self) -> Report:
        """Density and kept mass of the last generation per step, layer and head.

        Raises:
            ValueError: `apply` was called with telemetry=False.
        """
        if not self._settings.telemetry:
            raise ValueError("nothing was measured. Use apply(..., telemetry=True).")
        return self._telemetry.report()

    def last_densities(self) -> list[float]:
        """Kept share of the token pairs of every layer in the last forward; waits for the device.

        A dense layer is 1. Empty before the first forward and without telemetry.
        """
        return self._telemetry.last_densities()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        ours = {id(model) for model, applied in self._models if self._is_ours(model, applied)}
        self.remove()
        _apply_again([pair for pair in self._before if id(pair[0]) in ours])

    @property
    def _settings(self) -> ApplySettings:
        return self._models[0][1].planner.settings

    @staticmethod
    def _is_ours(model: nn.Module, applied: AppliedModel) -> bool:
        return applied_to(model) is applied


def _applied(target: Any) -> Pairs:
    """The models of a pipeline, or the one model, that carry NABLA."""
    is_model = isinstance(target, nn.Module)
    parts = [target] if is_model else (getattr(target, "components", None) or {}).values()
    models = [unwrap(part) for part in parts if isinstance(part, nn.Module)]
    pairs = [(model, applied_to(model)) for model in models]
    return [(model, applied) for model, applied in pairs if applied is not None]


def _apply_again(before: Pairs) -> None:
    """Apply what was applied before, instead of what is applied now."""
    for model, applied in before:
        remove(model)
        applied.install_again(model)


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
    known = ("auto", *backends.NAMES)
    if backend not in known:
        raise ValueError(f"unknown backend {backend!r}; expected one of {known}.")
    return backend


def _parts_for(
    models: dict[str, nn.Module], file: str | Path, schedule: Schedule
) -> dict[str, LayerParts]:
    """The parts of a file, all of methods that the schedule has."""
    found = read_method_parts({name: unwrap(model) for name, model in models.items()}, file)
    have = {name for parts in found.values() for mine in parts.values() for name in mine}
    if odd := sorted(have - schedule.method_names):
        raise ValueError(
            f"{file} has parts of {odd[0]}, trained with {algorithm_of(file)}: got the algorithm "
            f"{schedule.algorithm}. Leave out the parts, or use that algorithm."
        )
    return found


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
