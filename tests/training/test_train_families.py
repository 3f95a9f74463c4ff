"""The loop knows no family: the same few lines train all of them."""

import pytest
import torch
from tests.training import tiny_pipelines as tiny
from tests.training.clips import small_config

from nabla_attn.training.check import probe
from nabla_attn.training.data import WorldSet
from nabla_attn.training.model import Parts
from nabla_attn.training.setup import prepare
from nabla_attn.training.train import finish
from nabla_attn.training.trainer import Trainer

SIZES = {"cogvideox15": (5, 32, 48), "ltx": (9, 32, 64), "mochi": (7, 32, 48)}
KINDS = [
    "skyreels",
    "hunyuan",
    "hunyuan15",
    "motif",
    "easyanimate",
    "ltx",
    "cogvideox",
    "cogvideox15",
    "kandinsky5",
    "mochi",
]


@pytest.mark.parametrize("recipe", ["finetune", "distill"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_family_trains_and_its_weights_load(kind, recipe, tmp_path):
    pipeline = getattr(tiny, kind)()
    pipeline.save_pretrained(tmp_path / "model")
    frames, height, width = SIZES.get(kind, (5, 32, 48))
    clips = WorldSet(pipeline, clips=3, frames=frames, height=height, width=width)
    entries = []
    config = small_config(
        recipe, steps=2, sparsity__algorithm="nabla-0.5", data__validation=1, objective__shift=2
    )
    # Stand-ins for large text encoders cannot be loaded, so the parts are handed over.
    parts = Parts(
        tmp_path / "model", "transformer", pipeline.transformer, pipeline.scheduler, type(pipeline)
    )
    run = prepare(config, parts, clips)
    probe(run)
    trainer = Trainer(run, tmp_path / "run", report=entries.append)
    trainer.fit()
    result = finish(run, trainer)
    assert len(entries) == 2 and entries[-1].numbers["skipped"] == 0
    assert entries[-1].layers and entries[-1].numbers["validation"] >= 0
    loaded = type(pipeline.transformer).from_pretrained(result / "transformer")
    trained = dict(pipeline.transformer.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in loaded.named_parameters())
