"""A study: the pairs of videos that raters compare, as files in one folder.

The folder holds ``study.json``, ``videos/`` under meaningless names, and the database of votes.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nabla_attn.files import whole_file

SCHEMA: Literal[1] = 1
Count = Annotated[int, Field(ge=0)]
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

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

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
        max_raters: raters admitted; one who does not vote within an hour gives the place back.
        notice: shown with every result, such as where the votes come from.
        link_token: opens the study to raters.
        admin_token: opens the results.
        schema: format of this file.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    title: str
    baseline: str
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    pairs_per_rater: Count = 20
    num_repeats: Count = 2
    max_raters: Count = 1000
    notice: str = ""
    link_token: str = ""
    admin_token: str = ""
    schema: Literal[1] = SCHEMA

    @property
    def methods(self) -> list[str]:
        """The algorithms compared with the baseline, controls left out."""
        return list(dict.fromkeys(pair.method for pair in self.pairs if not pair.is_control))

    def pair(self, pair_id: str) -> Pair:
        """The pair of an id."""
        return next(pair for pair in self.pairs if pair.id == pair_id)

    def save(self, folder: str | Path) -> None:
        """Write ``study.json``, readable by its owner only: it holds the tokens."""
        with whole_file(Path(folder) / "study.json", private=True) as temporary:
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
            study = _read(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        _check_videos(Path(folder), study.pairs)
        return study


def videos_folder(folder: str | Path) -> Path:
    """Where a study keeps its videos."""
    return Path(folder) / "videos"


def database_path(folder: str | Path) -> Path:
    """Where a study keeps its votes."""
    return Path(folder) / "votes.sqlite3"


def _read(text: bytes) -> Study:
    """The study in a file's text.

    Raises:
        ValueError: one line with the first thing that is wrong.
    """
    try:
        return TypeAdapter(Study).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{where}: {first['msg']}, got {first['input']!r:.80}.") from error


def _check_videos(folder: Path, pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        for name in (pair.baseline_video, pair.method_video):
            path = videos_folder(folder) / name
            if Path(name).name != name or not path.is_file() or path.is_symlink():
                raise ValueError(f"{folder}: the video {name!r} of a pair is not in its videos.")
