"""What a user names to encode: a folder of videos, or tar files."""

from collections.abc import Sequence
from pathlib import Path

from nabla_attn.training.data.clip import ClipSource, is_video
from nabla_attn.training.data.folder import FolderSource, find_metadata, list_files
from nabla_attn.training.data.tars import TarSource


def open_source(paths: Sequence[Path]) -> ClipSource:
    """The clips of a folder of videos, of tar files, or of a folder of tar files.

    Raises:
        ValueError: A path is missing or of another kind, a folder holds both videos and tar files,
            or there is no video.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"no videos at {path}: there is no such file or folder.")
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(paths[0])
    for path in paths:
        if not _is_tar(path):
            raise ValueError(f"{path} is not a .tar file. Pass one folder, or .tar files.")
    return TarSource(list(paths))


def _open_folder(folder: Path) -> ClipSource:
    if find_metadata(folder):
        return FolderSource(folder)
    files, _ = list_files(folder)
    tars = [path for path in files if _is_tar(path)]
    if not tars:
        return FolderSource(folder)
    videos = [path for path in files if is_video(path.name)]
    if videos:
        raise ValueError(
            f"{folder} has tar files and videos beside them, such as {tars[0].name} and "
            f"{videos[0].name}. Encode them one after the other, each from a folder of its own."
        )
    return TarSource(tars)


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))
