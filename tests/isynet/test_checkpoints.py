"""Weights: safetensors with the architecture inside, and the authors' MindSpore checkpoints."""

import random
import zlib

import numpy as np
import pytest
import torch

import isynet
from isynet.checkpoint import architecture_of
from isynet.mindspore import CHECKSUM, read_checkpoint

SMALL = "1x5 2x3,1+ 1x3s,3+le2 h64"


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(name, array, kind="Float32", packed=False):
    if packed:
        dims = field(1, b"".join(varint(size) for size in array.shape))
    else:
        dims = b"".join(varint(1 << 3) + varint(size) for size in array.shape)
    tensor = dims + field(2, kind.encode()) + field(3, array.tobytes())
    return field(1, field(1, name.encode()) + field(2, tensor))


def authors_names(net, twin=""):
    """The checkpoint's name of every tensor, with gaps in the numbers of edges."""
    leaves = {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    }
    modules = dict(net.named_modules())
    layers = {"neck.0": "_conv_head", "neck.1": "_bn1", "fc": "_fc", "bn": "_bn2"}
    for name in net.state_dict():
        owner, leaf = name.rsplit(".", 1)
        if leaf == "num_batches_tracked":
            continue
        if "Norm" in type(modules[owner]).__name__:
            leaf = leaves[leaf]
        if owner in layers:
            yield name, f"head{twin}.{layers[owner]}.{leaf}"
        else:
            _, stage, block, _, edge, layer = owner.split(".")
            cell = f"content_cell.{stage}_{block}_{2 * int(edge)}"
            yield name, f"backbone{twin}.all_cells.0.{cell}.layers.{layer}.{leaf}"


def write_authors_checkpoint(net, path, twin="", extra=b""):
    state = net.state_dict()
    content = b"".join(
        entry(theirs, state[ours].numpy()) for ours, theirs in authors_names(net, twin)
    )
    path.write_bytes(entry(f"global_step{twin}", np.ones(1, np.float32)) + content + extra)


def randomize(net):
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1)
    return net


@pytest.fixture
def net():
    return randomize(isynet.create(SMALL, num_classes=7, in_chans=1)).eval()


def test_weights_carry_their_architecture(net, tmp_path):
    net.default_cfg["mean"] = (0.25,)
    isynet.save(net, tmp_path / "a.safetensors")
    again = isynet.create(tmp_path / "a.safetensors").eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(again(images), net(images))
    assert again.default_cfg == net.default_cfg
    assert again.architecture == net.architecture and again.num_classes == 7
    assert architecture_of(tmp_path / "a.safetensors") == net.architecture
    assert isynet.create(SMALL, 7, 1, weights=tmp_path / "a.safetensors").num_classes == 7


def test_another_number_of_classes_keeps_the_rest(net, tmp_path):
    isynet.save(net, tmp_path / "a.safetensors")
    other = isynet.create(tmp_path / "a.safetensors", num_classes=3)
    assert torch.equal(other.stages[0][0].edges[0][0].weight, net.stages[0][0].edges[0][0].weight)
    assert other.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 3)


def test_weights_that_do_not_fit_are_refused(net, tmp_path):
    file = tmp_path / "a.safetensors"
    isynet.save(net, file)
    with pytest.raises(ValueError, match="takes 1 channels"):
        isynet.create(file, in_chans=3)
    with pytest.raises(ValueError, match="not of isynet-n0"):
        isynet.create("isynet-n0", weights=file)
    with pytest.raises(ValueError, match="fused"):
        isynet.save(net.fused(), file)
    with pytest.raises(ValueError, match=r"\.safetensors"):
        isynet.save(net, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no file"):
        isynet.create(tmp_path / "b.safetensors")


def test_damaged_and_foreign_weights_are_clear_errors(net, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    isynet.save(net, file)
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-10], b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            isynet.load(file)
    state = net.state_dict()
    about = {"format": "isynet-1", "architecture": SMALL, "num_classes": "7", "in_chans": "1"}
    about |= {"has_last_norm": "1", "mean": "[0.5]", "std": "[0.5]"}
    for change in (
        {"num_classes": "99999999999"},
        {"num_classes": "many"},
        {"architecture": "1x3"},
        {"mean": "?"},
        {"in_chans": "-1"},
    ):
        save_file(state, file, metadata=about | change)
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
            isynet.load(file)
    save_file(state, file, metadata=about)
    isynet.load(file)
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"holds no ISyNet.*isynet convert"):
        isynet.load(file)


@pytest.mark.parametrize("twin", ["", "1"])
def test_authors_checkpoints_become_networks(net, tmp_path, twin):
    write_authors_checkpoint(net, tmp_path / "a.ckpt", twin)
    result = isynet.convert(tmp_path / "a.ckpt", architecture=SMALL)
    assert result == tmp_path / "a.safetensors"
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(isynet.create(result).eval()(images), net(images))


def test_the_second_of_a_pair_is_taken_on_request(net, tmp_path):
    other = randomize(isynet.create(SMALL, num_classes=7, in_chans=1)).eval()
    write_authors_checkpoint(other, tmp_path / "b.ckpt", "2")
    second = (tmp_path / "b.ckpt").read_bytes()
    write_authors_checkpoint(net, tmp_path / "a.ckpt", "1", second)
    images = torch.randn(2, 1, 32, 32)
    for is_peer, wanted in ((False, net), (True, other)):
        isynet.convert(
            tmp_path / "a.ckpt", tmp_path / "c.safetensors", architecture=SMALL, is_peer=is_peer
        )
        assert torch.equal(isynet.create(tmp_path / "c.safetensors").eval()(images), wanted(images))


def test_published_networks_are_recognised(tmp_path):
    net = isynet.create("isynet-n1-s1", num_classes=11)
    write_authors_checkpoint(net, tmp_path / "a.ckpt", "1")
    found = isynet.create(isynet.convert(tmp_path / "a.ckpt", tmp_path / "out.safetensors"))
    assert found.architecture == net.architecture and found.num_classes == 11


def test_an_architecture_that_does_not_fit_is_named(net, tmp_path):
    write_authors_checkpoint(net, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"fits none of isynet-n0.*Pass the architecture"):
        isynet.convert(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="does not fit the architecture 1x3"):
        isynet.convert(tmp_path / "a.ckpt", architecture="1x3")
    with pytest.raises(ValueError, match="second network"):
        isynet.convert(tmp_path / "a.ckpt", architecture=SMALL, is_peer=True)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*.tmp"))


def test_the_wire_format_is_read_as_protobuf_allows(tmp_path):
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    slices = 2 * entry("b", values, "Float16")
    file = tmp_path / "a.ckpt"
    content = entry("a", values, "Float16", packed=True)
    file.write_bytes(content + CHECKSUM + zlib.crc32(content).to_bytes(10, "big"))
    np.testing.assert_array_equal(read_checkpoint(file)["a"], values)
    file.write_bytes(content + CHECKSUM + (7).to_bytes(10, "big"))
    with pytest.raises(ValueError, match="checksum"):
        read_checkpoint(file)
    # A single number is written with the shape [0]; texts are left out.
    number = field(1, varint(1 << 3) + b"\0" + field(2, b"Int32") + field(3, b"\7\0\0\0"))[2:]
    file.write_bytes(
        content
        + field(1, field(1, b"epoch") + field(2, number))
        + field(1, field(1, b"note") + field(2, field(2, b"str") + field(3, b"hello")))
    )
    assert set(read_checkpoint(file)) == {"a", "epoch"} and read_checkpoint(file)["epoch"] == 7
    # Cut into entries of one name, each with the whole tensor's header.
    half = field(1, b"\x04\x03") + field(2, b"Float16") + field(3, values.tobytes())
    file.write_bytes(2 * field(1, field(1, b"b") + field(2, half)))
    assert read_checkpoint(file)["b"].shape == (4, 3)
    file.write_bytes(slices)
    with pytest.raises(ValueError, match="needs 12 bytes"):
        read_checkpoint(file)


def test_hostile_checkpoints_are_clear_errors(net, tmp_path):
    file = tmp_path / "a.ckpt"
    write_authors_checkpoint(net, file)
    whole = file.read_bytes()
    rng = random.Random(0)
    broken = [b"", b"PK\x03\x04 a zip", b"\x80\x02}q\x00.", whole[: len(whole) // 2], b"\xff" * 99]
    broken.append(entry("a", np.ones(3, np.float32), "Complex64"))
    broken.append(
        field(1, field(1, b"a") + field(2, varint(8) + varint(2**62) + field(2, b"Bool")))
    )
    for _ in range(60):
        damaged = bytearray(whole[:400])
        for _ in range(4):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        broken.append(bytes(damaged))
    for content in broken:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.ckpt"):
            isynet.convert(file, architecture=SMALL)
