"""Schedules: (step, layer, head) -> SparseConfig, readable as JSON."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nabla_attn.calibrated_for import CalibratedFor
from nabla_attn.config import DENSE, SparseConfig, as_config, parse
from nabla_attn.files import parse_json
from nabla_attn.head_rules import HeadGroup, Rule
from nabla_attn.methods import find

# The reference runs window-only algorithms dense for steps 0 to 11 (wan/text2video.py:247-254).
WINDOW_ONLY_DENSE_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which algorithm runs at which denoising step, layer and head.

    The first that matches decides: too few tokens, a dense step, a dense layer, the first of the
    rules that names the layer, head and step, an override of the layer, an override of the step,
    then the algorithm itself.

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
        rules: Algorithms for some layers, heads and steps, in the order in which they are asked.
        calibrated_for: The model, size and version that the schedule was calibrated for; others are
            refused.
        allow_mismatch: Whether to warn of another model, size or version instead.
        tables: What calibration found for methods that need it: by the method's name, a list with
            an entry for each layer.

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
    rules: tuple[Rule, ...] = ()
    calibrated_for: CalibratedFor | None = None
    allow_mismatch: bool = False
    tables: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dense_first_steps", "dense_last_steps", "min_tokens", "reuse_steps"):
            value, least = getattr(self, name), int(name == "reuse_steps")
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or more: got {value!r}.")
        for name in ("reuse_guidance", "allow_mismatch"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false: got {getattr(self, name)!r}.")
        tables = self.tables
        if not isinstance(tables, dict) or not all(type(each) is list for each in tables.values()):
            raise ValueError("tables must map methods to lists with an entry for each layer.")
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
        object.__setattr__(self, "rules", tuple(self.rules))
        if odd := [rule for rule in self.rules if not isinstance(rule, Rule)]:
            raise ValueError(f"rules of a schedule must be `Rule` objects: got {odd[0]!r}.")
        if not isinstance(self.calibrated_for, CalibratedFor | None):
            raise ValueError(f"calibrated_for must be a CalibratedFor: got {self.calibrated_for!r}")

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
        head: int | None = None,
        num_steps: int | None = None,
        num_layers: int | None = None,
        num_tokens: int | None = None,
    ) -> SparseConfig:
        """The algorithm of one attention call, or of one head of it; DENSE where it stays dense.

        Args:
            step: Denoising step from 0.
            layer: Attention layer from 0.
            head: Head from 0; needed where a rule is about some heads.
            num_steps: Steps of the run; needed for `dense_last_steps`.
            num_layers: Layers of the model; needed for negative layers.
            num_tokens: Video tokens; needed for `min_tokens`.

        Raises:
            ValueError: A rule needs a number that was not given.
        """
        counts = (num_steps, num_layers, num_tokens)
        if self._is_dense(step, layer, *counts):
            return DENSE
        rules = self._rules_of(step, layer, num_layers)
        return self._choice(step, layer, head, num_layers, rules)[0]

    def groups_for(
        self,
        step: int,
        layer: int,
        num_heads: int,
        *,
        num_steps: int | None = None,
        num_layers: int | None = None,
        num_tokens: int | None = None,
    ) -> list[HeadGroup]:
        """The heads of a layer by what they do in a step; arguments as in `config_for`."""
        every = tuple(range(num_heads))
        if self._is_dense(step, layer, num_steps, num_layers, num_tokens):
            return [HeadGroup(every, DENSE, 1)]
        rules = self._rules_of(step, layer, num_layers)
        if all(rule.heads is None for rule in rules):
            return [HeadGroup(every, *self._choice(step, layer, None, num_layers, rules))]
        found: dict[tuple[SparseConfig, int], list[int]] = {}
        for head in every:
            found.setdefault(self._choice(step, layer, head, num_layers, rules), []).append(head)
        return [HeadGroup(tuple(heads), *choice) for choice, heads in found.items()]

    def check_layers(self, num_layers: int, *, num_heads: int | None = None) -> None:
        """Raise ValueError if a rule names a layer or head that a model of so many lacks."""
        named = [layer for rule in self.rules for layer in rule.layers or ()]
        for layer in (*self.dense_layers, *self.layer_overrides, *named):
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"the schedule names layer {layer}, and the model has {num_layers}: 0 to "
                    f"{num_layers - 1}, or -1 to {-num_layers} from the end."
                )
        last = max((rule.heads[-1] for rule in self.rules if rule.heads), default=-1)
        if num_heads is not None and last >= num_heads:
            raise ValueError(
                f"the schedule names head {last}, and the model has {num_heads}: 0 to "
                f"{num_heads - 1}."
            )

    def check_match(self, **here: Any) -> None:
        """Refuse, or warn of, another model, size or version than the schedule was calibrated for.

        Args:
            here: Fields of `CalibratedFor` as they are here; None where not known.

        Raises:
            ValueError: One differs, and `allow_mismatch` is False.
        """
        if self.calibrated_for is not None:
            self.calibrated_for.check(allow_mismatch=self.allow_mismatch, **here)

    @property
    def algorithms(self) -> tuple[SparseConfig, ...]:
        """Every algorithm that a rule names, and the schedule's own first."""
        overrides = (*self.layer_overrides.values(), *self.step_overrides.values())
        return self.algorithm, *overrides, *(rule.algorithm for rule in self.rules)

    def without_steps(self) -> "Schedule":
        """The schedule without its rules about denoising steps, as training follows it."""
        rules = tuple(rule for rule in self.rules if rule.steps is None)
        return replace(
            self, dense_first_steps=0, dense_last_steps=0, step_overrides={}, rules=rules
        )

    def map_algorithms(self, change: Callable[[SparseConfig], SparseConfig]) -> "Schedule":
        """The same rules with other algorithms.

        Args:
            change: From an algorithm to the one in its place.
        """
        return replace(
            self,
            algorithm=change(self.algorithm),
            layer_overrides={key: change(value) for key, value in self.layer_overrides.items()},
            step_overrides={key: change(value) for key, value in self.step_overrides.items()},
            rules=tuple(replace(rule, algorithm=change(rule.algorithm)) for rule in self.rules),
        )

    def _is_dense(
        self,
        step: int,
        layer: int,
        num_steps: int | None,
        num_layers: int | None,
        num_tokens: int | None,
    ) -> bool:
        """Whether the whole call stays dense, whatever the algorithms are."""
        if self.min_tokens and _need(num_tokens, "num_tokens", "min_tokens") < self.min_tokens:
            return True
        last = self.dense_last_steps
        if step < self.dense_first_steps:
            return True
        if last and step >= _need(num_steps, "num_steps", "dense_last_steps") - last:
            return True
        return self._is_dense_layer(layer, num_layers)

    def _rules_of(self, step: int, layer: int, num_layers: int | None) -> Sequence[Rule]:
        if not self.rules:
            return ()
        used = (number for rule in self.rules for number in rule.layers or ())
        names = _names_of_layer(layer, used, num_layers)
        return [rule for rule in self.rules if rule.is_for(step, names)]

    def _choice(
        self,
        step: int,
        layer: int,
        head: int | None,
        num_layers: int | None,
        rules: Iterable[Rule],
    ) -> tuple[SparseConfig, int]:
        """A head's algorithm, and how many steps a map serves, in a call that is not dense."""
        for rule in rules:
            if rule.heads is None or _need(head, "head", "a rule for some heads") in rule.heads:
                config, reuse = rule.algorithm, rule.reuse_steps or self.reuse_steps
                return config, reuse if config.is_adaptive else 1
        config = self.step_overrides.get(step, self.algorithm)
        for name in _names_of_layer(layer, self.layer_overrides, num_layers):
            if name in self.layer_overrides:
                config = self.layer_overrides[name]
                break
        return config, self.reuse_steps if config.is_adaptive else 1

    def _is_dense_layer(self, layer: int, num_layers: int | None) -> bool:
        names = _names_of_layer(layer, self.dense_layers, num_layers)
        return any(name in self.dense_layers for name in names)

    @property
    def method_names(self) -> set[str]:
        """The methods of its algorithms."""
        return {use.name for config in self.algorithms for use in config.uses}

    @property
    def needs(self) -> frozenset[str]:
        """What the methods of its algorithms need; see `methods.contract.NEEDS`."""
        return frozenset(need for name in self.method_names for need in find(name).needs)

    @property
    def reuses_maps(self) -> bool:
        """Whether some map serves more than one call."""
        return self.reuse_guidance or max(self.periods) > 1

    @property
    def periods(self) -> tuple[int, ...]:
        """The numbers of steps that a map may serve, each once, ascending."""
        own = (rule.reuse_steps for rule in self.rules if rule.reuse_steps is not None)
        return tuple(sorted({self.reuse_steps, *own}))

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
        rules += map(str, self.rules)
        if self.min_tokens:
            rules.append(f"dense below {self.min_tokens} tokens")
        if self.reuse_steps > 1:
            rules.append(f"one map for {self.reuse_steps} steps")
        if self.reuse_guidance:
            rules.append("one map for both guidance branches")
        return "; ".join(rules)

    def to_json(self) -> str:
        """JSON with algorithms as strings, a rule or table a line; `from_json` reads it back."""
        lines = [f'  "{name}": {text}' for name, text in self._json_fields()]
        return "{\n" + ",\n".join(lines) + "\n}"

    def _json_fields(self) -> Iterator[tuple[str, str]]:
        """Every field that says something, by name, as JSON."""
        for entry in fields(self):
            name, value = entry.name, getattr(self, entry.name)
            # What records of older versions do not have is written where it says something.
            if not value and name in ("rules", "calibrated_for", "allow_mismatch", "tables"):
                continue
            if name == "rules":
                rules = ",\n    ".join(json.dumps(rule.to_dict()) for rule in value)
                yield name, f"[\n    {rules}\n  ]"
            elif name == "tables":
                tables = (f"{json.dumps(key)}: {json.dumps(table)}" for key, table in value.items())
                yield name, "{\n    " + ",\n    ".join(tables) + "\n  }"
            else:
                yield name, json.dumps(_plain(name, value), indent=2).replace("\n", "\n  ")

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
        rules = values.get("rules", [])
        if not isinstance(rules, list):
            raise ValueError(f"rules must be a list: got {rules!r}.")
        values["rules"] = tuple(Rule.from_dict(rule) for rule in rules)
        if (given := values.get("calibrated_for")) is not None:
            values["calibrated_for"] = CalibratedFor.from_dict(given)
        return cls(**values)


def _plain(name: str, value: Any) -> Any:
    """A field as JSON has it: algorithms are strings."""
    if name in ("layer_overrides", "step_overrides"):
        return {str(key): str(config) for key, config in value.items()}
    if name == "calibrated_for":
        return value.to_dict()
    return str(value) if name == "algorithm" else value


def _need(value: int | None, name: str, rule: str) -> int:
    if value is None:
        raise ValueError(f"{rule} needs {name}, which is not known here. Drop the rule or pass it.")
    return value


def _names_of_layer(layer: int, used: Iterable[int], num_layers: int | None) -> tuple[int, ...]:
    """A layer's number, and its number from the end where such ones are used."""
    if all(name >= 0 for name in used):
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
