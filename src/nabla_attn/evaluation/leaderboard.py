"""The leaderboard of methods: mass, error and seconds of each at equal densities.

A method's knob is set once, on the first prompts, for the density that is asked for in the mean
over their calls; then all prompts are measured.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from nabla_attn import methods
from nabla_attn.config import SparseConfig, as_config
from nabla_attn.evaluation.calls import CallSource, Series, Tables
from nabla_attn.evaluation.knobs import Knob, Setting, row_of
from nabla_attn.evaluation.measuring import REFERENCE, density_of, measure_together
from nabla_attn.record import RunRecord, check_settings, collect_versions

DENSITIES = (0.05, 0.1, 0.2, 0.3)


class Leaderboard:
    """Measures methods, a record for each prompt; what is there is kept.

    Args:
        source: Where calls come from.
        folder: Where the records are.
        names: Methods, with numbers as `Knob` takes them; None is all that need no table.
        densities: Densities asked for.
        suffixes: What is put behind methods in turn; each is a column of its own.
    """

    def __init__(
        self,
        source: CallSource,
        folder: Path,
        *,
        names: Sequence[str] | None = None,
        densities: Sequence[float] = DENSITIES,
        suffixes: Sequence[str] = ("",),
    ) -> None:
        self.source, self.folder = source, folder
        every = [name for name in methods.names() if "table" not in methods.find(name).needs]
        self.names = list(every if names is None else names)
        for name in self.names:
            row_of(name)
        self.densities, self.suffixes = list(densities), list(suffixes)
        self._tables: dict[str, Tables] = {}
        self._densities: dict[SparseConfig, float] = {}

    def settings(self) -> list[Setting]:
        """The knobs, from their record or set anew on the calls of the first prompts."""
        path = self.folder / "settings.json"
        asked = self.source.describe(0)
        known = _known(path, asked, "settings")
        missing: list[tuple[str, str, list[float]]] = []
        for name in self.names:
            for suffix in self.suffixes:
                set_for = [each["wanted"] for each in known.get(f"{name}{suffix}", [])]
                lacking = [wanted for wanted in self.densities if wanted not in set_for]
                if lacking and None not in set_for:
                    missing.append((name, suffix, lacking))
        prompts = range(self.source.knob_prompts if missing else 0)
        series = [calls for number in prompts for calls in self.source.collect(number)]
        for name, suffix, lacking in missing:
            try:
                found = [vars(each) for each in self._set(name, suffix, lacking, series)]
            except ValueError as error:
                warnings.warn(f"{name}{suffix} is left out: {error}", stacklevel=2)
                continue
            known.setdefault(f"{name}{suffix}", []).extend(found)
            self._save(path, asked, {"settings": known})
        return [
            Setting(**values)
            for name in self.names
            for suffix in self.suffixes
            for values in known.get(f"{name}{suffix}", [])
            if values["wanted"] is None or values["wanted"] in self.densities
        ]

    def _set(
        self, name: str, suffix: str, densities: list[float], series: list[Series]
    ) -> list[Setting]:
        def density(config: SparseConfig) -> float:
            # What is dropped is the same with any tail.
            plain = replace(config, tail=None)
            if plain not in self._densities:
                self._densities[plain] = density_of(plain, series, self._tables_of(plain))
            return self._densities[plain]

        knob = Knob(name, density, suffix=suffix)
        wanted = densities if row_of(name).parameters else densities[:1]
        return [knob.set(each) for each in wanted]

    def measure(
        self, num_prompts: int, *, on_progress: Callable[[str, int, int], None]
    ) -> list[RunRecord]:
        """Measure all settings on all prompts.

        Args:
            num_prompts: Prompts of the source, from the first.
            on_progress: Told of methods that are done, over all prompts.
        """
        groups: dict[str, list[str]] = {"dense": ["dense"]}
        for setting in self.settings():
            _, _, suffix = setting.algorithm.partition("_")
            mine = groups.setdefault(f"{setting.method}_{suffix}", [])
            # Two densities may have the same nearest setting.
            mine += [setting.algorithm] if setting.algorithm not in mine else []
        records, total = [], num_prompts * len(groups)
        for number in range(num_prompts):
            done = partial(_tell, on_progress, number * len(groups), total)
            records.append(self._measure_prompt(number, list(groups.values()), done))
        return records

    def _measure_prompt(
        self, number: int, groups: list[list[str]], on_group: Callable[[int], None]
    ) -> RunRecord:
        path = self.folder / f"p{number:04d}.json"
        asked = self.source.describe(number)
        known = _known(path, asked, "algorithms")
        series: list[Series] = []
        for index, group in enumerate(groups):
            missing = [algorithm for algorithm in group if algorithm not in known]
            if missing:
                series = series or self.source.collect(number)
                configs = [as_config(algorithm) for algorithm in missing]
                found = measure_together(
                    configs,
                    series,
                    tables=[self._tables_of(config) for config in configs],
                    head_names=self.source.head_names,
                )
                known |= dict(zip(missing, found, strict=True))
                self._save(path, asked, {"reference": REFERENCE, "algorithms": known})
            on_group(index + 1)
        return RunRecord.load(path)

    def _tables_of(self, config: SparseConfig) -> Tables | None:
        """The table of an algorithm, made once in this process; None where it needs none."""
        if "table" not in config.needs:
            return None
        key = str(config)
        if key not in self._tables:
            self._tables[key] = self.source.make_tables(config)
        return self._tables[key]

    def _save(self, path: Path, config: dict[str, Any], numbers: dict[str, Any]) -> None:
        source, versions = self.source, collect_versions()
        RunRecord("leaderboard", config, source.seed, versions, source.device, numbers).save(path)


def _known(path: Path, asked: dict[str, Any], name: str) -> dict[str, Any]:
    """What a record holds under a name; nothing where there is no record."""
    return dict(check_settings(path, asked).numbers[name]) if path.is_file() else {}


def _tell(on_progress: Callable[[str, int, int], None], before: int, total: int, done: int) -> None:
    on_progress("methods", before + done, total)


def read_records(folder: Path) -> list[RunRecord]:
    """Read the records of prompts that a leaderboard left in a folder."""
    return [RunRecord.load(path) for path in sorted(folder.glob("p????.json"))]


def rows_of(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Means over the prompts of records, a row for each algorithm that all of them have.

    Where the reference was timed, seconds are the median ratio to it over the prompts times the
    reference's median over the whole record. `errors` are those of each prompt, `error_spread` is
    the standard error of their mean, and `ideal` the share of ideal: dense attention's seconds
    times the density over the seconds, where dense attention was timed.
    """
    tables = [record.numbers["algorithms"] for record in records]
    usual = median(
        entry.get("reference_seconds", 1.0) for table in tables for entry in table.values()
    )
    rows = []
    for algorithm in tables[0] if tables else ():
        found = [table[algorithm] for table in tables if algorithm in table]
        if len(found) == len(tables):
            rows.append({"algorithm": algorithm} | _row(found, usual))
    dense = next((row["seconds"] for row in rows if row["algorithm"] == "dense"), None)
    for row in rows:
        row["ideal"] = None if dense is None else dense * row["density"] / row["seconds"]
    return rows


def left_out(records: Sequence[RunRecord]) -> list[str]:
    """The algorithms that some of the records have and others lack, of which there is no row."""
    tables = [record.numbers["algorithms"] for record in records]
    every = dict.fromkeys(algorithm for table in tables for algorithm in table)
    return [each for each in every if not all(each in table for table in tables)]


def _row(found: Sequence[dict[str, Any]], usual: float) -> dict[str, Any]:
    """One algorithm's numbers over its prompts."""
    row: dict[str, Any] = {"prompts": len(found)}
    for name, value in found[0].items():
        if not isinstance(value, dict):
            row[name] = fmean(each[name] for each in found)
        else:
            row[name] = {key: fmean(each[name][key] for each in found) for key in value}
    row["errors"] = [each["error"] for each in found]
    for name in ("select_seconds", "seconds"):
        if all("reference_seconds" in each for each in found):
            row[name] = usual * median(each[name] / each["reference_seconds"] for each in found)
    spread = torch.tensor(row["errors"]).std(correction=1).item() if len(found) > 1 else None
    row["error_spread"] = None if spread is None else spread / len(found) ** 0.5
    return row
