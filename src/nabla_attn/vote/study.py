"""A study: the pairs of videos that raters compare, and which rater gets which pair.

A study is a folder with `study.json`, the videos under meaningless names in `videos/`, and the
database of votes.
"""

import json
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nabla_attn.files import whole_file

SCHEMA: Literal[1] = 1
Count = Annotated[int, Field(ge=0)]
QUESTIONS = ("semantic", "visual", "motion", "overall")
"""The questions to raters, as in the paper's Table 3 (arXiv:2507.13546)."""

ANSWERS = ("first", "second", "both_good", "both_bad")
"""The answers to each question, in the order of the keys 1 to 4."""


def new_token() -> str:
    """Return 128 random bits as text that is safe in an address."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt and seed.

    Attributes:
        id: Meaningless name.
        prompt: What both videos should show.
        method: The algorithm that is compared with the baseline.
        baseline_video: File name in `videos/`.
        method_video: File name in `videos/`; in a control pair, the damaged video.
        is_control: Whether the right answer is known, because the method's video is a damaged copy
            of the baseline's.
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
    """Everything about a study except its votes.

    Attributes:
        title: Heading that raters read, so it must not name the algorithms.
        baseline: The algorithm that all methods are compared with.
        pairs: The pairs, controls included.
        fps: Frames per second of the videos, for stepping by frame.
        pairs_per_rater: Number of real pairs that one rater judges; all controls come on top.
        num_repeats: Number of pairs that a rater sees again with sides swapped.
        max_raters: Number of raters admitted. A rater who does not vote within an hour gives the
            place back.
        notice: Text shown with every result, such as where the votes come from.
        link_token: Token that opens the study to raters.
        admin_token: Token that opens the results.
        schema: Version of the file format.
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
        """The algorithms compared with the baseline, without controls."""
        return list(dict.fromkeys(pair.method for pair in self.pairs if not pair.is_control))

    def pair(self, pair_id: str) -> Pair:
        """Return the pair with this id."""
        return next(pair for pair in self.pairs if pair.id == pair_id)

    def save(self, folder: str | Path) -> None:
        """Write `study.json`, readable by its owner only, because it holds the tokens."""
        with whole_file(Path(folder) / "study.json", private=True) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Study":
        """Read and check the study in a folder.

        Raises:
            ValueError: There is no study, its file has a fault, or a video is missing. The message
                names the first fault.
        """
        path = Path(folder) / "study.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} is not a study: it has no study.json. Make one with "
                "`nabla vote make STUDY --run RUN`."
            )
        try:
            study = TypeAdapter(Study).validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            got = f"{first['input']!r:.80}"
            raise ValueError(f"{path}: {where}: {first['msg']}, got {got}.") from error
        _check_videos(Path(folder), study.pairs)
        return study


def videos_folder(folder: str | Path) -> Path:
    """Return the folder of a study's videos."""
    return Path(folder) / "videos"


def database_path(folder: str | Path) -> Path:
    """Return the file of a study's votes."""
    return Path(folder) / "votes.sqlite3"


@dataclass(frozen=True)
class Assignment:
    """One pair that a rater is to judge.

    Attributes:
        pair_id: The pair.
        is_swapped: Whether the method's video stands first.
        is_repeat: Whether the rater has judged the pair before.
    """

    pair_id: str
    is_swapped: bool
    is_repeat: bool = False


def draw_assignments(
    study: Study, times_assigned: Mapping[str, int], rng: random.Random
) -> list[Assignment]:
    """Draw the pairs of one rater, in order, with the side of each video.

    The pairs assigned least so far are chosen. Each of them and every control comes once, in random
    order; some pairs come again at the end with sides swapped.

    Args:
        study: The study.
        times_assigned: How often each pair was assigned to raters so far.
        rng: Source of pairs, order and sides.
    """
    real = [pair.id for pair in study.pairs if not pair.is_control]
    rng.shuffle(real)
    real.sort(key=lambda pair_id: times_assigned.get(pair_id, 0))  # stable: ties stay shuffled
    real = real[: study.pairs_per_rater]
    once = real + [pair.id for pair in study.pairs if pair.is_control]
    rng.shuffle(once)
    assignments = [Assignment(pair_id, rng.random() < 0.5) for pair_id in once]
    # The first ones are repeated, so that as many other pairs as possible lie between.
    repeatable = [entry for entry in assignments if entry.pair_id in set(real)]
    repeats = [
        Assignment(entry.pair_id, not entry.is_swapped, is_repeat=True)
        for entry in repeatable[: study.num_repeats]
    ]
    return assignments + repeats


def _check_videos(folder: Path, pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        for name in (pair.baseline_video, pair.method_video):
            path = videos_folder(folder) / name
            if Path(name).name != name or not path.is_file() or path.is_symlink():
                raise ValueError(
                    f"{folder}: the video {name!r} of a pair is not a file in its videos folder. "
                    "Put it back, or make the study again."
                )
