"""The training loop of a classifier, alone or with a peer, resumed to the bit after any end."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from isynet.data.source import ImageSource, normalize
from isynet.training.augment import augment
from isynet.training.recipe import Recipe
from nabla_attn.errors import first_line
from nabla_attn.files import whole_file
from nabla_attn.progress import ProgressCallback, ignore_progress

TEST_BATCH = 200


class DivergedError(ValueError):
    """A training whose loss is no number any more."""


@dataclass
class Trained:
    """What a training run gave.

    Attributes:
        net: The network, in evaluation mode.
        accuracy: Share of test images whose class it names; None without a test set.
        losses: Mean loss of each tenth of the run.
    """

    net: nn.Module
    accuracy: float | None
    losses: list[float]


def train(
    net: nn.Module,
    source: ImageSource,
    recipe: Recipe,
    *,
    test: ImageSource | None = None,
    seed: int = 0,
    peer: nn.Module | None = None,
    state_file: str | Path | None = None,
    save_every: int = 200,
    device: str | torch.device = "cpu",
    on_progress: ProgressCallback = ignore_progress,
) -> Trained:
    """Train a classifier.

    The images, order and augmentation of a step follow from the seed and its number alone, so a run
    that was interrupted and started again gives the same weights, bit for bit, on one machine.

    Args:
        net: The network, trained in place.
        source: Training images.
        recipe: The numbers of the run.
        test: Test images.
        seed: Seed of order and augmentation.
        peer: A second network that learns with the first; each also follows the other's
            probabilities (deep mutual learning, arXiv:1706.00384).
        state_file: File of the run's state; a run that finds one goes on from there.
        save_every: Steps between two writings of the state.
        device: Where to train.
        on_progress: Called after every step.

    Raises:
        ValueError: The state belongs to another run, or is damaged.
        DivergedError: The loss is no number any more.
    """
    nets = [net] if peer is None else [net, peer]

    def loss_of(step: int) -> Tensor:
        images, labels = draw_batch(source, recipe, seed, step)
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        return _loss(nets, images, labels.to(device), recipe)

    losses = run_steps(
        nets,
        recipe,
        loss_of,
        about={"seed": seed, "images": [len(source), source.size, *source.classes]},
        state_file=state_file,
        save_every=save_every,
        device=device,
        on_progress=on_progress,
    )
    accuracy = measure_accuracy(net, test, device=device) if test is not None else None
    return Trained(net, accuracy, losses)


def run_steps(
    nets: list[nn.Module],
    recipe: Recipe,
    loss_of: Callable[[int], Tensor],
    *,
    about: dict[str, Any],
    state_file: str | Path | None = None,
    save_every: int = 200,
    device: str | torch.device = "cpu",
    on_progress: ProgressCallback = ignore_progress,
) -> list[float]:
    """Run the steps of a recipe, from the state in a file where there is one.

    Args:
        nets: What is trained, in place; left in evaluation mode.
        recipe: The numbers of the run.
        loss_of: The loss of a step, which follows from its number and the nets alone.
        about: What else the result depends on; a state with anything else is refused.
        state_file: File of the run's state.
        save_every: Steps between two writings of the state.
        device: Where to train.
        on_progress: Called after every step.

    Returns:
        Mean loss of each tenth of the run.

    Raises:
        ValueError: The state belongs to another run, or is damaged.
        DivergedError: The loss is no number any more.
    """
    device = torch.device(device)
    for net in nets:
        net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = _groups(nets, recipe)
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
    shapes = [[list(value.shape) for value in net.parameters()] for net in nets]
    about = {"recipe": recipe.to_dict(), **about, "shapes": shapes}
    losses: list[float] = []
    if state_file and Path(state_file).is_file():
        losses = _load_state(Path(state_file), about, nets, optimizer, device)
    for net in nets:
        net.train()
    for step in range(len(losses), recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm:
            for net in nets:
                nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        if not losses[-1] < float("inf"):
            raise DivergedError(
                f"the loss is {losses[-1]} at step {step}. Lower the learning rate "
                f"({recipe.learning_rate}) or set clip_norm."
            )
        if state_file and ((step + 1) % save_every == 0 or step + 1 == recipe.steps):
            _save_state(Path(state_file), about, nets, optimizer, losses)
        on_progress("train", step + 1, recipe.steps)
    for net in nets:
        net.eval()
    return _tenths(losses)


def draw_batch(source: ImageSource, recipe: Recipe, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The normalized images and labels of a step, which follow from seed and step alone."""
    generator = make_generator(seed, "step", step)
    images, labels = source.draw(draw_indices(len(source), recipe.batch, seed, step), generator)
    return normalize(augment(images, generator, recipe.augment, recipe.augment_std)), labels


def draw_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """The images of a step: an epoch is a permutation of all, and batches are always full."""
    first = step * batch
    picked: list[int] = []
    while len(picked) < batch:
        epoch, place = divmod(first + len(picked), count)
        order = torch.randperm(count, generator=make_generator(seed, "epoch", epoch))
        picked += order[place : place + batch - len(picked)].tolist()
    return torch.tensor(picked)


def make_generator(seed: int, kind: str, number: int) -> torch.Generator:
    """The generator of a step, an epoch or a test batch."""
    # Seeds of neighbouring steps must not be neighbours, so they are hashed.
    digest = hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.inference_mode()
def predict(
    net: nn.Module,
    source: ImageSource,
    *,
    limit: int | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Logits [images, classes] and labels [images] of a set's first images, always the same."""
    net = net.eval()
    count = len(source) if limit is None else min(limit, len(source))
    logits, labels = [], []
    for first in range(0, count, TEST_BATCH):
        indices = torch.arange(first, min(first + TEST_BATCH, count))
        images, own = source.draw(indices, make_generator(0, "test", first), is_training=False)
        images = normalize(images).to(device).contiguous(memory_format=torch.channels_last)
        logits.append(net(images).float().cpu())
        labels.append(own)
    return torch.cat(logits), torch.cat(labels)


def measure_accuracy(
    net: nn.Module,
    source: ImageSource,
    *,
    limit: int | None = None,
    device: str | torch.device = "cpu",
) -> float:
    """Share of the images whose class the network names, of a test set that is always the same."""
    logits, labels = predict(net, source, limit=limit, device=device)
    return float((logits.argmax(1) == labels).double().mean())


def _loss(nets: list[nn.Module], images: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    logits = [net(images).float() for net in nets]
    smoothing = recipe.smoothing
    loss = torch.stack(
        [functional.cross_entropy(each, labels, label_smoothing=smoothing) for each in logits]
    ).sum()
    if len(nets) == 2:
        first, second = (functional.log_softmax(each, 1) for each in logits)
        divergence = sum(
            functional.kl_div(a, b, reduction="batchmean", log_target=True)
            for a, b in ((first, second), (second, first))
        )
        loss = loss + recipe.mutual_weight * divergence
    return loss


def _groups(nets: list[nn.Module], recipe: Recipe) -> list[dict[str, Any]]:
    weights = [value for net in nets for value in net.parameters()]
    decayed = [value for value in weights if value.dim() > 1]
    plain = [value for value in weights if value.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _save_state(
    path: Path,
    about: dict[str, Any],
    nets: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    state = {
        "about": about,
        "nets": [net.state_dict() for net in nets],
        "optimizer": optimizer.state_dict(),
        "losses": losses,
    }
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def _load_state(
    path: Path,
    about: dict[str, Any],
    nets: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> list[float]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = state["about"]
    except Exception as error:
        # The unpickler meets damaged bytes with every kind of error.
        raise ValueError(
            f"{path} is no state of a training run ({first_line(error)}). Remove it to begin anew."
        ) from error
    changed = [name for name, value in about.items() if found.get(name) != value]
    if changed:
        raise ValueError(
            f"{path} is of a run with another {' and '.join(changed)}. Choose another folder, or "
            "remove it to begin anew."
        )
    for net, values in zip(nets, state["nets"], strict=True):
        net.load_state_dict(values)
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])


def _tenths(losses: list[float]) -> list[float]:
    size = max(1, len(losses) // 10)
    groups = [losses[first : first + size] for first in range(0, len(losses), size)]
    return [sum(group) / len(group) for group in groups]
