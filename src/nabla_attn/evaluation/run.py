"""Evaluate algorithms against dense attention: paired, resumable, over several processes.

A run is a folder: `<algorithm>/<item>.mp4` and beside it its record, `<item>.json`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nabla_attn.config import parse
from nabla_attn.evaluation.metrics import measure_fidelity, measure_motion
from nabla_attn.evaluation.probe import AttentionProbe
from nabla_attn.evaluation.prompts import Item
from nabla_attn.files import fingerprint_files, is_whole
from nabla_attn.generation.generate import generate, warm_up
from nabla_attn.generation.pipeline import model_identity
from nabla_attn.generation.request import GenerationRequest, check_request
from nabla_attn.generation.video import Scorer, write_video
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.record import RunRecord, check_settings
from nabla_attn.work_sharing import OnItem, Shared, SharedWork, share_work

VideoCallback = Callable[[str, int, int], ProgressCallback]
"""Called with a label, videos done and videos in all; gives the progress callback of the next."""


@dataclass(frozen=True)
class Measures:
    """What is measured besides PSNR, SSIM, motion and time.

    Attributes:
        scorer: The reader of facts from the videos of its prompts.
        lpips: Ours, reference -> LPIPS per frame.
        clip: Frames, prompt -> CLIP score.
        weights: "lpips" and "clip" -> their weights, as `describe_weights` names them; records keep
            it, and a folder's records must agree.
        num_probed: Items, from the first, whose attention is measured in a run of its own.
        num_rows: Query tokens sampled per call there.
    """

    scorer: Scorer | None = None
    lpips: Callable[[np.ndarray, np.ndarray], list[float]] | None = None
    clip: Callable[[np.ndarray, str], float] | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    num_probed: int = 2
    num_rows: int = 16

    @classmethod
    def load(
        cls, scorer: Scorer | None, lpips: Path | None, clip: Path | None, num_probed: int
    ) -> "Measures":
        """Measures with the networks whose weights are given.

        Args:
            scorer: The reader of facts.
            lpips: Weights of LPIPS.
            clip: Directory of a CLIP model.
            num_probed: Number of items whose attention is measured.

        Raises:
            ValueError: Weights cannot be loaded.
        """
        from nabla_attn.evaluation.perception import LPIPS, ClipScore, measure_lpips

        paths = {"lpips": lpips, "clip": clip}
        return cls(
            scorer=scorer,
            lpips=None if lpips is None else partial(measure_lpips, LPIPS(lpips)),
            clip=None if clip is None else ClipScore(clip),
            weights={name: describe_weights(path) for name, path in paths.items() if path},
            num_probed=num_probed,
        )


def describe_weights(path: Path) -> str:
    """Name and fingerprint of a file or a directory of weights."""
    path = path.resolve()
    folder, files = (path, sorted(path.glob("[!.]*"))) if path.is_dir() else (path.parent, [path])
    return f"{path.name} {fingerprint_files(folder, files)[:16]}"


class Evaluation:
    """One process's share of an evaluation.

    Args:
        pipeline: A text-to-video pipeline.
        request: Size, steps and guidance; prompt, seed and algorithm are replaced.
        folder: The run's folder.
        fps: Frames per second of the videos.
        measures: What is measured.

    Raises:
        ValueError: The model cannot take the request.
    """

    def __init__(
        self,
        pipeline: Any,
        request: GenerationRequest,
        folder: str | Path,
        *,
        fps: float,
        measures: Measures | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._request = request
        self._folder = Path(folder)
        self._fps = fps
        self._measures = measures or Measures()
        self._warm: set[str] = set()
        # Once: it reads files of the model, and every record is held against it.
        self._identity = model_identity(pipeline)
        check_request(pipeline, request)

    def run(
        self,
        algos: Sequence[str],
        items: Sequence[Item],
        *,
        shard: tuple[int, int] = (0, 1),
        on_video: VideoCallback = lambda label, done, total: ignore_progress,
    ) -> Shared:
        """Make and measure what is missing and what no other process is at.

        Args:
            algos: The algorithms; dense is always added.
            items: Prompts and seeds.
            shard: (k, n): this process takes every n-th item from k on.
            on_video: Called before every video.

        Returns:
            The items made, found, failed, and left to other processes.

        Raises:
            ValueError: An algorithm is unknown, the shard is outside 0 to n-1, or the folder has
                records that were made with other settings.
        """
        names, mine = list_algorithms(algos), take_shard(items, shard)
        # All before the first video: records made with other settings are refused now.
        for item in mine:
            for name in names:
                self._check_record(name, item)
        return evaluate_items(
            lambda: self, self._folder, names, mine, self._measures, on_video=on_video
        )

    def make_item(
        self,
        names: Sequence[str],
        item: Item,
        on_video: Callable[[str], ProgressCallback] = lambda label: ignore_progress,
    ) -> None:
        """Make and measure what is missing of an item; dense first, as all compare with it.

        Args:
            names: The algorithms, dense first.
            item: Prompt and seed.
            on_video: Called before every video with its label.
        """
        dense: np.ndarray | None = None
        for name in names:
            if is_measured(self._folder, self._measures, name, item):
                self._check_record(name, item)
                continue
            if dense is None and name != "dense":
                dense = self._make_dense_again(item, on_video(f"dense {item.name}"))
            frames = self._make(name, item, dense, on_video(f"{name} {item.name}"))
            dense = frames if name == "dense" else dense

    def _make(
        self, name: str, item: Item, dense: np.ndarray | None, on_progress: ProgressCallback
    ) -> np.ndarray:
        asked = self._asked(name, item)
        if name not in self._warm:
            warm_up(self._pipeline, asked)
            self._warm.add(name)
        with peak_memory(self._pipeline.device) as memory:
            frames, record = generate(self._pipeline, asked, on_progress=on_progress)
        numbers = record.numbers | {"memory_bytes": memory.get("bytes")}
        numbers["to_dense"] = self._compare(frames, frames if dense is None else dense)
        numbers["to_prompt"] = self._judge(frames, item.prompt)
        if item.index < self._measures.num_probed and name != "dense":
            numbers["probe"] = self._probe(asked, numbers["frames_sha256"], self._path(name, item))
        path = self._path(name, item)
        write_video(frames, path.with_suffix(".mp4"), self._fps)
        config = record.config | {"prompt_index": item.index, "fps": self._fps}
        config |= self._weights(numbers)
        # Last: a record says that all of its files are there.
        replace(record, kind="evaluate", config=config, numbers=numbers).save(path)
        return frames

    def _make_dense_again(self, item: Item, on_progress: ProgressCallback) -> np.ndarray:
        """Dense frames of an interrupted item: the mp4 is lossy, and generation is exact."""
        frames, record = generate(
            self._pipeline, self._asked("dense", item), on_progress=on_progress
        )
        path = self._path("dense", item)
        if RunRecord.load(path).numbers["frames_sha256"] != record.numbers["frames_sha256"]:
            raise ValueError(
                f"{path}: dense attention gives other frames now than when this run began, on "
                "another machine or version. Start in a new folder."
            )
        return frames

    def _compare(self, frames: np.ndarray, dense: np.ndarray) -> dict[str, Any]:
        values = measure_fidelity(frames, dense).to_dict() | measure_motion(frames, dense)
        if self._measures.lpips is not None:
            distances = self._measures.lpips(frames, dense)
            values |= {"lpips": sum(distances) / len(distances), "lpips_frames": distances}
        return values

    def _judge(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        scorer = self._measures.scorer
        values: dict[str, Any] = {}
        if scorer is not None:
            values[scorer.name] = scorer.score(frames, prompt)
        if self._measures.clip is not None:
            values["clip"] = self._measures.clip(frames, prompt)
        return values

    def _probe(self, asked: GenerationRequest, sha256: str, path: Path) -> dict[str, Any]:
        """The same video once more under observation, apart from the run that is timed."""
        probe = AttentionProbe(asked.steps, num_rows=self._measures.num_rows)
        _, record = generate(self._pipeline, asked, on_apply=probe.attach)
        assert record.numbers["frames_sha256"] == sha256, "observing changed the video"
        result = probe.result()
        result.save(path.with_suffix(".probe.safetensors"))
        return result.to_dict()

    def _check_record(self, name: str, item: Item) -> None:
        """Refuse a record that was made with other settings."""
        path = self._path(name, item)
        if is_whole(path):
            asked = self._asked(name, item).to_dict() | self._identity | {"fps": self._fps}
            check_settings(path, self._weights(check_settings(path, asked).numbers))

    def _weights(self, numbers: dict[str, Any]) -> dict[str, str]:
        """What a record's config says of how it was measured: weights, and the scorer's version."""
        had, scorer = _measured(numbers), self._measures.scorer
        weights = self._measures.weights.items()
        found = {f"{measure}_weights": text for measure, text in weights if measure in had}
        if scorer is not None and had.get(scorer.name) is not None:
            found[f"{scorer.name}_judge"] = scorer.version
        return found

    def _asked(self, name: str, item: Item) -> GenerationRequest:
        request = replace(self._request, prompt=item.prompt, seed=item.seed)
        return request.with_algo(name)

    def _path(self, name: str, item: Item) -> Path:
        return _record_path(self._folder, name, item)


def evaluate_items(
    load: Callable[[], Evaluation],
    folder: Path,
    names: Sequence[str],
    items: Sequence[Item],
    measures: Measures,
    *,
    engine: str = "locks",
    workers: int | None = None,
    has_gpus: bool = True,
    on_video: VideoCallback = lambda label, done, total: ignore_progress,
    on_item: OnItem = lambda name, result: None,
) -> Shared:
    """Make and measure items, shared with other processes; one that fails stops no other.

    Args:
        load: Makes the evaluation, with its pipeline; called once in each process that works.
        folder: The run's folder.
        names: The algorithms, dense first.
        items: Prompts and seeds.
        measures: What is measured.
        engine: How processes share the work, see `share_work`.
        workers: Number of Ray's workers.
        has_gpus: Whether Ray's workers take a GPU each.
        on_video: Called before every video that this process makes.
        on_item: Called with each item that is made or has failed.
    """
    by_name = {item.name: item for item in items}
    count = partial(_count_videos, folder, names, items, on_video)
    start = partial(_start, load, names, by_name, None if engine == "ray" else count)
    work = SharedWork(
        folder=folder,
        items=list(by_name),
        start=start,
        is_done=partial(_is_finished, folder, measures, names, by_name),
        failures=(ValueError, OSError, RuntimeError, MemoryError),
    )
    return share_work(work, engine, workers=workers, has_gpus=has_gpus, on_item=on_item)


def list_algorithms(algos: Sequence[str]) -> list[str]:
    """The algorithms of a run by their full names, each once, dense first.

    Raises:
        ValueError: One is unknown.
    """
    return list(dict.fromkeys(["dense", *(str(parse(algo)) for algo in algos)]))


def read_shard(text: str) -> tuple[int, int]:
    """`K/N` such as `0/2` as numbers.

    Raises:
        ValueError: The text is not of that form.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--shard takes K/N such as 0/2: got {text!r}.")
    return int(index), int(count)


def take_shard(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Every n-th item from k on.

    Args:
        items: All items.
        shard: (k, n).

    Raises:
        ValueError: k is outside 0 to n-1.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"a shard is K/N with K from 0 to N-1: got {index}/{count}.")
    return list(items)[index::count]


def is_measured(folder: Path, measures: Measures, name: str, item: Item) -> bool:
    """Whether there is a record of an algorithm's video of an item, with all that is measured."""
    path = _record_path(folder, name, item)
    if not is_whole(path):
        return False
    wanted = {
        "lpips": measures.lpips is not None,
        "clip": measures.clip is not None,
        "probe": name != "dense" and item.index < measures.num_probed,
    }
    had = _measured(RunRecord.load(path).numbers)
    return all(measure in had for measure, is_wanted in wanted.items() if is_wanted)


def _record_path(folder: Path, name: str, item: Item) -> Path:
    return folder / name / f"{item.name}.json"


def _is_finished(
    folder: Path, measures: Measures, names: Sequence[str], items: Mapping[str, Item], item: str
) -> bool:
    return all(is_measured(folder, measures, name, items[item]) for name in names)


def _start(
    load: Callable[[], Evaluation],
    names: Sequence[str],
    items: Mapping[str, Item],
    on_video: Callable[[str], ProgressCallback] | None,
) -> Callable[[str], None]:
    evaluation = load()

    def make(item: str) -> None:
        if on_video is None:
            evaluation.make_item(names, items[item])
        else:
            evaluation.make_item(names, items[item], on_video)

    return make


def _count_videos(
    folder: Path,
    names: Sequence[str],
    items: Sequence[Item],
    on_video: VideoCallback,
    label: str,
) -> ProgressCallback:
    """Tell of the next video, and how many there are by now, whoever made them."""
    done = sum(is_whole(_record_path(folder, name, item)) for item in items for name in names)
    return on_video(label, done, len(items) * len(names))


def _measured(numbers: dict[str, Any]) -> dict[str, Any]:
    return numbers | numbers["to_dense"] | numbers["to_prompt"]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Yield a dictionary whose `"bytes"` is the block's peak once it has ended.

    On a GPU what torch allocated, on a Linux CPU the resident memory of the process; elsewhere
    None.
    """
    found: dict[str, int | None] = {"bytes": None}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    except OSError:
        yield found
        return
    yield found
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    found["bytes"] = None if peak is None else 1024 * int(peak.split()[1])
