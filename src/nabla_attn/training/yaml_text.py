"""YAML that is read whole or refused with the reason."""

from typing import Any

import yaml

from nabla_attn.files import MAX_WHOLE, check_depth

MAX_VALUES = 100_000
"""Values of a configuration; names that stand for others could make any number of them."""


def parse_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ValueError: It is not YAML, is nested too deeply, has too many values, a whole number is
            beyond 64 bits, or a mapping has a key twice, one of which would be dropped.
    """
    try:
        # It loads plain values only.
        values = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = "" if place is None else f" (line {place.line + 1}, column {place.column + 1})"
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{reason}{where}") from error
    check_depth(values, max_values=MAX_VALUES)
    return values


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value!r} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if not -MAX_WHOLE < value < MAX_WHOLE:
            raise ValueError(f"{node.value:.20}... is beyond 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
