"""Schedules: (step, layer) -> SparseConfig, readable as JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nabla_attn.config import DENSE, SparseConfig, as_config, parse
from nabla_attn.files import parse_json

# The reference runs window-only algorithms dense for steps 0 to 11 (wan/text2video.py:247-254).
WINDOW_ONLY_DENSE_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which algorithm runs at which denoising step and layer.

    The first rule that matches decides: too few tokens, a dense step, a dense layer, an override of
    the layer, an override of the step, then the algorithm itself.

    Args:
        algorithm: The algorithm wherever no rule says otherwise.
        dense_first_steps: Steps at the start that stay dense.
        dense_last_steps: Steps at the end that stay dense; needs the number of steps.
        dense_layers: Layers that stay dense; negative ones count from the end.
        layer_overrides: Layer -> algorithm; negative layers count from the end.
        step_overrides: Step -> algorithm.
        min_tokens: Below this many video tokens attention stays dense, because it is faster.
        reuse_steps: Steps that one map serves: those with the same `step // reuse_steps`. 1 builds
            a map in every step.
        reuse_guidance: Both branches of classifier-free guidance use one map: the conditional
            one's, or of separate calls the first one's. Reuse costs accuracy, which
            docs/benchmarks.md states, and is for inference: with gradients maps are fresh.

    Raises:
        ValueError: A count or step is negative, or a value is of another type.
    """

    algorithm: SparseConfig
    dense_first_steps: int = 0
    dense_last_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    layer_overrides: dict[int, SparseConfig] = field(default_factory=dict)
    step_overrides: dict[int, SparseConfig] = field(default_factory=dict)
    min_tokens: int = 0
    reuse_steps: int = 1
    reuse_guidance: bool = False

    def __post_init__(self) -> None:
        for name in ("dense_first_steps", "dense_last_steps", "min_tokens", "reuse_steps"):
            value, least = getattr(self, name), int(name == "reuse_steps")
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or more: got {value!r}.")
        if type(self.reuse_guidance) is not bool:
            raise ValueError(f"reuse_guidance must be true or false: got {self.reuse_guidance!r}.")
        if not isinstance(self.dense_layers, Iterable):
            raise ValueError(f"dense_layers must be a list: got {self.dense_layers!r}.")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        configs = (self.algorithm, *self.layer_overrides.values(), *self.step_overrides.values())
        for config in configs:
            if not isinstance(config, SparseConfig):
                raise ValueError(
                    f"a schedule holds what `parse` makes of a string: got {config!r}."
                )
        for number in (*self.dense_layers, *self.layer_overrides, *self.step_overrides):
            if type(number) is not int:
                raise ValueError(f"layers and steps must be whole numbers: got {number!r}.")
        if any(step < 0 for step in self.step_overrides):
            raise ValueError(f"steps count from 0: got {min(self.step_overrides)}.")

    @classmethod
    def default(cls, algorithm: SparseConfig | str) -> "Schedule":
        """The reference's schedule: all steps sparse; a window alone starts with 12 dense steps."""
        config = as_config(algorithm)
        window_only = config.window is not None and not config.is_adaptive
        return cls(
            algorithm=config, dense_first_steps=WINDOW_ONLY_DENSE_STEPS if window_only else 0
        )

    def config_for(
        self,
        step: int,
        layer: int,
        *,
        num_steps: int | None = None,
        num_layers: int | None = None,
        num_tokens: int | None = None,
    ) -> SparseConfig:
        """The algorithm of one attention call; DENSE where it stays dense.

        Args:
            step: Denoising step from 0.
            layer: Attention layer from 0.
            num_steps: Steps of the run; needed for `dense_last_steps`.
            num_layers: Layers of the model; needed for negative `dense_layers`.
            num_tokens: Video tokens; needed for `min_tokens`.

        Raises:
            ValueError: A rule needs a number that was not given.
        """
        if self.min_tokens and _need(num_tokens, "num_tokens", "min_tokens") < self.min_tokens:
            return DENSE
        if step < self.dense_first_steps:
            return DENSE
        last = self.dense_last_steps
        if last and step >= _need(num_steps, "num_steps", "dense_last_steps") - last:
            return DENSE
        if self._is_dense_layer(layer, num_layers):
            return DENSE
        for name in _names_of_layer(layer, self.layer_overrides, num_layers):
            if name in self.layer_overrides:
                return self.layer_overrides[name]
        return self.step_overrides.get(step, self.algorithm)

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError if a rule names a layer that a model of so many does not have."""
        for layer in (*self.dense_layers, *self.layer_overrides):
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"the schedule names layer {layer}, and the model has {num_layers}: 0 to "
                    f"{num_layers - 1}, or -1 to {-num_layers} from the end."
                )

    def _is_dense_layer(self, layer: int, num_layers: int | None) -> bool:
        names = _names_of_layer(layer, self.dense_layers, num_layers)
        return any(name in self.dense_layers for name in names)

    @property
    def reuses_maps(self) -> bool:
        """Whether some map serves more than one call."""
        return self.reuse_steps > 1 or self.reuse_guidance

    def __str__(self) -> str:
        rules = [str(self.algorithm)]
        if self.dense_first_steps:
            rules.append(f"first {self.dense_first_steps} steps dense")
        if self.dense_last_steps:
            rules.append(f"last {self.dense_last_steps} steps dense")
        if self.dense_layers:
            rules.append(f"layers {', '.join(map(str, self.dense_layers))} dense")
        rules += [f"layer {layer}: {config}" for layer, config in self.layer_overrides.items()]
        rules += [f"step {step}: {config}" for step, config in self.step_overrides.items()]
        if self.min_tokens:
            rules.append(f"dense below {self.min_tokens} tokens")
        if self.reuse_steps > 1:
            rules.append(f"one map for {self.reuse_steps} steps")
        if self.reuse_guidance:
            rules.append("one map for both guidance branches")
        return "; ".join(rules)

    def to_json(self) -> str:
        """JSON with algorithms as strings; `from_json` reads it back."""
        values = asdict(self) | {"algorithm": str(self.algorithm)}
        for name in ("layer_overrides", "step_overrides"):
            overrides: dict[int, SparseConfig] = getattr(self, name)
            values[name] = {str(key): str(config) for key, config in overrides.items()}
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """Read what `to_json` wrote; missing fields take their defaults.

        Raises:
            ValueError: Not JSON, an unknown field, or a value of the wrong kind.
        """
        try:
            values = parse_json(text.removeprefix("\ufeff"))
        except ValueError as error:
            raise ValueError(f"a schedule must be JSON: {error}.") from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Any) -> "Schedule":
        """Build a schedule from plain values, as `from_json` finds them."""
        known = [entry.name for entry in fields(cls)]
        if not isinstance(values, dict) or not isinstance(values.get("algorithm"), str):
            raise ValueError('a schedule must be an object with an "algorithm" string.')
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown schedule fields {unknown}; expected some of {known}.")
        values = dict(values, algorithm=parse(values["algorithm"]))
        for name in ("layer_overrides", "step_overrides"):
            values[name] = _read_overrides(name, values.get(name, {}))
        values["dense_layers"] = _read_layers(values.get("dense_layers", []))
        return cls(**values)


def _need(value: int | None, name: str, rule: str) -> int:
    if value is None:
        raise ValueError(f"{rule} needs {name}, which is not known here. Drop the rule or pass it.")
    return value


def _names_of_layer(layer: int, used: Iterable[int], num_layers: int | None) -> tuple[int, ...]:
    """A layer's number, and its number from the end where such ones are used."""
    if not any(name < 0 for name in used):
        return (layer,)
    return layer, layer - _need(num_layers, "num_layers", "a negative layer")


def _read_overrides(name: str, values: Any) -> dict[int, SparseConfig]:
    if not isinstance(values, dict):
        raise ValueError(f"{name} must map numbers to algorithms: got {values!r}.")
    try:
        numbers = {key: int(key) for key in values}
        if odd := [key for key, number in numbers.items() if str(number) != key]:
            raise ValueError(f"{odd[0]!r} is not how that number is written.")
        return {numbers[key]: parse(algorithm) for key, algorithm in values.items()}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read_layers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"dense_layers must be a list of whole numbers: got {values!r}.")
    return tuple(values)
