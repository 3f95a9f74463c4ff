"""A study: the pairs of videos that raters compare, as files in one folder.

The folder holds ``study.json``, ``videos/`` under meaningless names, and the database of votes.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nabla_attn.files import whole_file

SCHEMA = 1
QUESTIONS = ("semantic", "visual", "motion", "overall")
"""What raters are asked, as in the paper's Table 3 (arXiv:2507.13546)."""

ANSWERS = ("first", "second", "both_good", "both_bad")
"""What raters may answer, in the order of the keys 1 to 4."""


def new_token() -> str:
    """128 random bits, safe in an address."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt and seed.

    Attributes:
        id: meaningless name.
        prompt: what both should show.
        method: the algorithm compared with the baseline.
        baseline_video: file name in ``videos/``.
        method_video: file name in ``videos/``; of a control pair, the damaged one.
        is_control: whether the answer is known: the method's video is the baseline's, damaged.
    """

    id: str
    prompt: str
    method: str
    baseline_video: str
    method_video: str
    is_control: bool = False


@dataclass(frozen=True)
class Study:
    """Everything about a study but its votes.

    Attributes:
        title: shown to raters, so it must not name the algorithms.
        baseline: the algorithm that all methods are compared with.
        pairs: the pairs, controls included.
        fps: frames per second of the videos, for stepping by frame.
        pairs_per_rater: real pairs that one rater judges; all controls come on top.
        num_repeats: pairs that a rater sees again, sides swapped, to measure consistency.
        max_raters: raters admitted.
        notice: shown with every result, such as where the votes come from.
        link_token: opens the study to raters.
        admin_token: opens the results.
        schema: format of this file.
    """

    title: str
    baseline: str
    pairs: tuple[Pair, ...]
    fps: float
    pairs_per_rater: int = 20
    num_repeats: int = 2
    max_raters: int = 1000
    notice: str = ""
    link_token: str = ""
    admin_token: str = ""
    schema: int = SCHEMA

    @property
    def methods(self) -> list[str]:
        """The algorithms compared with the baseline, controls left out."""
        return list(dict.fromkeys(pair.method for pair in self.pairs if not pair.is_control))

    def pair(self, pair_id: str) -> Pair:
        """The pair of an id."""
        return next(pair for pair in self.pairs if pair.id == pair_id)

    def save(self, folder: str | Path) -> None:
        """Write ``study.json``, readable by its owner only: it holds the tokens."""
        with whole_file(Path(folder) / "study.json") as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Study":
        """Read and check the study of a folder.

        Raises:
            ValueError: no study there, a broken file, or a video that is missing; it is named.
        """
        path = Path(folder) / "study.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} is not a study: it has no study.json. Make one with "
                "`nabla vote make STUDY --run RUN`."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            _check_fields(cls, values)
            for pair in values["pairs"]:
                _check_fields(Pair, pair)
            study = cls(**values | {"pairs": tuple(Pair(**pair) for pair in values["pairs"])})
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
        _check_videos(Path(folder), study.pairs)
        return study


def videos_folder(folder: str | Path) -> Path:
    """Where a study keeps its videos."""
    return Path(folder) / "videos"


def database_path(folder: str | Path) -> Path:
    """Where a study keeps its votes."""
    return Path(folder) / "votes.sqlite3"


def _check_fields(kind: Any, values: Any) -> None:
    known = {entry.name for entry in fields(kind)}
    if not isinstance(values, dict) or set(values) - known:
        raise ValueError(f"expected an object with {', '.join(sorted(known))}.")
    if kind is Study and values.get("schema") != SCHEMA:
        raise ValueError(f"schema {values.get('schema')} is not known here, only {SCHEMA}.")


def _check_videos(folder: Path, pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        for name in (pair.baseline_video, pair.method_video):
            path = videos_folder(folder) / name
            if Path(name).name != name or not path.is_file() or path.is_symlink():
                raise ValueError(f"{folder}: the video {name!r} of a pair is not in its videos.")
