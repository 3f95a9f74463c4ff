"""Training: the published curve, augmentation, mutual learning, and a resume that is exact."""

import math

import pytest
import torch

import isynet
from isynet.data.catalogue import open_source
from isynet.training.augment import OPERATIONS, augment
from isynet.training.loop import draw_batch, measure_accuracy, predict, train
from isynet.training.recipe import Recipe

SHORT = Recipe(steps=6, batch=8, warmup=2, learning_rate=2e-3)
TINY = "1x3 1x3,1+ h0"


def net(seed=0, text=TINY):
    torch.manual_seed(seed)
    return isynet.create(text, 18)


@pytest.fixture(scope="module")
def shapes():
    return open_source("shapes", "train", 16)


def weights(module):
    return torch.cat([value.flatten().double() for value in module.state_dict().values()])


def test_the_learning_rate_is_the_published_curve():
    recipe = Recipe(steps=550, warmup=40, learning_rate=1e-3)
    assert recipe.rate(0) == pytest.approx(1e-3 / 40)
    assert recipe.rate(39) == pytest.approx(1e-3)
    assert recipe.rate(40) == pytest.approx(1e-3 * (1 + 1e-5))
    middle = 1e-3 * (0.5 * 0.5 * (1 + math.cos(0.47 * math.pi)) + 1e-5)
    assert recipe.rate(295) == pytest.approx(middle)
    assert 0 < recipe.rate(549) < 1e-7
    falling = [recipe.rate(step) for step in range(40, 550)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"warmup": 6}, {"learning_rate": 0}, {"smoothing": 1}, {"augment": 11}],
)
def test_recipes_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(**(SHORT.to_dict() | change))


def test_recipes_come_back_from_records():
    assert Recipe.from_dict(SHORT.to_dict()) == SHORT
    with pytest.raises(ValueError, match="colour"):
        Recipe.from_dict({"colour": 1})


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_keep_shape_and_do_nothing_at_strength_zero(name, channels):
    images = torch.rand(4, channels, 12, 10)
    ones = torch.ones(4)
    strong = OPERATIONS[name](images, ones * 0.9, ones)
    assert strong.shape == images.shape
    # Grey images have no colour to change.
    assert torch.equal(strong, images) == (name == "colour" and channels == 1)
    if name not in ("invert", "autocontrast"):
        torch.testing.assert_close(
            OPERATIONS[name](images, ones * 0, ones), images, atol=5e-3, rtol=0
        )


def test_augmentation_follows_its_generator():
    images = torch.rand(32, 3, 16, 16)
    first, second, other = (
        augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1
    assert augment(images, torch.Generator(), 0) is images


def test_an_epoch_shows_every_image_once(shapes):
    recipe = Recipe(steps=600, batch=256, warmup=0, augment=0)
    seen = []
    draw = shapes.draw
    shapes.draw = lambda indices, generator, **_: (
        seen.append(indices) or (torch.zeros(len(indices), 3, 4, 4), indices)
    )
    try:
        for step in range(32):
            draw_batch(shapes, recipe, 0, step)
    finally:
        shapes.draw = draw
    first, second = torch.cat(seen[:16]), torch.cat(seen[16:])
    assert first.sort().values.equal(torch.arange(4096))
    assert second.sort().values.equal(torch.arange(4096)) and not first.equal(second)


def test_training_lowers_the_loss(shapes):
    recipe = Recipe(steps=60, batch=32, warmup=5, learning_rate=1e-2, augment=0)
    result = train(net(), shapes, recipe, test=open_source("shapes", "test", 16))
    assert result.losses[-1] < result.losses[0] - 0.5
    assert result.accuracy > 3 / 18
    assert not result.net.training


def test_weights_decay_and_the_rest_does_not():
    from isynet.training.loop import _groups

    groups = _groups([net()], SHORT)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert {value.dim() for value in groups[1]["params"]} == {1}
    assert all(value.dim() > 1 for value in groups[0]["params"])


@pytest.mark.parametrize("with_peer", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_weights(shapes, tmp_path, with_peer):
    def run(name, stop=None):
        def on_progress(_, done, __):
            if done == stop:
                raise KeyboardInterrupt

        peer = net(1, "1x3 h64") if with_peer else None
        module = net()
        train(
            module,
            shapes,
            SHORT,
            peer=peer,
            state_file=tmp_path / name,
            save_every=2,
            on_progress=on_progress,
        )
        return weights(module)

    whole = run("a")
    with pytest.raises(KeyboardInterrupt):
        run("b", stop=5)
    assert torch.equal(run("b"), whole)
    # A finished run is not run again.
    assert torch.equal(run("b"), whole)


def test_a_peer_changes_what_is_learned(shapes):
    alone, together = net(), net()
    peer = net(1)
    before = weights(peer)
    train(alone, shapes, SHORT)
    train(together, shapes, SHORT, peer=peer)
    assert not torch.equal(weights(alone), weights(together))
    assert not torch.equal(before, weights(peer))


def test_states_of_other_runs_and_damaged_ones_are_refused(shapes, tmp_path):
    file = tmp_path / "state"
    train(net(), shapes, SHORT, state_file=file)
    with pytest.raises(ValueError, match="another seed"):
        train(net(), shapes, SHORT, seed=1, state_file=file)
    with pytest.raises(ValueError, match="another shapes"):
        train(net(0, "1x3 h0"), shapes, SHORT, state_file=file)
    for content in (b"", b"text", file.read_bytes()[:500]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="no state of a training run"):
            train(net(), shapes, SHORT, state_file=file)


def test_a_loss_that_is_no_number_ends_the_run(shapes):
    module = net()
    module.fc.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is nan at step 0"):
        train(module, shapes, SHORT)


def test_predictions_are_always_the_same():
    source = open_source("shapes", "test", 16)
    module = net().eval()
    first, labels = predict(module, source, limit=30)
    assert torch.equal(first, predict(module, source, limit=30)[0])
    accuracy = measure_accuracy(module, source, limit=30)
    assert accuracy == pytest.approx(float((first.argmax(1) == labels).float().mean()))
