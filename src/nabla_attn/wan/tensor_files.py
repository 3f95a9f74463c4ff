"""Safe readers of weight files: headers first, tensors one at a time, nothing executed."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nabla_attn.errors import first_line
from nabla_attn.files import read_json

FLOAT_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one tensor, as a header has them; the dtype is None where unknown."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def num_bytes(self) -> int:
        """Size in bytes as stored."""
        size = self.dtype.itemsize if self.dtype is not None else 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class TensorFile:
    """An open weight file.

    Attributes:
        path: The file.
        infos: Shapes and dtypes by name, from the header alone.
        read: Reads one tensor by name, on the CPU, memory-mapped where the format allows.
    """

    path: Path
    infos: dict[str, TensorInfo]
    read: Callable[[str], torch.Tensor] = field(repr=False)


@contextmanager
def open_tensor_file(path: str | Path) -> Iterator[TensorFile]:
    """Open a `.safetensors` file or a pickled state dict without running code from it.

    Raises:
        ValueError: The file is missing, truncated, of another format, no flat dict of tensors, or
            claims tensors that it does not hold. The message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}.")
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as opened:
            yield opened
    elif path.suffix in PICKLE_SUFFIXES:
        yield _open_pickle(path)
    else:
        raise ValueError(
            f"cannot read {path}: format {path.suffix or '(none)'} is not known. "
            f"Known: .safetensors, {', '.join(PICKLE_SUFFIXES)}. GGUF files are quantised; "
            "take the original weights."
        )


@contextmanager
def _open_safetensors(path: Path) -> Iterator[TensorFile]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({first_line(error)[:200]}). "
            "Download it again."
        ) from error
    with handle:
        infos = {}
        for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
            part = handle.get_slice(name)
            shape = tuple(part.get_shape())
            infos[name] = TensorInfo(shape, SAFETENSORS_DTYPES.get(part.get_dtype()))
        yield TensorFile(path, infos, handle.get_tensor)


def _open_pickle(path: Path) -> TensorFile:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_zip(path)
    try:
        # Formats older than the zip one cannot be memory-mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole file of plain tensors ({first_line(error)[:200]}). Download it "
            "again; files that need code to be read are refused."
        ) from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds {type(state).__name__}, not a dict of tensors.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: entry {shown(repr(name))} is {type(value).__name__}, not a tensor. "
                "Save the flat state dict."
            )
        _check_plain(path, name, value)
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
    # Tensors that share memory could together claim far more than the file holds.
    if (claimed := sum(info.num_bytes for info in infos.values())) > path.stat().st_size:
        raise ValueError(
            f"{path}: its tensors claim {claimed} bytes, and the file has {path.stat().st_size}. "
            "Save it again without tensors that share memory."
        )
    return TensorFile(path, infos, state.__getitem__)


def _check_plain(path: Path, name: str, value: torch.Tensor) -> None:
    """Refuse a tensor whose shape claims more than its storage holds, such as one of stride 0."""
    is_plain = (
        not value.is_nested
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
    if not is_plain:
        raise ValueError(
            f"{path}: tensor {shown(name)} is not stored as plain numbers, each of them there. "
            "Save it again with torch.save of a contiguous copy."
        )


def shown(name: object) -> str:
    """A name from a file as a message may hold it: printable and short."""
    text = str(name)
    text = text if text.isprintable() and text else ascii(text)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _check_zip(path: Path) -> None:
    """Refuse archives whose entries would unpack to more than the file itself holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is truncated ({error}). Download it again.") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError(
            f"{path}: weight archives are stored, not compressed; this one would grow when "
            "read. Save it again with torch.save."
        )


def read_config(path: Path) -> dict:
    """Read a small JSON object.

    Raises:
        ValueError: It is missing, too large, not JSON or not an object.
    """
    data = read_json(path, max_bytes=MAX_JSON_BYTES)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object, got {type(data).__name__}.")
    return data
