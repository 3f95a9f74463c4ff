"""Data sets: files of others are checked, and what is drawn follows from the generator."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isynet.data.catalogue import open_objects, open_source
from isynet.data.folder import FolderImages
from isynet.data.idx import FASHION_FOLDER, read_idx, read_idx_folder
from isynet.data.scenes import DETECT, FashionScenes


def write_idx(path, array, packed=False):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count, packed in (("train", 30, True), ("t10k", 12, False)):
        end = ".gz" if packed else ""
        images = rng.integers(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{end}", images, packed)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{end}", np.arange(count) % 4, packed)
    return tmp_path


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(source, draw="draw"):
    indices = torch.tensor([3, 0, 5])
    first, second = (getattr(source, draw)(indices, generator(7))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (3, source.channels, source.size, source.size)
    assert first.min() >= 0 and first.max() <= 1
    return getattr(source, draw)(indices, generator(7))


def test_idx_files_packed_or_not(idx_folder):
    images, labels = read_idx_folder(idx_folder, "train")
    assert images.shape == (30, 28, 28) and labels.tolist()[:5] == [0, 1, 2, 3, 0]
    source = open_source(str(idx_folder), "test", 32)
    assert len(source) == 12 and source.classes == ("0", "1", "2", "3")
    _, found = same(source)
    assert found.tolist() == [3, 0, 1]
    plain, _ = source.draw(torch.tensor([3]), generator(), is_training=False)
    middle = plain[0, 0, 2:30, 2:30] * 255
    assert torch.equal(middle.round().byte(), read_idx_folder(idx_folder, "test")[0][3])
    assert plain[0, 0, :2].abs().max() == 0
    with pytest.raises(ValueError, match="at least 28"):
        open_source(str(idx_folder), "test", 20)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no idx file"),
        (b"\0\0\x0d\x01\0\0\0\1\0\0\0\0", "no idx file"),
        (b"\0\0\x08\x09", "within its header"),
        (b"\0\0\x08\x03\0\0\0\1\0\0\0\1\0\0\0\2x", "needs 2 bytes"),
        (b"\0\0\x08\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "needs"),
    ],
)
def test_damaged_idx_files_are_named(content, words, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=f"a .*{words}"):
        read_idx(tmp_path / "a")


def test_damaged_packing_and_missing_files_are_named(idx_folder):
    packed = idx_folder / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz"):
        open_source(str(idx_folder), "train", 28)
    (idx_folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(ValueError, match="no t10k-images-idx3-ubyte"):
        read_idx_folder(idx_folder, "test")


def test_numbers_that_differ_are_refused(idx_folder):
    write_idx(idx_folder / "t10k-labels-idx1-ubyte", np.zeros(11))
    with pytest.raises(ValueError, match="not as many"):
        read_idx_folder(idx_folder, "test")


@pytest.fixture
def picture_folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = (250 * label, 20 * number, 40)
                Image.new("RGB", (60 + 7 * number, 40), colour).save(folder / f"{number}.png")
    (tmp_path / "train" / "notes.txt").write_text("no class")
    return tmp_path


def test_folders_by_class(picture_folder):
    source = open_source(str(picture_folder), "train", 24)
    assert source.classes == ("cat", "dog") and len(source) == 8
    images, labels = same(source)
    assert labels.tolist() == [0, 0, 1]
    assert images[2, 0].mean() > 0.9 > images[0, 0].mean()
    test = open_source(str(picture_folder), "test", 24)
    assert len(test) == 4
    first, _ = test.draw(torch.tensor([1]), generator(0), is_training=False)
    again, _ = test.draw(torch.tensor([1]), generator(1), is_training=False)
    assert torch.equal(first, again)


def test_folders_that_are_none_say_so(picture_folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="no folder train"):
        FolderImages(empty, "train", 8)
    (empty / "train" / "one").mkdir(parents=True)
    with pytest.raises(ValueError, match="two folders of images"):
        FolderImages(empty, "train", 8)
    bad = picture_folder / "val" / "cat" / "0.png"
    bad.write_bytes(b"no picture")
    source = FolderImages(picture_folder, "test", 8)
    with pytest.raises(ValueError, match=r"0\.png"):
        source.draw(torch.arange(4), generator(), is_training=False)
    with pytest.raises(ValueError, match=r"no data set 'nowhere'.*fashion-scenes"):
        open_source("nowhere", "train", 32)


@pytest.mark.parametrize("split", ["train", "test"])
def test_stills_are_the_same_whatever_the_generator(split):
    source = open_source("shapes", split, 24)
    images, labels = same(source)
    assert torch.equal(images, source.draw(torch.tensor([3, 0, 5]), generator(1))[0])
    assert len(source.classes) == 18 and labels.max() < 18
    objects = open_objects("shapes", split, 48)
    pictures, found = same(objects, "draw_objects")
    for picture, item in zip(pictures, found, strict=True):
        for left, top, right, bottom in item.boxes.round().int().tolist():
            inside = picture[:, top:bottom, left:right]
            # The background has one grey; inside of a box there is a colour.
            assert inside.std(0).max() > 0.1
            assert 0 <= left < right <= 48 and 0 <= top < bottom <= 48


def squares(count=20):
    """Items that fill their pixels, so boxes can be told from pictures."""
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    images[:, 6:22, 4:24] = 255
    return images, torch.arange(count) % 3


def test_scenes_know_their_boxes():
    source = FashionScenes(*squares(), ("a", "b", "c"), 64, DETECT)
    _, objects = same(source, "draw_objects")
    numbers = [len(item.labels) for item in source.draw_objects(torch.arange(20), generator())[1]]
    assert set(numbers) <= {0, 1, 2, 3} and len(set(numbers)) > 1
    for item in objects:
        assert (item.boxes >= 0).all() and (item.boxes <= 64).all()
        assert (item.boxes[:, 2:] > item.boxes[:, :2]).all()


def test_a_box_holds_the_item_alone():
    # Without ground and colour the item is all that is bright.
    from dataclasses import replace

    rules = replace(DETECT, items=(1, 1), fragments=0, texture=0)
    source = FashionScenes(*squares(), ("a", "b", "c"), 64, rules)
    source._ground = lambda count, _: torch.zeros(count, 3, 64, 64)
    images, objects = source.draw_objects(torch.arange(10), generator())
    for image, item in zip(images, objects, strict=True):
        left, top, right, bottom = item.boxes[0].int().tolist()
        outside = image.amax(0).clone()
        outside[top:bottom, left:right] = 0
        assert outside.max() < 0.1
        assert image[:, top:bottom, left:right].amax((0, 1)).min() > 0


def test_scenes_for_classification_show_the_item_of_the_index():
    source = FashionScenes(*squares(), ("a", "b", "c"), 32)
    _, labels = same(source)
    assert labels.tolist() == [0, 0, 2]


def test_fashion_mnist_of_debian():
    if not Path(FASHION_FOLDER).is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    source = open_source("fashion", "test", 32)
    assert len(source) == 10_000 and source.classes[0] == "t-shirt"
    assert len(same(open_objects("fashion-scenes", "test", 64), "draw_objects")[1]) == 3


def test_boxes_only_where_there_are_any():
    with pytest.raises(ValueError, match="fashion-scenes, shapes"):
        open_objects("fashion", "train", 32)
