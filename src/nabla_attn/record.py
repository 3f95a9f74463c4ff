"""RunRecord: what was run, where, and every number it gave. All figures shown come from one."""

import json
import math
import platform
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nabla_attn.files import parse_json, write_text

SCHEMA = 1
PACKAGES = ("nabla-attn", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class RunRecord:
    """The settings and results of one run, as JSON.

    Attributes:
        kind: Verb that made the record, such as `"generate"`.
        config: Request, in plain JSON values.
        seed: Random seed.
        versions: Version of each package, `"python"` included.
        device: Name of the GPU or processor, with its threads.
        numbers: Results, in plain JSON values; every number is finite, a missing one None.
        created: UTC time in ISO 8601.
        schema: Version of the format.
    """

    kind: str
    config: dict[str, Any]
    seed: int
    versions: dict[str, str]
    device: str
    numbers: dict[str, Any]
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            kind = {"config": dict, "versions": dict, "numbers": dict, "seed": int, "schema": int}
            wanted = kind.get(item.name, str)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(
                    f"run record: {item.name!r} must be {wanted.__name__}, "
                    f"got {type(value).__name__}."
                )
        if self.schema != SCHEMA:
            raise ValueError(
                f"run record: schema {self.schema} is not known here, only {SCHEMA}. "
                "Use the version of nabla-attn that wrote it."
            )
        for name in ("config", "versions", "numbers"):
            _check_plain(getattr(self, name), name)

    def to_json(self) -> str:
        """Return the record as indented JSON, ending in a newline."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Read a record back and check it.

        Raises:
            ValueError: The text is not JSON, or a field is missing, unknown or of the wrong type.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ValueError(f"run record: not valid JSON ({error}).") from error
        if not isinstance(data, dict):
            raise ValueError(f"run record: expected an object, got {type(data).__name__}.")
        known = {item.name for item in fields(cls)}
        if missing := known - data.keys():
            raise ValueError(f"run record: missing {', '.join(sorted(missing))}.")
        if unknown := data.keys() - known:
            raise ValueError(
                f"run record: unknown {', '.join(sorted(unknown))}. "
                f"Known: {', '.join(sorted(known))}."
            )
        return cls(**data)

    def save(self, path: str | Path) -> None:
        """Write the record to `path`, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "RunRecord":
        """Read the record at `path`.

        Its config and numbers raise ValueError for a name that they lack.

        Raises:
            ValueError: The file is no record; its path and the reason are named.
        """
        try:
            record = cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        config, numbers = (_known(each, str(path)) for each in (record.config, record.numbers))
        return replace(record, config=config, numbers=numbers)


class _Known(dict[str, Any]):
    """Values of a file, which is named where one is asked for that it lacks."""

    path = ""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.path}: the record lacks {name!r}. Make it again.")


def _known(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_known(each, path) for each in value]
    if not isinstance(value, dict):
        return value
    known = _Known({name: _known(inner, path) for name, inner in value.items()})
    known.path = path
    return known


def check_settings(path: Path, asked: dict[str, Any]) -> RunRecord:
    """Load the record of an interrupted run and check that its settings are those asked for.

    Args:
        path: File of the record.
        asked: Settings that its config must hold with equal values.

    Raises:
        ValueError: Settings differ; they are named.
    """
    record = RunRecord.load(path)
    found = record.config
    changed = [key for key, value in asked.items() if found.get(key) != value]
    if changed:
        raise ValueError(
            f"{path} was made with other settings: "
            + ", ".join(f"{key} {found.get(key)!r}, now {asked[key]!r}" for key in changed[:4])
            + ". Choose another output place."
        )
    return record


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = "not installed"
    return found


def describe_device(device: Any = "cpu") -> str:
    """Return the name of a torch device, such as `AMD EPYC (2 threads)` or `NVIDIA H200`."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return f"{device.type} on {platform.machine()}"
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    threads = torch.get_num_threads()
    return f"{name} ({threads} thread{'s' if threads > 1 else ''})"


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"run record: a key of {where} is {key!r}, not a string.")
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"run record: {where} is {value}. Write None for a missing number.")
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise ValueError(f"run record: {where} is a {type(value).__name__}, not a JSON value.")
