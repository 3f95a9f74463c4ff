"""VBench without its environment: its video layout, its result files, its totals.

Weights and normalisation: Vchitect/VBench scripts/constant.py (commit 7975661).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from nabla_attn.config import parse
from nabla_attn.files import read_json, whole_file, write_text
from nabla_attn.record import RunRecord

# dimension -> (lowest, highest, weight) of its normalised score
QUALITY: dict[str, tuple[float, float, float]] = {
    "subject consistency": (0.1462, 1.0, 1.0),
    "background consistency": (0.2615, 1.0, 1.0),
    "temporal flickering": (0.6293, 1.0, 1.0),
    "motion smoothness": (0.706, 0.9975, 1.0),
    "aesthetic quality": (0.0, 1.0, 1.0),
    "imaging quality": (0.0, 1.0, 1.0),
    "dynamic degree": (0.0, 1.0, 0.5),
}
SEMANTIC: dict[str, tuple[float, float, float]] = {
    "object class": (0.0, 1.0, 1.0),
    "multiple objects": (0.0, 1.0, 1.0),
    "human action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance style": (0.0009, 0.2855, 1.0),
    "temporal style": (0.0, 0.364, 1.0),
    "overall consistency": (0.0, 0.364, 1.0),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0


def compute_totals(scores: Mapping[str, float]) -> dict[str, float]:
    """Compute the quality, semantic and total scores in percent.

    Args:
        scores: Raw score of each of the 16 dimensions, in [0, 1].

    Raises:
        ValueError: A dimension is missing or unknown, or a score is outside [0, 1].
    """
    known = QUALITY | SEMANTIC
    missing, unknown = known.keys() - scores.keys(), scores.keys() - known.keys()
    if missing or unknown:
        raise ValueError(
            "VBench totals need all 16 dimensions: missing "
            f"{', '.join(sorted(missing)) or 'none'}, "
            f"unknown {', '.join(sorted(unknown)) or 'none'}."
        )
    for name, score in scores.items():
        if not 0 <= score <= 1:
            raise ValueError(f"the VBench score of {name} must be in [0, 1], got {score}.")
    quality, semantic = (_weighted(scores, part) for part in (QUALITY, SEMANTIC))
    total = QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic
    total /= QUALITY_WEIGHT + SEMANTIC_WEIGHT
    return {"quality": 100 * quality, "semantic": 100 * semantic, "total": 100 * total}


def read_results(folder: str | Path) -> dict[str, float]:
    """Read the scores by dimension from the `*_eval_results.json` files of a folder.

    Raises:
        ValueError: There is no such file, one is not VBench's, or a dimension appears twice.
    """
    paths = sorted(Path(folder).rglob("*_eval_results.json"))
    if not paths:
        raise ValueError(f"{folder} has no *_eval_results.json. Run `vbench evaluate` first.")
    scores: dict[str, float] = {}
    for path in paths:
        try:
            values = read_json(path)
            found = {name.replace("_", " "): float(result[0]) for name, result in values.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}: not a result file of VBench ({error}).") from error
        if twice := scores.keys() & found.keys():
            raise ValueError(f"{path}: {', '.join(sorted(twice))} is in another file too.")
        scores |= found
    return scores


def write_layout(run: str | Path, folder: str | Path) -> dict[str, int]:
    """Copy a run's videos to `folder/<algorithm>/<prompt>-<n>.mp4`, with `prompts.json`.

    Args:
        run: Folder of `nabla evaluate`.
        folder: Folder of the copies.

    Returns:
        Number of videos by algorithm.

    Raises:
        ValueError: The run has no videos, or a prompt cannot be a file name.
    """
    counts: dict[str, int] = {}
    prompts: dict[str, dict[str, str]] = {}
    for path in sorted(Path(run).rglob("*.json")):
        video = path.with_suffix(".mp4")
        if not video.is_file():
            continue
        record = RunRecord.load(path)
        algo = str(parse(str(record.config["sparse_algo"])))
        prompt = str(record.config["prompt"])
        of_algo = prompts.setdefault(algo, {})
        name = f"{_file_name(prompt)}-{sum(p == prompt for p in of_algo.values())}.mp4"
        with whole_file(Path(folder) / algo / name) as temporary:
            shutil.copyfile(video, temporary)
        of_algo[name] = prompt
        counts[algo] = counts.get(algo, 0) + 1
    if not counts:
        raise ValueError(f"{run} has no records with videos. Run `nabla evaluate` first.")
    for algo, names in prompts.items():
        text = json.dumps(names, indent=2, ensure_ascii=False) + "\n"
        write_text(Path(folder) / algo / "prompts.json", text)
    return counts


def _weighted(scores: Mapping[str, float], part: dict[str, tuple[float, float, float]]) -> float:
    total = sum(
        weight * (scores[name] - low) / (high - low) for name, (low, high, weight) in part.items()
    )
    return total / sum(weight for _, _, weight in part.values())


def _file_name(prompt: str) -> str:
    """Return the prompt unchanged, because VBench reads it from the name of the file.

    Raises:
        ValueError: The prompt cannot be the name of a file.
    """
    if not prompt or len(prompt.encode()) > 240 or "/" in prompt or not prompt.isprintable():
        raise ValueError(
            f"the prompt {prompt[:60]!r} cannot be a file name, which VBench needs: it must be "
            "one line of at most 240 bytes without '/'."
        )
    return prompt
