"""Schedules by the path of their JSON, or by the name of one that comes with the package."""

from pathlib import Path

from nabla_attn.schedule import Schedule

FOLDER = Path(__file__).parents[1] / "moving_shapes" / "schedules"
"""The schedules of the built-in model, each calibrated for it."""


def load_schedule(source: str | Path) -> Schedule:
    """Read a schedule.

    Args:
        source: The path of a JSON file, or one of `schedule_names`.

    Raises:
        ValueError: There is no such schedule, or the file holds none.
    """
    shipped = FOLDER / f"{source}.json"
    path = shipped if str(source) in schedule_names() else Path(source)
    try:
        return Schedule.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"schedule {source}: No such file. Pass a JSON file that `nabla calibrate` wrote, or "
            f"one of {schedule_names()}."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"schedule {source}: {reason}") from error


def schedule_names() -> list[str]:
    """Names of the schedules that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))
