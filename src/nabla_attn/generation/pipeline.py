"""Load a diffusers pipeline directory, checked part by part so that a bad file is named."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nabla_attn.errors import first_line
from nabla_attn.files import read_json
from nabla_attn.generation.lora import load_lora, lora_fingerprint, lora_place
from nabla_attn.generation.model_index import (
    check_layers,
    find_class,
    fingerprint,
    named_parts,
    read_model_index,
)
from nabla_attn.generation.placement import Placement, resolve_device, resolve_dtype
from nabla_attn.models import METHOD_PARTS, load_method_parts, method_parts_fingerprint
from nabla_attn.sizes import denoisers

BUILTIN = "builtin"
BUILTIN_DIRECTORY = Path(__file__).parents[1] / "moving_shapes" / "model"
# These hand latents to their VAE in the transformer's dtype.
ONE_DTYPE = ("CogVideoX", "ConsisID", "EasyAnimate", "Mochi")
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_pipeline(
    source: str | Path = BUILTIN,
    *,
    device: str = "auto",
    dtype: str = "auto",
    lora: Sequence[str] = (),
    parts: str | Path | None = None,
    **placement: Any,
) -> Any:
    """Load a diffusers pipeline of videos; nothing is downloaded.

    Args:
        source: `"builtin"`, a directory with a `model_index.json`, or the id of a model in the
            local cache of the Hugging Face Hub.
        device: `"auto"` (a GPU if there is one), or a torch device such as `"cuda:0"`.
        dtype: Dtype of transformer and text encoder: a name of `DTYPES`, its short form, or
            `"auto"`. The VAE stays in float32, where its decoder is exact, unless its pipeline
            wants one dtype.
        lora: Adapters to put in, each as `load_lora` takes it, with the trained parts of methods
            beside them, if there are any.
        parts: File of trained parts of methods, in place of those that come with the model.
        placement: How memory is saved, as `Placement` takes it.

    Returns:
        The diffusers pipeline, on the device.

    Raises:
        ValueError: The directory or one of its files is missing or broken, a config does not match
            its weights, or device, dtype or placement cannot be had here. The file is named.
    """
    for each in lora:
        lora_place(each)
    directory = model_directory(source)
    place, saving = resolve_device(device), Placement(**placement)
    kind = resolve_dtype(dtype, place)
    saving.check(place)
    index = read_model_index(directory)
    pipeline_class = find_class("diffusers", index["_class_name"], directory)
    vae_kind = dtype_of_vae(index["_class_name"], kind)
    loaded = {
        name: _load_quantized(directory / name, entry, kind, saving)
        if saving.quantize and name.startswith("transformer")
        else _load_part(directory / name, entry, vae_kind if name == "vae" else kind)
        for name, entry in named_parts(index).items()
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = pipeline_class.from_pretrained(directory, local_files_only=True, **loaded)
    except Exception as error:
        raise ValueError(f"{directory}: not a whole pipeline ({first_line(error)}).") from error
    for each in lora:
        load_lora(pipeline, each)
    for file in _files_of_parts(directory, lora, parts):
        load_method_parts(pipeline, file)
    return saving.place(pipeline, place)


def _files_of_parts(
    directory: Path, lora: Sequence[str], parts: str | Path | None
) -> list[str | Path]:
    """Files of trained parts: the model's own, those of adapters, and the one asked for."""
    beside = [lora_place(each)[1].with_name(METHOD_PARTS) for each in lora]
    own = sorted(directory.glob(f"transformer*/{METHOD_PARTS}"))
    asked = [] if parts is None else [parts]
    return [*own, *(file for file in beside if file.is_file()), *asked]


def dtype_of_vae(pipeline_class: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a pipeline's VAE is loaded in, beside a transformer in another."""
    return dtype if pipeline_class.startswith(ONE_DTYPE) else torch.float32


def _load_quantized(
    folder: Path, entry: tuple[str, str], dtype: torch.dtype, placement: Placement
) -> Any:
    part_class = find_class(*entry, folder)
    check_layers(folder)
    options: dict[str, Any] = {
        "quantization_config": placement.quantization(dtype),
        "torch_dtype": dtype,
        "local_files_only": True,
    }
    try:
        if placement.is_gguf:
            file = placement.quantize
            return part_class.from_single_file(file, config=str(folder), **options).eval()
        return part_class.from_pretrained(folder, **options).eval()
    except Exception as error:
        if placement.is_gguf:
            raise ValueError(
                f"{placement.quantize} does not make the {entry[1]} of {folder} "
                f"({first_line(error)}). Pass a GGUF file of that model, whole, or none."
            ) from error
        raise ValueError(
            f"{entry[1]} cannot be quantized by {placement.quantize} ({first_line(error)}). Leave "
            "out --quantize, or pass another."
        ) from error


def model_directory(source: str | Path) -> Path:
    """The directory that `"builtin"`, a path, or the id of a model in the local cache stands for.

    Raises:
        ValueError: There is none, or it has no `model_index.json`.
    """
    if str(source) == BUILTIN:
        if not (BUILTIN_DIRECTORY / "model_index.json").is_file():
            raise ValueError(
                "this installation has no built-in model. Train one with `nabla train --recipe "
                "builtin`, or pass a diffusers pipeline directory."
            )
        return BUILTIN_DIRECTORY
    directory = Path(source)
    if not directory.exists() and MODEL_ID.fullmatch(str(source)):
        directory = _cached(str(source))
    if not directory.is_dir():
        raise ValueError(
            f"model directory not found: {source}. Pass 'builtin', a diffusers directory, or a "
            "model id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    if not (directory / "model_index.json").is_file():
        raise ValueError(
            f"{directory} has no model_index.json, so it is not a diffusers pipeline directory."
        )
    return directory


def _cached(model_id: str) -> Path:
    """The snapshot of a model in the local cache of the Hugging Face Hub."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        raise ValueError(
            f"there is no directory {model_id}, and no such model in {constants.HF_HUB_CACHE}. "
            f"Download it once with: hf download {model_id}"
        ) from None


def model_name(pipeline: Any) -> str:
    """`"builtin"` or the directory the pipeline was loaded from."""
    origin = str(pipeline.config.get("_name_or_path", ""))
    return BUILTIN if origin == str(BUILTIN_DIRECTORY) else origin


def model_identity(pipeline: Any) -> dict[str, str | None]:
    """What the videos of a pipeline depend on besides the request; equal ones may be compared.

    Returns:
        "model" as `model_name`, "model_files" as `fingerprint` (None if it was not loaded from a
        directory), "device", "dtype" of the transformer; and where they apply "lora" as
        `lora_fingerprint`, "method_parts", "vae_tiling" and "quantized".
    """
    directory = Path(str(pipeline.config.get("_name_or_path", "")))
    is_saved = (directory / "model_index.json").is_file()
    # With offloading the pipeline rests on the CPU and works elsewhere.
    device = getattr(pipeline, "_execution_device", pipeline.device)
    lora = lora_fingerprint(pipeline)
    parts = method_parts_fingerprint(denoisers(pipeline))
    identity = {
        "model": model_name(pipeline),
        "model_files": fingerprint(directory)[:16] if is_saved else None,
        "device": str(device),
        "dtype": str(denoisers(pipeline)[0].dtype).removeprefix("torch."),
    }
    quantizer = getattr(denoisers(pipeline)[0], "hf_quantizer", None)
    is_tiled = getattr(getattr(pipeline, "vae", None), "use_tiling", False)
    extra = {
        "lora": None if lora is None else lora[:16],
        "method_parts": None if parts is None else parts[:16],
        "vae_tiling": "on" if is_tiled else None,
        "quantized": None if quantizer is None else type(quantizer).__name__,
    }
    return identity | {name: value for name, value in extra.items() if value is not None}


def _load_part(folder: Path, entry: tuple[str, str], dtype: torch.dtype) -> Any:
    library, class_name = entry
    part_class = find_class(library, class_name, folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; model_index.json names it as {class_name}.")
    is_model = issubclass(part_class, torch.nn.Module)
    options: dict[str, Any] = {}
    if is_model:
        _check_weights(folder)
        check_layers(folder)
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
