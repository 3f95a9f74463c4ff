"""A finished run in few files, small enough to publish beside its report."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from nabla_attn.evaluation.summary import read_records
from nabla_attn.files import whole_file, write_text


def pack(run: str | Path, target: str | Path) -> int:
    """Write ``target``/<algorithm>.jsonl, one record a line, and the videos of the first item.

    `nabla report` and `nabla evaluate summary` read the result as they read ``run``.

    Args:
        run: folder of a run.
        target: where the files go; algorithms packed there before are replaced.

    Returns:
        The number of items packed.

    Raises:
        ValueError: ``run`` has no records of dense attention, or no item is complete.
        OSError: a video of the first item is missing, or ``target`` cannot be written.
    """
    run, target = Path(run), Path(target)
    records = read_records(run)
    names = sorted(records["dense"])
    for algo, items in records.items():
        lines = [json.dumps(asdict(items[name]), allow_nan=False) + "\n" for name in names]
        with whole_file(target / algo / f"{names[0]}.mp4") as temporary:
            shutil.copyfile(run / algo / f"{names[0]}.mp4", temporary)
        write_text(target / f"{algo}.jsonl", "".join(lines))
    return len(names)
