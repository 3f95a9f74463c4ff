"""Errors of other libraries, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its last stop, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
