"""The command: tables, JSON, and one line on bad input."""

import json

import pytest
from typer.testing import CliRunner

import isynet
from isynet.cli import IsynetGroup, app

SMALL = "1x3 2x3,1+ h0"


def run(*args):
    return CliRunner().invoke(app, list(args))


def as_json(*args):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("verb", IsynetGroup.verbs)
def test_every_verb_has_help(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_list_and_show():
    rows = as_json("list")["rows"]
    assert [row["name"] for row in rows][:2] == ["isynet-n0", "isynet-n1"] and len(rows) == 8
    assert "isynet-n3-s2" in run("list").stdout
    parts = as_json("show", SMALL, "--size", "64", "--num-classes", "5")["rows"]
    assert [part["pixels"] for part in parts] == [32, 16, 1]
    whole = isynet.count(SMALL, 64, num_classes=5)
    assert sum(part["M MACs"] for part in parts) * 1e6 == pytest.approx(whole.matrix)


def test_mem_of_networks_and_attention():
    rows = as_json(
        "mem", "n0", "resnet18", "--machine", "ascend310", "--attention", "4096,8,64,0.1"
    )["rows"]
    assert [row["name"] for row in rows] == ["n0", "resnet18", "attention 4096,8,64,0.1"]
    assert all(0 < row["MEM ascend310"] < 1 for row in rows)
    assert rows[0]["predicted ms"] == pytest.approx(0.43, rel=0.07)


def test_convert_and_export(tmp_path):
    pytest.importorskip("onnxruntime")
    isynet.save(isynet.create(SMALL, 5), tmp_path / "a.safetensors")
    file = tmp_path / "a.onnx"
    done = as_json("export", str(tmp_path / "a.safetensors"), "--output", str(file), "--size", "32")
    assert done["error"] < 1e-5 and file.is_file()


QUICK = ("--data", "shapes", "--size", "16", "--steps", "3", "--batch", "8", "--runtime", "torch")


def test_a_machine_is_measured_searched_scaled_and_trained_for(tmp_path, monkeypatch):
    """The verbs of the tutorial, one after the other, at the smallest size."""
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    nets = ("isynet-n0", "mobilenet-v2", "squeezenet")
    sizes = ("--size", "64", "--batch", "1", "--runtime", "torch")
    measured = as_json("measure", *nets, *sizes)
    assert {row["name"] for row in measured["networks"]} == set(nets)
    assert 0 < as_json("mem", "resnet18", "--machine", "here")["rows"][0]["MEM here"] <= 1

    space = ("--stages", "2", "--heads", "0", "--population", "2", "--generations", "1")
    band = ("--latency-ms", "50", "--least", "0", "--rungs", "1", "--validation", "64")
    found = as_json("search", *band, *space, *QUICK)
    assert isynet.parse(found["best"]) and len(found["candidates"]) == 2
    assert as_json("search", *band, *space, *QUICK) == found

    cheap = ("--added", "1", "--seeds", "1", "--validation", "64", "--measured")
    scaled = as_json("scale", "1x3 1x3 h0", "--latency-ms", "50", *cheap, *QUICK)
    assert isynet.parse(scaled["scaled"][0]["architecture"]).num_blocks > (1, 1)
    assert scaled["scaled"][0]["measured ms"] > 0

    trained = as_json("train", "--model", "out/search", *QUICK[:-2])
    assert trained["architecture"] == found["best"]
    weights = "out/train/weights.safetensors"
    again = as_json("train", "--model", weights, "--output", "b", *QUICK[:-2])
    assert again["architecture"] == found["best"]
    pytest.importorskip("onnxruntime")
    assert as_json("export", weights, "--size", "16")["error"] < 1e-4


def test_bench_of_spaces():
    own, twin = as_json("bench", "space", "--samples", "6", "--size", "64", "--stages", "3")["rows"]
    assert twin["mean MEM"] < own["mean MEM"]
    assert own["q0.1"] <= own["q0.5"] <= own["q0.9"]


def test_bench_of_scaling_and_downstream(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("isynet.comparison.WIDTHS", (8,))
    wide = ("--latency-ms", "1000", "--seeds", "1")
    (row,) = as_json("bench", "scaling", "1x3 1x3 h0", "--gains", "0,1", *wide, *QUICK)["rows"]
    assert row["scaled"]["architecture"].startswith("1x3 17x3")
    pytest.importorskip("pycocotools")
    pytest.importorskip("sklearn")
    small = ("--objects", "shapes", "--objects-size", "32", "--few-steps", "2")
    tests = ("--objects-steps", "2", "--test-images", "4", "--shots", "2", "--peer", "resnet8")
    args = ("bench", "downstream", "1x3 1x3 1x3 h0", *wide, *small, *tests, *QUICK)
    rows = as_json(*args)["rows"]
    assert rows[1]["network"] == "resnet8 8" and set(rows[0]["ahead"]) == set(rows[0]["seeds"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("bench", "scaling", "n0", "--gains", "x", "--latency-ms", "1"), ["'x'"]),
        (("show", "n9"), ["n9", "isynet-n0"]),
        (("show", "1x4"), ["unknown edge '4'"]),
        (("show", "nowhere.json"), ["nowhere.json"]),
        (("show", "n0", "--size", "0"), ["--size"]),
        (("mem",), ["name a network"]),
        (("mem", "--attention", "3,4"), ["TOKENS,HEADS,DIM"]),
        (("mem", "--attention", "3,4,5,2"), ["density"]),
        (("mem", "n0", "--machine", "abacus"), ["abacus"]),
        (("convert", "nowhere.ckpt"), ["nowhere.ckpt"]),
        (("export", SMALL, "--output", "a.txt"), [".onnx", "a.txt"]),
        (("measure", "resnet19"), ["resnet19", "resnet18"]),
        (("measure", "n0", "--runtime", "abacus"), ["unknown network 'n0'"]),
        (("search", "--latency-ms", "1", "--data", "nowhere"), ["nowhere", "shapes"]),
        (("search", "--latency-ms", "1", "--data", "shapes", "--edges", "4"), ["edge '4'"]),
        (("search", "--latency-ms", "1", "--data", "shapes", "--stages", "x"), ["'x'"]),
        (("scale", "n0", "--latency-ms", "1", "--data", "shapes", "--gains", "1"), ["gains"]),
        (("scale", "n0", "--latency-ms", "1", "--data", "shapes", "--added", "0"), ["1 block"]),
        (("train", "--data", "shapes", "--device", "abacus", "--steps", "1"), ["abacus"]),
        (("train", "--data", "shapes", "--model", "."), ["finished search"]),
        (("train", "--data", "shapes", "--augment", "11"), ["augment"]),
        (("dance",), ["dance"]),
    ],
)
def test_bad_input_is_one_line(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # No machine is measured for what is refused.
    monkeypatch.setattr("isynet.latency.LatencyTable.fit_factor", None)
    result = run(*args)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), lines[0]
