"""One training run in a folder: weights with their architecture, state and record."""

from pathlib import Path
from typing import Any

import torch

from isynet.checkpoint import create, save
from isynet.data.catalogue import open_source
from isynet.data.source import MEAN, STD
from isynet.family import find_architecture
from isynet.network import ISyNet
from isynet.runs import load_best
from isynet.training.loop import train
from isynet.training.recipe import Recipe
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord, collect_versions, describe_device


def train_in_folder(
    model: str,
    data: str,
    *,
    size: int,
    recipe: Recipe,
    folder: str | Path,
    seed: int = 0,
    device: str = "cpu",
    on_progress: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Train a network on a data set and keep everything in a folder.

    Args:
        model: A network, an architecture, a `.safetensors` file to go on from, or the folder of a
            search, whose best is taken.
        data: Name or folder of the data set.
        size: Pixels of the images' sides.
        recipe: The numbers of the run; its `peer` is built with random weights.
        folder: Where `weights.safetensors`, `state.pt` and `record.json` are written.
        seed: Seed of initial weights, order and augmentation.
        device: Where to train.
        on_progress: Called after every step.

    Returns:
        The numbers of the record: `accuracy` on the test split, `test_images`, `losses`.

    Raises:
        ValueError: An unknown name, or the folder holds another run.
    """
    check_device(device)
    # Weights made for colour see grey images in equal channels.
    channels = create(model).in_chans if model.endswith(".safetensors") else 1
    source = open_source(data, "train", size, grey_channels=channels)
    test = open_source(data, "test", size, grey_channels=channels)
    torch.manual_seed(seed)
    net = build_network(model, len(source.classes), source.channels)
    peer = (
        ISyNet(find_architecture(recipe.peer), len(source.classes), source.channels)
        if recipe.peer
        else None
    )
    folder = Path(folder)
    result = train(
        net,
        source,
        recipe,
        test=test,
        seed=seed,
        peer=peer,
        state_file=folder / "state.pt",
        device=device,
        on_progress=on_progress,
    )
    net.default_cfg["mean"] = (MEAN,) * source.channels
    net.default_cfg["std"] = (STD,) * source.channels
    save(net, folder / "weights.safetensors")
    numbers = {
        "accuracy": result.accuracy,
        "test_images": len(test),
        "losses": result.losses,
        "architecture": str(net.architecture),
    }
    config = {"model": model, "data": data, "size": size, "recipe": recipe.to_dict()}
    RunRecord(
        kind="isynet-train",
        config=config,
        seed=seed,
        versions=collect_versions(),
        device=describe_device(device),
        numbers=numbers,
    ).save(folder / "record.json")
    return numbers


def build_network(model: str, num_classes: int, in_chans: int) -> ISyNet:
    """A network, or the best of a search where the name is its folder."""
    if Path(model).is_dir():
        return ISyNet(load_best(model), num_classes, in_chans)
    return create(model, num_classes, in_chans)


def check_device(device: str) -> None:
    """Check that tensors can be made on a device.

    Raises:
        ValueError: They cannot.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use the device {device[:40]!r}. Known: cpu, cuda.") from error
