"""Detection: boxes, targets, losses, precision, and a detector that learns."""

import json

import pytest
import torch

import isynet
from isynet.data.catalogue import open_objects
from isynet.data.source import Objects
from isynet.detection.boxes import areas, overlaps, select_boxes
from isynet.detection.files import load_detector, save_detector
from isynet.detection.loss import assign, detection_loss
from isynet.detection.network import Detector, Predictions
from isynet.detection.precision import average_precision
from isynet.detection.train import find_objects, train_detector
from isynet.training.recipe import Recipe

TINY = "1x3 1x3 1x3 1x3 h0"


def detector(seed=0):
    torch.manual_seed(seed)
    return Detector(isynet.create(TINY, 0), ("circle", "square", "triangle"), channels=16)


def objects(*rows):
    boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4)
    return Objects(boxes, torch.tensor([row[4] for row in rows], dtype=torch.int64))


def test_overlaps():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6], [2, 2, 1, 1]])
    table = overlaps(boxes, boxes)
    assert areas(boxes).tolist() == [4, 4, 1, 0]
    assert table[0, 1].item() == pytest.approx(1 / 7) and table[0, 2] == 0
    assert torch.equal(table, table.T) and table[0, 0] == 1


def test_the_best_box_of_each_class_stays():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30]])
    scores = torch.tensor([[0.6, 0.0], [0.9, 0.8], [0.01, 0.3]])
    found, kept = select_boxes(boxes, scores, threshold=0.05, limit=10, overlap=0.6)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.boxes[:, 0].tolist() == [1, 1, 20]
    assert kept.tolist() == pytest.approx([0.9, 0.8, 0.3])
    assert len(select_boxes(boxes, scores, threshold=0.05, limit=2, overlap=0.6)[1]) == 2
    none, _ = select_boxes(boxes, scores, threshold=2, limit=2, overlap=0.6)
    assert none.boxes.shape == (0, 4)


def test_places_get_the_smallest_object_they_stand_for():
    places = torch.tensor([[4.0, 4], [12, 12], [60, 60], [16, 16]])
    strides = torch.tensor([8.0, 8, 8, 16])
    small, large = (8, 8, 16, 16, 1), (2, 2, 24, 24, 2)
    targets = assign(places, strides, objects(large, small))
    # (12, 12) lies in both and takes the smaller; both are too small for the coarser level.
    assert targets.labels.tolist() == [2, 1, -1, -1]
    assert targets.distances[1].tolist() == [4, 4, 4, 4]
    assert targets.centredness()[1].item() == pytest.approx(1)
    assert assign(places, strides, objects()).labels.tolist() == [-1] * 4


def test_every_size_has_a_level():
    net = detector()
    found = net(torch.zeros(1, 3, 64, 64))
    for side in (5, 9, 14, 20, 28, 40, 60):
        box = objects((32 - side / 2, 30 - side / 2, 32 + side / 2, 30 + side / 2, 0))
        assert (assign(found.places, found.strides, box).labels == 0).any(), side


def test_a_perfect_prediction_has_almost_no_loss():
    net = detector()
    found = net(torch.zeros(1, 3, 64, 64))
    wanted = objects((10, 12, 30, 34, 1), (40, 40, 52, 50, 2))
    targets = assign(found.places, found.strides, wanted)
    is_object = targets.labels >= 0
    logits = torch.full_like(found.logits, -20)
    logits[0, is_object, targets.labels[is_object]] = 20
    centredness = torch.logit(targets.centredness().clamp(1e-6, 1 - 1e-6))[None]
    perfect = Predictions(logits, targets.distances[None], centredness, *found[3:])
    best, real = detection_loss(perfect, [wanted]), detection_loss(found, [wanted])
    # What is left is the entropy of centredness.
    assert best < 0.7 < real
    shifted = perfect._replace(distances=targets.distances[None] * 1.3)
    assert detection_loss(shifted, [wanted]) > best + 0.1
    assert detection_loss(found, [objects()]) < real


def test_precision():
    pytest.importorskip("pycocotools")
    wanted = [objects((0, 0, 10, 10, 0), (20, 20, 30, 30, 1)), objects((5, 5, 15, 15, 0))]
    perfect = [(each, torch.ones(len(each.labels))) for each in wanted]
    assert average_precision(perfect, wanted, 2)["ap"] == pytest.approx(1)
    half = [perfect[0], (objects(), torch.ones(0))]
    assert average_precision(half, wanted, 2)["ap50"] == pytest.approx(0.75, abs=0.01)
    wide = [(objects((0, 0, 10, 14, 0)), torch.ones(1)), (objects(), torch.ones(0))]
    loose = average_precision(wide, [objects((0, 0, 10, 10, 0)), objects()], 1)
    assert loose["ap50"] == pytest.approx(1) and loose["ap75"] == 0
    assert average_precision([(objects(), torch.ones(0))], wanted[:1], 2)["ap"] == 0
    with pytest.raises(ValueError, match="no object"):
        average_precision([], [], 2)


@pytest.mark.parametrize("size", [(64, 64), (50, 37)])
def test_boxes_found_lie_within_the_image(size):
    (found, scores), _ = detector().eval().detect(torch.randn(2, 3, *size), threshold=0.0, limit=7)
    assert len(scores) == 7 and (found.boxes >= 0).all()
    assert (found.boxes[:, ::2] <= size[1]).all() and (found.boxes[:, 1::2] <= size[0]).all()


def test_a_detector_learns_and_goes_on_after_an_end(tmp_path):
    source = open_objects("shapes", "train", 32)
    recipe = Recipe(steps=30, batch=8, warmup=3, learning_rate=5e-3, augment=0)
    whole = detector()
    losses = train_detector(whole, source, recipe)
    assert losses[-1] < 0.8 * losses[0]

    def stop(_, done, __):
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_detector(detector(), source, recipe, state_file=tmp_path / "s", on_progress=stop)
    again = detector()
    train_detector(again, source, recipe, state_file=tmp_path / "s")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name

    save_detector(whole, tmp_path / "d.safetensors")
    loaded = load_detector(tmp_path / "d.safetensors")
    assert loaded.classes == source.classes
    test = open_objects("shapes", "test", 32)
    for first, second in zip(
        find_objects(whole, test, limit=4)[0], find_objects(loaded, test, limit=4)[0], strict=True
    ):
        # Training leaves weights in another memory format, which sums in another order.
        torch.testing.assert_close(first[1], second[1], rtol=1e-3, atol=1e-5)


def test_what_cannot_be_a_detector_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 stages"):
        Detector(isynet.create("1x3 1x3", 0), ("a",))
    isynet.save(isynet.create(TINY, 2), tmp_path / "n.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"text")
    for name in ("n", "x", "missing"):
        with pytest.raises(ValueError, match=f"{name}.safetensors"):
            load_detector(tmp_path / f"{name}.safetensors")


def test_detectors_that_claim_what_they_do_not_hold_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = tmp_path / "d.safetensors"
    save_detector(Detector(isynet.create(TINY, 0), ("a", "b"), channels=8), file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for change in (
        {"channels": "100000000"},
        {"channels": "-1"},
        {"classes": json.dumps(["a"] * 10)},
        {"classes": '"ab"'},
        {"classes": "[" * 100_000},
        {"in_chans": "x"},
    ):
        save_file(state, file, metadata=about | change)
        with pytest.raises(ValueError, match=r"d\.safetensors"):
            load_detector(file)


def test_the_command(tmp_path):
    pytest.importorskip("pycocotools")
    from tests.isynet.test_cli import as_json

    sizes = ("--data", "shapes", "--size", "32", "--steps", "2", "--batch", "4")
    numbers = as_json(
        "detect", "--model", TINY, *sizes, "--test-images", "6", "--output", str(tmp_path)
    )
    assert 0 <= numbers["ap"] <= numbers["ap50"] <= 1
    names = {"detections.png", "detector.safetensors", "record.json", "state.pt"}
    assert {path.name for path in tmp_path.iterdir()} == names
