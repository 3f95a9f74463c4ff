"""Every tutorial runs, at a small size."""

import re
from pathlib import Path

import pytest

from docs import site_hooks

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
SMALL = 'SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}'


@pytest.mark.parametrize("script", sorted(TUTORIALS.glob("*.py")), ids=lambda path: path.stem)
def test_tutorials_run(script, capsys):
    code = re.sub(r"^SIZE = .*$", SMALL, script.read_text(), flags=re.MULTILINE)
    exec(compile(code, script.name, "exec"), {"__name__": "__main__"})
    assert "density" in capsys.readouterr().out


def test_cells_become_a_page():
    page = site_hooks.script_page("# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1  # c\n")
    assert page == "# A\n\nb\n\n```python\nx = 1  # c\n```\n"
