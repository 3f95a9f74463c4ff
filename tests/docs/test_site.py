import re
from pathlib import Path

import nabla_attn as na
from docs import site_hooks
from nabla_attn.cli.group import VERBS

ROOT = Path(__file__).parents[2]


def test_every_public_name_has_its_place_in_the_reference():
    page = (ROOT / "docs/reference/python.md").read_text()
    assert set(re.findall(r"^::: nabla_attn\.(\w+)$", page, re.M)) == set(na.__all__)


def test_every_verb_has_its_place_in_the_command_reference():
    headings = re.findall(r"^## `nabla (\w+)`$", site_hooks.command_reference(), re.M)
    assert headings == list(VERBS)


def test_links_lead_from_the_repository_to_the_site():
    move = site_hooks.move_links
    assert move("[a](docs/cli.md#bench)", "README.md", "index.md") == "[a](cli.md#bench)"
    assert move("![a](docs/images/a.png)", "README.md", "index.md") == "![a](images/a.png)"
    assert move("[a](../docs/cli.md)", "comfyui/README.md", "comfyui.md") == "[a](cli.md)"
    assert move("[a](../../comfyui/README.md)", "docs/x/y.md", "x/y.md") == "[a](../comfyui.md)"
    assert (
        move("[a](https://b.c/d) [e](#f)", "README.md", "index.md") == "[a](https://b.c/d) [e](#f)"
    )
