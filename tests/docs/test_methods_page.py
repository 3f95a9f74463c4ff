"""docs/methods.md: its list is that of the package, and its example passes its own check."""

import re

from benchmarks.pages.methods import build_list
from tests.docs.test_site import ROOT
from typer.testing import CliRunner

from nabla_attn import methods
from nabla_attn.cli import app

PAGE = (ROOT / "docs/methods.md").read_text()


def test_the_list_is_that_of_the_package():
    assert build_list() in PAGE, "make pages writes it"


def test_the_example_passes_its_own_check(monkeypatch):
    monkeypatch.setattr(methods, "_OWN", {})
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(code, "methods.md", "exec"), {"__name__": "methods"})
    assert "nearkeys" in methods.names()


def test_info_lists_every_method():
    result = CliRunner().invoke(app, ["info", "--methods"])
    assert result.exit_code == 0, result.output
    for name in methods.NAMES:
        assert methods.find(name).form.split("-")[0] in result.stdout
