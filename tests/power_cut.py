"""Power cuts and failing disks for processes under test: see `power_cut.c`."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

SECTOR = 512


class Disk:
    """A disk below one folder, which can fail and lose what was not brought to it.

    Args:
        watched: The folder that the process under test writes in.
        work: A folder for the library and for what the disk holds.
    """

    def __init__(self, watched, work):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("a C compiler is needed: apt-get install gcc")
        self.watched, self._kept = Path(watched).resolve(), work / "disk"
        self._kept.mkdir()
        library = work / "power_cut.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        self.environment = {
            "LD_PRELOAD": str(library),
            "POWER_CUT_WATCHED": str(self.watched),
            "POWER_CUT_DISK": str(self._kept),
        }

    def fail_once(self):
        """Let the next write to the disk fail."""
        (self._kept / "fail").touch()

    def has_failed(self):
        """Return whether the failure that was asked for has happened."""
        return not (self._kept / "fail").exists()

    def restore(self, folder, seed):
        """Write what a power cut may leave: names as they are, contents whole only where synced.

        Sectors written after a file's last `fsync` are there, missing or torn, as the seed has it.
        """
        rng = random.Random(seed)
        for path in sorted(self.watched.rglob("*")):
            target = folder / path.relative_to(self.watched)
            if path.is_dir():
                target.mkdir(parents=True)
            elif path.is_file() and not path.name.endswith("-shm"):
                kept = self._kept / str(path.stat().st_ino)
                synced = kept.read_bytes() if kept.is_file() else b""
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(_tear(synced, path.read_bytes(), rng))
        return folder


def _tear(synced, written, rng):
    shorter, longer = sorted((len(synced), len(written)))
    size = rng.choice((shorter, longer, rng.randint(shorter, longer)))
    torn = bytearray(synced[:size].ljust(size, b"\0"))
    if len(written) < len(synced):
        size = len(synced) if rng.random() < 0.5 else len(written)
        torn = bytearray(synced[:size])
    for start in range(0, size, SECTOR):
        end = min(start + rng.choice((0, SECTOR, SECTOR, rng.randint(1, SECTOR))), size)
        part = written[start:end]
        torn[start : start + len(part)] = part
    return bytes(torn)
