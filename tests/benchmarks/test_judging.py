import pytest
import torch

from benchmarks import judging
from nabla_attn.generation.request import GenerationRequest
from nabla_attn.moving_shapes import describe, held_out_scenes, render
from nabla_attn.record import RunRecord

REQUEST = GenerationRequest("", height=64, width=64, frames=9, sparse_algo="nabla-0.7")


class Model(torch.nn.Linear):
    dtype = torch.float32


class Pipeline:
    def __init__(self):
        self.config = {"_name_or_path": "somewhere"}
        self.device = torch.device("cpu")
        self.transformer = Model(1, 1)


@pytest.fixture
def generated(monkeypatch):
    """Replace generation by rendered truth; the third prompt is answered with the first scene."""
    scenes, calls = {describe(s): s for s in held_out_scenes(16)}, []

    def generate(pipeline, request):
        calls.append(request)
        scene = held_out_scenes(1)[0] if request.seed == 2 else scenes[request.prompt]
        numbers = {"attention": {"density": 0.25}, "seconds": {"transformer": request.seed}}
        record = RunRecord("generate", {}, request.seed, {}, "cpu", numbers)
        return render(scene, request.frames, request.height, request.width), record

    monkeypatch.setattr(judging, "generate", generate)
    return calls


def test_summary(generated):
    record = judging.judge_prompts(Pipeline(), REQUEST, 4)
    summary = record.numbers["summary"]
    assert record.numbers["count"] == 4 and record.config["sparse_algo"] == "nabla-0.7"
    assert summary["density"] == 0.25 and summary["transformer_seconds"] == 1.5
    assert summary["right"]["number"] == 1 and summary["right"]["direction"] == 0.75
    assert [request.seed for request in generated] == [0, 1, 2, 3]


def test_an_interrupted_run_goes_on(generated, tmp_path):
    path = tmp_path / "record.json"

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judging.judge_prompts(Pipeline(), REQUEST, 4, path=path, report=stop)
    record = judging.judge_prompts(Pipeline(), REQUEST, 4, path=path)
    assert len(generated) == 4
    assert RunRecord.load(path).numbers == record.numbers
    assert judging.judge_prompts(Pipeline(), REQUEST, 4, path=path).numbers == record.numbers
    assert len(generated) == 4


def test_other_settings_do_not_mix(generated, tmp_path):
    path = tmp_path / "record.json"
    judging.judge_prompts(Pipeline(), REQUEST, 1, path=path)
    with pytest.raises(ValueError, match="other settings"):
        judging.judge_prompts(Pipeline(), REQUEST.with_algo("nabla-0.4"), 1, path=path)
    rounded = Pipeline()
    rounded.transformer.dtype = torch.bfloat16
    with pytest.raises(ValueError, match="dtype 'float32', now 'bfloat16'"):
        judging.judge_prompts(rounded, REQUEST, 1, path=path)
