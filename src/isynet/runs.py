"""Work in many trials that outlives a kill: a folder, its settings, and a record for each trial."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isynet.architecture import Architecture, parse
from nabla_attn.files import read_json, write_text
from nabla_attn.record import RunRecord, collect_versions, describe_device

SEARCH_RECORD = "search.json"


class TrialFolder:
    """A folder of trials, each a `RunRecord` that is written whole when its trial ends.

    What comes next must follow from the settings and the trials so far; then a run that is killed
    and started again gives the result of one that was not.
    """

    def __init__(self, folder: str | Path, kind: str, settings: dict[str, Any]) -> None:
        """Open a folder, new or of an earlier run with the same settings.

        Args:
            folder: The folder.
            kind: Kind of the records.
            settings: What the results depend on, plain JSON values.

        Raises:
            ValueError: The folder holds a run with other settings; the first are named.
        """
        self.folder, self.kind = Path(folder), kind
        self.settings = json.loads(json.dumps(settings))
        file = self.folder / "settings.json"
        if not file.is_file():
            write_text(file, json.dumps(settings, indent=2) + "\n")
            return
        found = read_json(file)
        if found != self.settings:
            found = found if isinstance(found, dict) else {}
            names = [k for k in {**found, **settings} if found.get(k) != self.settings.get(k)]
            raise ValueError(
                f"{self.folder} holds a run with another {', '.join(names) or 'format'}. Choose "
                "another folder."
            )

    def trial(
        self, name: str, config: dict[str, Any], run: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The numbers of a trial: of its record where there is one, or of running it now.

        Raises:
            ValueError: The record is damaged, or of another trial.
        """
        file = self.folder / "trials" / f"{name}.json"
        if file.is_file():
            record = RunRecord.load(file)
            if record.config != json.loads(json.dumps(config)):
                raise ValueError(
                    f"{file} is of another trial than the run now asks for. Were files changed by "
                    "hand? Choose another folder."
                )
            return record.numbers
        return self.save(file, config, run())

    def save(self, file: Path, config: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        """Write a record and return its numbers as they will be read back."""
        RunRecord(
            kind=self.kind,
            config=config,
            seed=int(self.settings.get("seed", 0)),
            versions=collect_versions(),
            device=describe_device(),
            numbers=numbers,
        ).save(file)
        return json.loads(json.dumps(numbers))


def load_best(folder: str | Path) -> Architecture:
    """The best architecture of a search that has ended.

    Raises:
        ValueError: The folder holds no finished search.
    """
    file = Path(folder) / SEARCH_RECORD
    if not file.is_file():
        raise ValueError(f"{folder} holds no finished search: no {SEARCH_RECORD}.")
    return parse(RunRecord.load(file).numbers["best"])
