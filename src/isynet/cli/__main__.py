"""`python -m isynet.cli` is `isynet`."""

from isynet.cli import app

app(prog_name="isynet")
