import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.studio.pair import Made, Step, make_pair

REQUEST = GenerationRequest(
    prompt="red circle", height=64, width=64, frames=5, steps=2, sparse_algo="nabla-0.4"
)


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


def test_dense_then_sparse_with_steps_between(pipeline):
    events = list(make_pair(pipeline, REQUEST))
    dense, sparse = (event for event in events if isinstance(event, Made))
    assert dense.record.config["sparse_algo"] == "dense"
    assert dense.maps is None
    assert sparse.maps.algorithm == "nabla-0.4"
    assert Step("nabla-0.4", "denoise", 1, 2) in events
    expected, _ = generate(pipeline, REQUEST)
    assert np.array_equal(sparse.frames, expected)


def test_closing_stops_the_work_and_leaves_the_model_clean(pipeline):
    pair = make_pair(pipeline, replace(REQUEST, steps=40))
    for event in pair:
        if event == Step("dense", "denoise", 1, 40):
            break
    before = threading.active_count()
    pair.close()
    assert threading.active_count() == before - 1
    pair = make_pair(pipeline, REQUEST)
    for event in pair:
        if isinstance(event, Step) and event.algo == "nabla-0.4" and event.done == 1:
            break
    pair.close()
    assert not hasattr(pipeline.transformer, "_nabla_attn")


def test_errors_reach_the_caller(pipeline):
    with pytest.raises(ValueError, match="height 65"):
        list(make_pair(pipeline, replace(REQUEST, height=65)))


def test_the_page(tiny_wan, pipeline):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    from nabla_attn.studio.page import Studio, build_studio

    page = build_studio([str(tiny_wan)], lambda name: pipeline)
    assert page.max_threads
    studio = Studio([str(tiny_wan)], lambda name: pipeline)
    answers = list(studio.run("red circle", str(tiny_wan), "NABLA", 0.4, 64, 64, 5, 2, 0))
    dense, sparse, facts, viewer = answers[-1]
    assert dense != sparse
    assert "of the token pairs" in facts
    assert 'sandbox="allow-scripts"' in viewer
    assert any("step 1 of 2" in answer[2] for answer in answers)
    whole = list(studio.run("red circle", str(tiny_wan), "top-k", 1.0, 64, 64, 5, 2, 0))[-1]
    assert "Identical to dense." in whole[2]
    assert studio.sizes_of(str(tiny_wan))[:2] == (480, 832)
    for wrong in (
        ("x", "elsewhere", "NABLA", 0.4, 64, 64, 5, 2, 0),
        ("x", str(tiny_wan), "NABLA", 0.4, 65, 64, 5, 2, 0),
        ("x", str(tiny_wan), "NABLA", 9, 64, 64, 5, 2, 0),
        ("x", str(tiny_wan), "NABLA", 0.4, None, 64, 5, 2, 0),
    ):
        with pytest.raises(gradio.Error):
            list(studio.run(*wrong))
    with pytest.raises(gradio.Error, match="height must be a whole number"):
        list(studio.run("x", str(tiny_wan), "NABLA", 0.4, None, 64, 5, 2, 0))
    with pytest.raises(ValueError, match="model directory not found"):
        build_studio([str(tiny_wan), "nowhere"], lambda name: pipeline)


def test_any_error_is_said_on_the_page(tiny_wan):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    from nabla_attn.studio.page import build_studio, launch

    def load(name):
        raise RuntimeError("out of memory")

    page = build_studio([str(tiny_wan)], load)
    client = Client(launch(page, "127.0.0.1", 0), verbose=False)
    with pytest.raises(AppError, match="out of memory"):
        client.predict("x", str(tiny_wan), "NABLA", 0.4, 64, 64, 5, 2, 0, api_name="/run")
    page.close()


def test_videos_are_those_of_generate(pipeline, tiny_wan, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from nabla_attn.studio import page

    model = shutil.copytree(tiny_wan, tmp_path / "model")
    (model / "defaults.json").write_text('{"guidance": 3.5}')
    requests = []
    monkeypatch.setattr(page, "make_pair", lambda pipeline, request: requests.append(request))
    studio = page.Studio([str(model)], lambda name: pipeline)
    with pytest.raises(AttributeError):
        list(studio.run("red", str(model), "NABLA", 0.4, 64, 64, 5, 2, 0))
    assert requests[0].guidance == 3.5
