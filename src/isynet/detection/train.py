"""Training of detectors, and their average precision on a test set that is always the same."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isynet.data.catalogue import open_objects
from isynet.data.source import Objects, ObjectSource, normalize
from isynet.detection.files import save_detector, save_picture
from isynet.detection.loss import detection_loss
from isynet.detection.network import Detector
from isynet.detection.precision import average_precision
from isynet.network import ISyNet
from isynet.training.loop import draw_indices, make_generator, run_steps
from isynet.training.recipe import Recipe
from isynet.training.run import build_network, check_device
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord, collect_versions, describe_device

TEST_BATCH = 100


def train_detector(
    detector: Detector,
    source: ObjectSource,
    recipe: Recipe,
    *,
    seed: int = 0,
    state_file: str | Path | None = None,
    device: str | torch.device = "cpu",
    on_progress: ProgressCallback = ignore_progress,
) -> list[float]:
    """Train a detector in place; of the recipe, smoothing, augmentation and peer have no part.

    The scenes of a step follow from seed and step, so that an interrupted run goes on to the bit.

    Returns:
        Mean loss of each tenth of the run.

    Raises:
        ValueError: The state belongs to another run, or is damaged.
        DivergedError: The loss is no number any more.
    """

    def loss_of(step: int) -> Tensor:
        indices = draw_indices(len(source), recipe.batch, seed, step)
        images, objects = source.draw_objects(indices, make_generator(seed, "step", step))
        images = normalize(images).to(device).contiguous(memory_format=torch.channels_last)
        return detection_loss(detector(images), objects)

    return run_steps(
        [detector],
        recipe,
        loss_of,
        about={"seed": seed, "images": [len(source), source.size, *source.classes]},
        state_file=state_file,
        device=device,
        on_progress=on_progress,
    )


def find_objects(
    detector: Detector, source: ObjectSource, *, limit: int, device: str | torch.device = "cpu"
) -> tuple[list[tuple[Objects, Tensor]], list[Objects], Tensor]:
    """What a detector finds in the first images of a set, what is there, and the images."""
    detector.eval()
    found, wanted, pictures = [], [], []
    count = min(limit, len(source))
    for first in range(0, count, TEST_BATCH):
        indices = torch.arange(first, min(first + TEST_BATCH, count))
        images, objects = source.draw_objects(indices, make_generator(0, "test", first))
        found += detector.detect(normalize(images).to(device))
        wanted += objects
        pictures.append(images)
    cpu = [(Objects(o.boxes.cpu(), o.labels.cpu()), scores.cpu()) for o, scores in found]
    return cpu, wanted, torch.cat(pictures)


def detect_in_folder(
    model: str,
    data: str,
    *,
    size: int,
    recipe: Recipe,
    folder: str | Path,
    seed: int = 0,
    test_images: int = 1000,
    device: str = "cpu",
    on_progress: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Train a detector on a network and keep everything in a folder.

    Args:
        model: A network, an architecture, a `.safetensors` file whose weights are taken, or the
            folder of a search.
        data: Name of the data set with boxes.
        size: Pixels of the images' sides.
        recipe: The numbers of the run.
        folder: Where `detector.safetensors`, `state.pt`, `record.json` and `detections.png` are
            written.
        seed: Seed of initial weights and order.
        test_images: Images of the test.
        device: Where to train.
        on_progress: Called after every step.

    Returns:
        The numbers of the record: `ap`, `ap50`, `ap75`, `losses`.

    Raises:
        ValueError: An unknown name, or the folder holds another run.
        ImportError: Pycocotools is missing.
    """
    source, test = open_objects(data, "train", size), open_objects(data, "test", size)
    check_device(device)
    folder = Path(folder)
    torch.manual_seed(seed)
    net: ISyNet = build_network(model, 0, source.channels)
    detector = Detector(net, source.classes)
    losses = train_detector(
        detector,
        source,
        recipe,
        seed=seed,
        state_file=folder / "state.pt",
        device=device,
        on_progress=on_progress,
    )
    found, wanted, images = find_objects(detector, test, limit=test_images, device=device)
    precision = average_precision(found, wanted, len(source.classes))
    numbers = {**precision, "losses": losses, "architecture": str(net.architecture)}
    save_detector(detector, folder / "detector.safetensors")
    save_picture(images, found, folder / "detections.png")
    config = {"model": model, "data": data, "size": size, "recipe": recipe.to_dict()}
    RunRecord(
        kind="isynet-detect",
        config=config | {"test_images": len(wanted)},
        seed=seed,
        versions=collect_versions(),
        device=describe_device(device),
        numbers=numbers,
    ).save(folder / "record.json")
    return numbers
