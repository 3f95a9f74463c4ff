"""`python -m nabla_attn.cli` is `nabla`."""

from nabla_attn.cli import app

app(prog_name="nabla")
