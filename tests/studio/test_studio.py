import os
import re
import shutil
import sys
import threading
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tests.processes import exit_codes, start_process

from nabla_attn.config import parse
from nabla_attn.generation.generate import generate
from nabla_attn.generation.pipeline import load_pipeline
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.moving_shapes.scene import HELD_OUT, parse_caption
from nabla_attn.studio import pair
from nabla_attn.studio.pair import FinishedVideo, Step, make_pair
from nabla_attn.studio.session import (
    BLOCKS,
    ESTIMATES,
    RULES,
    WINDOWS,
    Studio,
    compose_algorithm,
    read_controls,
)

REQUEST = GenerationRequest(
    prompt="red circle", height=64, width=64, frames=5, steps=2, sparse_algo="nabla-0.4"
)


@pytest.fixture(scope="module")
def pipeline(tiny_wan):
    return load_pipeline(tiny_wan, device="cpu", dtype="float32")


def test_dense_then_sparse_with_steps_between(pipeline):
    events = list(make_pair(pipeline, REQUEST))
    dense, sparse = (event for event in events if isinstance(event, FinishedVideo))
    assert dense.record.config["sparse_algo"] == "dense"
    assert dense.maps is None
    assert sparse.maps.algorithm == "nabla-0.4"
    assert Step("nabla-0.4", "denoise", 1, 2) in events
    expected, _ = generate(pipeline, REQUEST)
    assert np.array_equal(sparse.frames, expected)


def test_what_is_compiled_is_compiled_before_the_seconds_count(pipeline, monkeypatch):
    calls = []

    def heard(name):
        real = getattr(pair, name)

        def call(pipeline, request, **options):
            calls.append((name, request.sparse_algo))
            return real(pipeline, request, **options)

        monkeypatch.setattr(pair, name, call)

    heard("warm_up")
    heard("generate")
    list(make_pair(pipeline, REQUEST))
    algorithm = REQUEST.sparse_algo
    assert calls == [("generate", "dense"), ("warm_up", algorithm), ("generate", algorithm)]


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


def test_controls_compose_every_kind_of_algorithm():
    assert compose_algorithm("NABLA", 0.7, "none", "default") == "nabla-0.7"
    assert (
        compose_algorithm("NABLA", 0.4, "11-3-3", "1-16-16") == "nabla-0.4_sta-11-3-3_block-1-16-16"
    )
    assert compose_algorithm("top-k", 0.25, "none", "4-4-4") == "topk-0.25_block-4-4-4"
    assert compose_algorithm("window only", 0.7, "3-3-3", "default") == "sta-3-3-3"
    with pytest.raises(ValueError, match="needs the sides"):
        compose_algorithm("window only", 0.7, "none", "default")
    assert compose_algorithm("top-k", 0.05, "none", "default", "first") == "topk-0.05_tail-first"
    for rule, window, block, tail in product(RULES, WINDOWS, BLOCKS, ESTIMATES):
        if (rule, window) != ("window only", "none"):
            algorithm = compose_algorithm(rule, 0.5, window, block, tail)
            if rule != "window only":
                assert read_controls(algorithm) == (rule, 0.5, window, block, tail)


def test_examples_are_what_the_built_in_model_was_trained_on():
    pytest.importorskip("gradio", reason="gradio is not installed")
    from nabla_attn.studio.page import EXAMPLES

    for prompt, adapter, algorithm, _ in EXAMPLES:
        words = parse_caption(prompt)
        triples = {(shape.colour, shape.kind, shape.direction) for shape in words.shapes}
        assert triples.isdisjoint(HELD_OUT)
        assert adapter in ("none", "builtin")
        assert not parse(algorithm).is_dense


def load_nothing_else(pipeline):
    return lambda name, lora: pipeline


def test_the_page(tiny_wan, pipeline):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    from nabla_attn.studio.page import build_studio

    model, load = str(tiny_wan), load_nothing_else(pipeline)
    assert build_studio([model], load).max_threads
    studio = Studio([model], load)
    answers = list(studio.run("red circle", model, "none", "nabla-0.4", 64, 64, 5, 2, 0))
    dense, sparse, summary, viewer = answers[-1]
    assert dense != sparse
    assert "of the token pairs" in summary
    assert 'sandbox="allow-scripts"' in viewer
    assert any("step 1 of 2" in answer[2] for answer in answers)
    whole = list(studio.run("red circle", model, "none", "topk-1", 64, 64, 5, 2, 0))[-1]
    assert "kept **100.0%**" in whole[2]
    blocks = list(
        studio.run(
            "red", model, "none", "nabla-0.4_sta-3-3-3_block-1-4-4_tail-first", 64, 64, 5, 2, 0
        )
    )[-1]
    assert "nabla-0.4_sta-3-3-3_block-1-4-4_tail-first" in blocks[2]
    assert studio.defaults_of(model, "none").height == 480
    assert studio.defaults_of(model, "none").sparse_algo == "nabla-0.7"  # its own is dense
    for wrong in (
        ("x", "elsewhere", "none", "nabla-0.4", 64, 64, 5, 2, 0),
        ("x", model, "elsewhere", "nabla-0.4", 64, 64, 5, 2, 0),
        ("x", model, "none", "nabla-0.4", 65, 64, 5, 2, 0),
        ("x", model, "none", "nabla-9", 64, 64, 5, 2, 0),
        ("x", model, "none", "dense", 64, 64, 5, 2, 0),
    ):
        with pytest.raises(gradio.Error):
            list(studio.run(*wrong))
    with pytest.raises(gradio.Error, match="height must be a whole number"):
        list(studio.run("x", model, "none", "nabla-0.4", None, 64, 5, 2, 0))
    with pytest.raises(ValueError, match="model directory not found"):
        build_studio([model, "nowhere"], load)


def test_an_adapter_is_loaded_with_its_model(tiny_wan, pipeline):
    pytest.importorskip("gradio", reason="gradio is not installed")
    model, asked = str(tiny_wan), []

    def load(name, lora):
        asked.append((name, lora))
        return pipeline

    studio = Studio([model], load, ["builtin"])
    for adapter in ("builtin", "builtin", "none"):
        list(studio.run("red", model, adapter, "nabla-0.4", 64, 64, 5, 1, 0))
    assert asked == [(model, ("builtin",)), (model, ())]
    assert studio.defaults_of(model, "builtin").sparse_algo == "topk-0.05_tail-first"


def test_closing_removes_the_videos(tiny_wan, pipeline):
    pytest.importorskip("gradio", reason="gradio is not installed")
    studio = Studio([str(tiny_wan)], load_nothing_else(pipeline))
    *_, last = studio.run("red", str(tiny_wan), "none", "nabla-0.4", 64, 64, 5, 1, 0)
    assert Path(last[0]).is_file()
    studio.close()
    assert not studio.cache.parent.exists()


@pytest.fixture
def served(tiny_wan):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from nabla_attn.studio.page import build_studio, launch

    def load(name, lora):
        raise RuntimeError("out of memory")

    page = build_studio([str(tiny_wan)], load)
    yield launch(page, "127.0.0.1", 0, ["studio.example"])
    page.close()


def test_any_error_is_said_on_the_page(served, tiny_wan):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(served, verbose=False)
    with pytest.raises(AppError, match="out of memory"):
        client.predict("x", str(tiny_wan), "none", "nabla-0.4", 64, 64, 5, 2, 0, api_name="/run")


def test_pages_of_other_sites_and_foreign_names_are_refused(served):
    httpx = pytest.importorskip("httpx")
    own = served.removeprefix("http://").rstrip("/")
    port = own.rpartition(":")[2]
    for host in (own, f"localhost:{port}", f"[::1]:{port}", "studio.example", "STUDIO.example:443"):
        assert httpx.get(served, headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", f"127.0.0.1.evil.example:{port}", "", "[x"):
        answer = httpx.get(served, headers={"Host": host})
        assert answer.status_code in (400, 403), host
    address = f"{served}gradio_api/queue/join"
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert httpx.post(address, json={}, headers={"Origin": origin}).status_code == 403
        assert httpx.get(served, headers={"Origin": origin}).status_code == 403
    assert httpx.get(served, headers={"Origin": f"http://{own}"}).status_code == 200


def test_nothing_can_be_uploaded(served):
    httpx = pytest.importorskip("httpx")
    files = {"files": ("x.mp4", b"0" * 100_000)}
    assert httpx.post(f"{served}gradio_api/upload", files=files).status_code == 413


def serve(model, said):
    """`nabla studio` on the CPU; what it says goes to a file."""
    import nabla_attn.cli.options as options
    from nabla_attn.cli import app

    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    options.load_quietly = lambda name, device, dtype, lora: load_pipeline(name, device="cpu")
    app(["studio", "--model", str(model), "--port", "0"])


def test_sigterm_removes_the_videos_even_while_one_is_made(tiny_wan, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client

    place = tmp_path / "temporary"
    place.mkdir()
    said = tmp_path / "said"
    process = start_process(serve, tiny_wan, said, TMPDIR=str(place))
    try:
        while not (said.exists() and "\n" in said.read_text()):
            assert process.is_alive()
            time.sleep(0.05)
        address = re.search(r"http://\S+", said.read_text())[0]
        client = Client(address, verbose=False, download_files=False)
        asked = ("x", str(tiny_wan), "none", "nabla-0.4", 64, 64, 5, 20, 0)
        job = client.submit(*asked, api_name="/run")
        while not list(place.rglob("*.mp4")):  # the dense one; the sparse one is under way
            assert not job.done()
            time.sleep(0.05)
        process.terminate()
        assert exit_codes([process]) == [143]
    finally:
        process.kill()
    assert list(place.rglob("*.mp4")) == []


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    from typer.testing import CliRunner

    from nabla_attn.cli import app

    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["studio"])
    assert result.exit_code == 2
    assert f"Run: {sys.executable} -m pip install 'gradio" in result.output


def test_videos_are_those_of_generate(pipeline, tiny_wan, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from nabla_attn.studio import session

    model = shutil.copytree(tiny_wan, tmp_path / "model")
    (model / "defaults.json").write_text('{"guidance": 3.5}')
    requests = []
    monkeypatch.setattr(session, "make_pair", lambda pipeline, request: requests.append(request))
    studio = Studio([str(model)], load_nothing_else(pipeline))
    with pytest.raises(AttributeError):
        list(studio.run("red", str(model), "none", "nabla-0.4", 64, 64, 5, 2, 0))
    assert requests[0].guidance == 3.5
