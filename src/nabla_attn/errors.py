"""Errors of other libraries in one line, and notes."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires


class Note(UserWarning):
    """Something good to know that asks nothing of the user, such as a wait that is coming."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its last stop, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


@contextmanager
def explain_missing(extra: str) -> Iterator[None]:
    """Turn a missing library into a `ValueError` with the command that installs an extra.

    Args:
        extra: Name of the extra that holds the library.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed. Run: {sys.executable} -m pip install "
            f"{install_arguments(extra)}"
        ) from None


def install_arguments(extra: str) -> str:
    """The libraries of an extra as arguments of pip, wherever this package was installed from."""
    try:
        lines = requires("nabla-attn") or []
    except PackageNotFoundError:  # run from its sources
        lines = []
    marked = re.compile(rf"""^([^;]+?)\s*;.*extra == ['"]{re.escape(extra)}['"]""")
    found = [match[1] for line in lines if (match := marked.match(line))]
    return " ".join(f"'{name}'" for name in found) or f"'nabla-attn[{extra}]'"
