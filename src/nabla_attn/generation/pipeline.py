"""Load a diffusers pipeline directory, checked part by part so that a bad file is named."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nabla_attn.errors import first_line
from nabla_attn.files import fingerprint_files, read_json
from nabla_attn.generation.lora import load_lora, lora_fingerprint, lora_place
from nabla_attn.generation.model_index import find_class, named_parts, read_model_index
from nabla_attn.sizes import denoisers

BUILTIN = "builtin"
BUILTIN_DIRECTORY = Path(__file__).parents[1] / "moving_shapes" / "model"
# These hand latents to their VAE in the transformer's dtype.
ONE_DTYPE = ("CogVideoX", "ConsisID", "EasyAnimate", "Mochi")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    source: str | Path = BUILTIN,
    *,
    device: str = "auto",
    dtype: str = "auto",
    lora: Sequence[str] = (),
) -> Any:
    """Load a text-to-video pipeline from a diffusers directory; nothing is downloaded.

    Args:
        source: ``"builtin"`` or a directory with a ``model_index.json``.
        device: ``"auto"`` (a GPU if there is one), or a torch device such as ``"cuda:0"``.
        dtype: of transformer and text encoder: a name of :data:`DTYPES`, or ``"auto"``. The VAE
            stays in float32, where its decoder is exact, unless its pipeline wants one dtype.
        lora: adapters to put in, each as :func:`~nabla_attn.generation.lora.load_lora` takes it.

    Returns:
        The diffusers pipeline, on the device.

    Raises:
        ValueError: the directory or one of its files is missing or broken, a config does not match
            its weights, or device or dtype cannot be had here. The file is named.
    """
    for each in lora:
        lora_place(each)
    directory = model_directory(source)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    index = read_model_index(directory)
    pipeline_class = find_class("diffusers", index["_class_name"], directory)
    vae_kind = kind if index["_class_name"].startswith(ONE_DTYPE) else torch.float32
    parts = {
        name: _load_part(directory / name, entry, vae_kind if name == "vae" else kind)
        for name, entry in named_parts(index).items()
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = pipeline_class.from_pretrained(directory, local_files_only=True, **parts)
    except Exception as error:
        raise ValueError(f"{directory}: not a whole pipeline ({first_line(error)}).") from error
    for each in lora:
        load_lora(pipeline, each)
    return pipeline.to(place)


def model_directory(source: str | Path) -> Path:
    """The directory that ``"builtin"`` or a path stands for.

    Raises:
        ValueError: there is no such directory, or it has no ``model_index.json``.
    """
    if str(source) == BUILTIN:
        if not (BUILTIN_DIRECTORY / "model_index.json").is_file():
            raise ValueError(
                "this installation has no built-in model. Train one with `nabla train --recipe "
                "builtin`, or pass a diffusers pipeline directory."
            )
        return BUILTIN_DIRECTORY
    directory = Path(source)
    if not directory.is_dir():
        raise ValueError(
            f"model directory not found: {source}. Pass 'builtin' or a diffusers directory."
        )
    if not (directory / "model_index.json").is_file():
        raise ValueError(
            f"{directory} has no model_index.json, so it is not a diffusers pipeline directory."
        )
    return directory


def model_name(pipeline: Any) -> str:
    """``"builtin"`` or the directory the pipeline was loaded from."""
    origin = str(pipeline.config.get("_name_or_path", ""))
    return BUILTIN if origin == str(BUILTIN_DIRECTORY) else origin


def model_identity(pipeline: Any) -> dict[str, str | None]:
    """What the videos of a pipeline depend on besides the request; equal ones may be compared.

    Returns:
        "model" as `model_name`, "model_files" as `fingerprint` (None if it was not loaded from a
        directory), "device", "dtype" of the transformer, and "lora" as `lora_fingerprint`, which is
        left out without adapters.
    """
    directory = Path(str(pipeline.config.get("_name_or_path", "")))
    is_saved = (directory / "model_index.json").is_file()
    # With offloading the pipeline rests on the CPU and works elsewhere.
    device = getattr(pipeline, "_execution_device", pipeline.device)
    lora = lora_fingerprint(pipeline)
    identity = {
        "model": model_name(pipeline),
        "model_files": fingerprint(directory)[:16] if is_saved else None,
        "device": str(device),
        "dtype": str(denoisers(pipeline)[0].dtype).removeprefix("torch."),
    }
    return identity if lora is None else identity | {"lora": lora[:16]}


def fingerprint(model: Path) -> str:
    """`fingerprint_files` of those that a pipeline is loaded from."""
    return fingerprint_files(model, [model / "model_index.json", *sorted(model.glob("*/[!.]*"))])


def resolve_device(name: str) -> torch.device:
    """A torch device by name; ``"auto"`` takes a GPU if there is one.

    Raises:
        ValueError: not a device name, or not present in this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here: {first_line(error)}. Try cpu or auto."
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """A torch dtype by name; ``"auto"`` is bfloat16 where the device computes in it, or float32.

    Raises:
        ValueError: an unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"unknown dtype {name!r}. Known: auto, {', '.join(DTYPES)}.")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def _load_part(folder: Path, entry: tuple[str, str], dtype: torch.dtype) -> Any:
    library, class_name = entry
    part_class = find_class(library, class_name, folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; model_index.json names it as {class_name}.")
    is_model = issubclass(part_class, torch.nn.Module)
    options: dict[str, Any] = {}
    if is_model:
        _check_weights(folder)
        options = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
    try:
        loaded = part_class.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        raise ValueError(
            f"{folder}: its config and files do not make a {class_name} ({first_line(error)})."
        ) from error
    if not is_model:
        return loaded
    part, info = loaded
    _check_match(folder, info)
    return part.eval()


def _check_weights(folder: Path) -> None:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    for path in folder.glob("*.safetensors.index.json"):
        files += [folder / name for name in _shard_names(path)]
    if not files:
        raise ValueError(f"{folder} has no .safetensors file with its weights.")
    for path in dict.fromkeys(files):
        if not path.is_file():
            raise ValueError(f"{path} is missing; the index beside it names it.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:
            raise ValueError(
                f"{path}: damaged or truncated safetensors file ({first_line(error)}). "
                "Copy it again."
            ) from error


def _shard_names(path: Path) -> list[str]:
    try:
        names = set(read_json(path)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors index ({first_line(error)}).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path}: it names {name!r}, which is not a file of its own folder.")
    return sorted(names)


def _check_match(folder: Path, info: dict[str, Any]) -> None:
    for key, meaning in (
        ("mismatched_keys", "tensors of another shape"),
        ("missing_keys", "tensors missing from the weights"),
        ("unexpected_keys", "tensors unknown to the config"),
    ):
        keys = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info[key])
        if keys:
            raise ValueError(
                f"{folder / 'config.json'} does not match its weights: "
                f"{len(keys)} {meaning}, first {keys[0]}."
            )
