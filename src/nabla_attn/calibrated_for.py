"""What a calibrated schedule was made for, and how another model, size or version differs."""

import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nabla_attn.record import collect_versions

REMEDY = (
    "Calibrate for this one with `nabla calibrate`, or pass --allow-mismatch (allow_mismatch=True)"
)


@dataclass(frozen=True, kw_only=True)
class CalibratedFor:
    """The model, size and version that a schedule was calibrated for.

    Args:
        model: Class of the transformer.
        layers: Number of its attention layers.
        heads: Number of heads of a layer.
        tokens: Video tokens along (frames, height, width).
        steps: Number of denoising steps.
        version: Version of nabla-attn; those with the same first two numbers agree.

    Raises:
        ValueError: A value is of another type.
    """

    model: str
    layers: int
    heads: int
    tokens: tuple[int, int, int]
    steps: int
    version: str = field(default_factory=lambda: package_version())

    def __post_init__(self) -> None:
        if isinstance(self.tokens, list):
            object.__setattr__(self, "tokens", tuple(self.tokens))
        counts = [self.layers, self.heads, self.steps]
        sizes = self.tokens if isinstance(self.tokens, tuple) and len(self.tokens) == 3 else [None]
        if any(type(count) is not int or count < 1 for count in (*counts, *sizes)):
            raise ValueError(
                "calibrated_for needs positive layers, heads and steps, and three tokens: got "
                f"{counts} and {self.tokens!r}."
            )
        for name in ("model", "version"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"calibrated_for: {name} must be text: got {getattr(self, name)}.")

    def differences(self, **here: Any) -> list[str]:
        """How what is at hand differs, a phrase each.

        Args:
            here: Some of the fields, as they are here; those that are None are not known.
        """
        known = {name: value for name, value in here.items() if value is not None}
        found = []
        for name, value in known.items():
            mine = getattr(self, name)
            is_same = _series(mine) == _series(value) if name == "version" else mine == value
            if not is_same:
                found.append(f"{name} {_show(mine)}, here {_show(value)}")
        return found

    def check(self, *, allow_mismatch: bool, **here: Any) -> None:
        """Refuse what differs, or warn of it.

        Args:
            allow_mismatch: Whether to warn instead.
            here: The fields as they are here; see `differences`.

        Raises:
            ValueError: Something differs and that is not allowed.
        """
        if not (found := self.differences(**here)):
            return
        message = f"the schedule was calibrated for {'; '.join(found)}."
        if not allow_mismatch:
            raise ValueError(f"{message} {REMEDY}.")
        warnings.warn(f"{message} What it loses here was not measured.", stacklevel=3)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"tokens": list(self.tokens)}

    @classmethod
    def from_dict(cls, values: Any) -> "CalibratedFor":
        """Read what `to_dict` gave.

        Raises:
            ValueError: Not an object, or a field is missing, unknown or of another type.
        """
        known = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"calibrated_for must be an object with {sorted(known)}.")
        return cls(**values)


def package_version() -> str:
    """The version of nabla-attn that runs."""
    return collect_versions()["nabla_attn"]


def _series(version: str) -> str:
    found = re.match(r"\d+\.\d+", version)
    return found[0] if found else version


def _show(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
