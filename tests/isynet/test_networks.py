"""The networks: strings, the authors' files, parameters, operations and recorded logits."""

import json
import re

import numpy as np
import pytest
import torch

import isynet
from isynet.authors_json import from_json, to_json
from isynet.counting import table_macs
from isynet.family import FAMILY, PUBLISHED, find_architecture
from isynet.mindspore import to_state_dict
from isynet.network import FeatureMaps
from isynet.peers import PEERS, peer

PARAMETERS = {
    "isynet-n0": 9_593_272,
    "isynet-n1": 7_424_568,
    "isynet-n1-s1": 7_820_856,
    "isynet-n1-s2": 8_858_424,
    "isynet-n1-s3": 10_812_984,
    "isynet-n2": 19_425_720,
    "isynet-n3": 20_468_424,
    "isynet-n3-s2": 28_469_704,
}
SMALL = "1x5 2x3,1+ 1x3s,3+le2 h64"


def on_meta(make):
    with torch.device("meta"):
        return make()


def golden_state(net, names):
    """Weights and input of the recorded logits, from one generator; see the golden README."""
    rng = np.random.default_rng(0)
    ours = {theirs: name for name, theirs in to_state_dict(names).items()}
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    state = {}
    for name in names:
        shape = shapes[ours[name]]
        if name.endswith(("gamma", "moving_variance")):
            values = 0.3 + 0.4 * rng.random(shape)
        elif name.endswith(("beta", "moving_mean")):
            values = 0.2 * rng.standard_normal(shape)
        elif len(shape) > 1:
            values = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        else:
            values = 0.1 * rng.standard_normal(shape)
        state[ours[name]] = torch.from_numpy(values.astype(np.float32))
    images = rng.standard_normal((2, 3, 64, 64)).astype(np.float32)
    return state, torch.from_numpy(images)


@pytest.mark.parametrize("name", ["N0", "N1", "N1-S1", "N1-S3", "N3"])
def test_logits_equal_the_recorded_ones(golden, name):
    recorded = golden(f"isynet/{name}.npz")
    net = isynet.create(name, num_classes=1001).eval()
    state, images = golden_state(net, [str(item) for item in recorded["names"]])
    left = net.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in left.missing_keys)
    with torch.no_grad():
        for logits in (net(images), net.fused()(images)):
            error = np.abs(logits.numpy() - recorded["y"]).max() / np.abs(recorded["y"]).max()
            assert error < 2e-6


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_are_the_published_ones(name):
    net = on_meta(lambda: isynet.create(name))
    folded = sum(value.numel() for value in net.parameters()) - 2 * net.num_classes
    assert folded == PARAMETERS[name]
    if name in PUBLISHED:
        assert round(folded / 1e6, 2) == PUBLISHED[name].parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_equal_the_published_table(name):
    net = on_meta(lambda: isynet.create(name) if name in FAMILY else peer(name))
    assert f"{table_macs(net) / 1e9:.2f}" == f"{PUBLISHED[name].macs:.2f}"


@pytest.mark.parametrize(
    "text",
    [*FAMILY.values(), SMALL, "1x3", "2x7d,1+w2e3 h0", "1x1l 1x5s,3d+l h256", "3x3,3,3,3,3,3+ h1"],
)
def test_strings_come_back(text):
    assert str(isynet.parse(text)) == text
    assert isynet.create(text, num_classes=3, in_chans=1).num_classes == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["at least one stage", "BLOCKSx"]),
        ("0x3", ["blocks", "1 to 64", "got 0"]),
        ("1x", ["1x"]),
        ("1x9", ["unknown edge '9'", "7s"]),
        ("1x1s", ["unknown edge '1s'"]),
        ("1x3w1w2", ["twice"]),
        ("1x3++", ["twice"]),
        ("1x3e0", ["expansion", "1 to 8"]),
        ("1x3w9", ["width", "0 to 6"]),
        ("1x3 " * 9, ["stages", "1 to 8"]),
        ("1x3 h99999", ["head", "8192"]),
        ("h64", ["at least one stage"]),
        ("1x3,,3", ["unknown edge ''"]),
        ("1x3 extra", ["'extra'"]),
    ],
)
def test_bad_strings_say_what_is_wrong(text, words):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        isynet.parse(text)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"isynet-n9.*isynet-n1-s3"):
        isynet.create("isynet-n9")
    assert find_architecture("N1_S2") == find_architecture("isynet-n1-s2")


@pytest.mark.parametrize("text", [*FAMILY.values(), SMALL, "2x3,5s,1,1+l 1x7", "1x3,3,3,3,3l"])
def test_the_authors_format_goes_out_and_in(text, tmp_path):
    isynet.save_json(isynet.parse(text), tmp_path / "a.json")
    assert str(isynet.load_json(tmp_path / "a.json")) == text
    assert isynet.create(tmp_path / "a.json").architecture == isynet.parse(text)


def test_linear_counts_only_on_the_last_place():
    data = to_json(isynet.parse("1x3,1l"))
    operations = data["Blocks"]["0"]["operations"]
    operations[1], operations[3] = operations[3], operations[1]
    assert str(from_json(data)) == "1x3,1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("Blocks"), "Blocks"),
        (lambda data: data.update(nStages=4), "nStages"),
        (lambda data: data.update(nStages=10**12), "nStages"),
        (lambda data: data["Blocks"]["0"].update(skipType="concat"), "skipType.*noSkip, add"),
        (lambda data: data["Blocks"]["0"].update(lastActivation="Swish"), "lastActivation"),
        (lambda data: data["Blocks"]["0"].update(nBlocks="3"), "block 0.*whole number"),
        (lambda data: data["Blocks"]["0"].update(operations=[]), "operations"),
        (lambda data: data["Blocks"]["0"]["operations"][0].update(op="identity"), "halve"),
        (lambda data: data["Blocks"]["0"]["operations"][0].update(op="conv_2x2"), "conv_2x2"),
        (lambda data: data["Blocks"]["0"]["operations"][0].update(group=2), "group 1"),
        (lambda data: data["Blocks"].update({"0": None}), "operations"),
    ],
)
def test_foreign_json_is_a_clear_error(change, words, tmp_path):
    data = to_json(isynet.parse("1x3 1x3"))
    change(data)
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"a.json: .*{words}"):
        isynet.load_json(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["1x3d", "1x3l"])
def test_what_the_authors_format_cannot_say_is_refused(text):
    with pytest.raises(ValueError, match="authors' format"):
        to_json(isynet.parse(text))


@pytest.mark.parametrize("text", [SMALL, "1x3d,1 2x5s,3d+", "2x3+l h0"])
def test_fused_networks_give_the_same_logits(text):
    net = isynet.create(text, num_classes=7).train()
    images = torch.randn(4, 3, 40, 33)
    net(images)
    net.eval()
    fused = net.fused()
    assert not any("Norm" in type(module).__name__ for module in fused.modules())
    torch.testing.assert_close(fused(images), net(images), rtol=1e-4, atol=1e-5)
    assert any("Norm" in type(module).__name__ for module in net.modules())


def test_timm_conventions():
    net = isynet.create(SMALL, num_classes=7).eval()
    images = torch.randn(2, 3, 64, 48)
    features = net.forward_features(images)
    assert features.shape == (2, 64, 8, 6) and net.num_features == 64
    assert net.forward_head(features, pre_logits=True).shape == (2, 64)
    torch.testing.assert_close(net(images), net.forward_head(features))
    assert [info["num_chs"] for info in net.feature_info] == [16, 32, 64]
    assert [info["reduction"] for info in net.feature_info] == [2, 4, 8]
    net.reset_classifier(5)
    assert net(images).shape == (2, 5) and net.get_classifier().out_features == 5
    net.reset_classifier(0)
    assert net(images).shape == (2, 64)


def test_feature_maps_as_list_and_as_dictionary():
    maps = isynet.create(SMALL, features_only=True, out_indices=(0, 2))(torch.randn(1, 3, 32, 32))
    assert [tuple(x.shape) for x in maps] == [(1, 16, 16, 16), (1, 64, 4, 4)]
    backbone = FeatureMaps(isynet.create(SMALL), (-2,))
    assert backbone.channels == (32,) and backbone.reductions == (4,)
    assert list(backbone(torch.randn(1, 3, 32, 32))) == ["1"]
    with pytest.raises(ValueError, match="stages 0 to 2"):
        FeatureMaps(isynet.create(SMALL), (3,))


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\].*in_chans"):
        isynet.create(SMALL)(torch.randn(1, 1, 32, 32))


def test_timm_registers_on_call(monkeypatch):
    import sys
    import types

    registered = {}
    fake = types.ModuleType("timm.models")
    fake.register_model = lambda entry: registered.setdefault(entry.__name__, entry)
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.models", fake)
    isynet.register_timm()
    assert set(registered) == {name.replace("-", "_") for name in FAMILY}
    net = registered["isynet_n0"](pretrained=False, num_classes=4, cache_dir=None)
    assert net.num_classes == 4
    with pytest.raises(ValueError, match="no weights"):
        registered["isynet_n0"](pretrained=True)


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        # Parameters and multiply-accumulates at 224 pixels as their papers give them.
        ("resnet18", 11.69, 1.81),
        ("resnet50", 25.56, 4.09),
        ("resnext50", 25.03, 4.23),
        ("vgg16", 138.37, 15.47),
        ("mobilenet-v2", 3.50, 0.30),
        ("mobilenet-v1", 4.23, 0.57),
        ("regnetx-032", 15.30, 3.18),
        ("convnext-tiny", 28.59, 4.46),
        ("squeezenet", 1.24, 0.35),
    ],
)
def test_peers_have_their_published_size(name, millions, gmacs):
    net = on_meta(lambda: peer(name))
    assert sum(value.numel() for value in net.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.02
    )
    work = isynet.count(net)
    depthwise = sum(item.vector for item in work.operators if item.name == "depthwise")
    assert (work.matrix + depthwise) / 1e9 == pytest.approx(gmacs, abs=0.01)


def test_peers_are_counted_whole():
    assert len(PEERS) + len(FAMILY) >= 40
    # One of each family; the others have the same operators.
    for name in {name.split("-")[0].rstrip("0123456789"): name for name in PEERS}.values():
        assert not isynet.count(on_meta(PEERS[name])).unknown


@pytest.mark.parametrize("text", [SMALL, "1x3d 3x5s,3d+ 2x3,1+lw1 h0"])
def test_counting_an_architecture_is_counting_its_network(text):
    net = on_meta(lambda: isynet.create(text, 9, 2))
    fast = isynet.count(text, (40, 33), in_chans=2, num_classes=9)
    assert fast == isynet.count(net, (40, 33), in_chans=2)


def test_the_depthwise_twin_keeps_the_first_convolution():
    assert str(isynet.parse("1x5,3 2x1,3s+ h0").depthwise_twin()) == "1x5,3d 2x1,3d+ h0"


def test_importing_needs_torch_at_most():
    import subprocess
    import sys

    code = (
        "import sys, isynet; assert 'torch' not in sys.modules; isynet.create('n0');"
        "heavy = {'diffusers', 'transformers', 'scipy', 'onnx', 'torchvision', 'matplotlib'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
