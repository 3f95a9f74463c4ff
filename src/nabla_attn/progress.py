"""How long work tells its caller where it is."""

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""Called with the name of a stage, the units of it that are done, and the units in all."""


def ignore_progress(stage: str, done: int, total: int) -> None:
    """The callback of a caller who does not want to know."""
