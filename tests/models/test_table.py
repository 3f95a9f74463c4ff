"""The table: documented, generated, refusing with reasons, open to classes of a user's own."""

import re
from pathlib import Path

import pytest
import torch
from benchmarks.pages import models as catalogue
from tests.models.tiny_models import TINY, relative_error

import nabla_attn as na
from nabla_attn.models import register_model, table
from nabla_attn.models.row import framepack_history, named_grid
from nabla_attn.models.table import ModelRow

ROWS = table._ROWS
DOCS = Path(__file__).parents[2] / "docs"


def test_documented_table_is_the_generated_one(tmp_path):
    copy = tmp_path / "models.md"
    copy.write_text((DOCS / "models.md").read_text())
    catalogue.write_table(copy)
    fresh = "run python -m benchmarks.pages"
    assert copy.read_text() == (DOCS / "models.md").read_text(), fresh
    (tmp_path / "empty.md").write_text("no table")
    with pytest.raises(ValueError, match="has no place for the table"):
        catalogue.write_table(tmp_path / "empty.md")


def test_every_row_that_works_is_tested_and_documented():
    names = {row.name for row in ROWS if row.refusal is None}
    assert names == {tiny.name for tiny in TINY.values()}
    assert names <= catalogue._documented()


def test_figures_agree_with_the_paper():
    # Self-attention is 73.4 % of the work at 80,640 tokens of Wan 14B (1280x768, 81 frames).
    usual = catalogue.Usual(family="", size="", grid=(21, 48, 80), dim=5120, weights=11.4)
    assert usual.tokens == 80_640
    assert usual.attention_share == pytest.approx(0.734, abs=0.002)
    assert usual.gain == pytest.approx(2.43, abs=0.02)


@pytest.mark.parametrize("row", [row for row in ROWS if row.refusal], ids=lambda row: row.name)
def test_refusals_say_why(row):
    stand_in = type(row.name, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=re.escape(row.refusal)):
        na.apply(stand_in, "nabla-0.5")


def test_the_documented_example_runs(capsys):
    text = (DOCS / "diffusers.md").read_text().split("## A model of your own")[1]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    exec(compile(code, "docs/diffusers.md", "exec"), {})
    assert "over 1 steps, 2 layers, 2 heads" in capsys.readouterr().out


class OtherNames(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = TINY["wan"].build()
        self.config = self.inner.config

    def forward(self, latents, time, text):
        return self.inner(latents, time, text).sample


class AnyNames(OtherNames):
    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs).sample


@torch.no_grad()
def test_forwards_with_other_arguments(monkeypatch):
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
    path, inputs = r"inner\.blocks\.\d+\.attn1", TINY["wan"].inputs(2, 8, 9)
    model = OtherNames()
    register_model("OtherNames", attention=path, grid=lambda model, names: (2, 8, 9))
    dense = model(*inputs.values())
    with na.apply(model, "nabla-1"):
        assert relative_error(model(*inputs.values()), dense) < 3e-6
    model = AnyNames()
    register_model("AnyNames", attention=path)
    with na.apply(model, "nabla-1"):
        assert relative_error(model(**inputs), dense) < 3e-6
        with pytest.raises(ValueError, match="no hidden_states, so the token grid is not known"):
            model(*inputs.values())


def test_rows_are_checked():
    with pytest.raises(ValueError, match="text must be"):
        register_model("Some", attention="x", text="inside")
    with pytest.raises(ValueError, match="needs the attention modules"):
        ModelRow(name="Some")
    register_model("Linear", attention=r"blocks\.\d+")
    with pytest.raises(ValueError, match=r"no attention module of Linear matches"):
        na.apply(torch.nn.Linear(1, 1), "nabla-0.5")


def test_subclasses_share_the_row_of_their_base():
    from diffusers import WanTransformer3DModel

    class FineTuned(WanTransformer3DModel):
        pass

    model = FineTuned(**TINY["wan"].config)
    with na.apply(model, "nabla-0.5"):
        assert model._nabla_attn.planner.row.name == "WanTransformer3DModel"


def test_grids_that_are_not_known():
    model = TINY["ltx"].build()
    with pytest.raises(ValueError, match=r"called without \['num_frames'\]"):
        named_grid(model, {"height": 3, "width": 4})
    assert framepack_history(model, {"latents_clean": torch.zeros(1, 4, 2, 7, 8)}) == 2 * 4 * 4
