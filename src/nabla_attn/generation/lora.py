"""LoRA adapters: loaded into a pipeline from files, and told apart in records."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nabla_attn.errors import first_line
from nabla_attn.files import fingerprint_files
from nabla_attn.sizes import denoisers

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
PARTS = ("transformer", "transformer_2")
# Some files have them beside the adapters; diffusers drops those of norms without a word.
WHOLE_CHANGES = (".diff",)
BUILTIN_LORA = Path(__file__).parents[1] / "moving_shapes" / "lora"


def lora_place(source: str) -> tuple[str, Path]:
    """The transformer's name and the file that a source of `load_lora` stands for.

    Raises:
        ValueError: There is no such safetensors file.
    """
    name, equals, rest = source.partition("=")
    part, text = (name, rest) if equals and name in PARTS else (PARTS[0], source)
    path = BUILTIN_LORA if text == "builtin" else Path(text)
    file = path / LORA_WEIGHTS if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(
            f"no LoRA weights at {text!r}. Pass a folder with {LORA_WEIGHTS}, such as `lora` of a "
            f"training run, or a .safetensors file; {PARTS[1]}=FOLDER is for a second transformer."
        )
    return part, file


def lora_fingerprint_of(source: str) -> str:
    """Place and contents of a source of `load_lora`, for names that must differ where these do."""
    part, file = lora_place(source)
    return f"{part} {fingerprint_files(file.parent, [file])}"


def load_lora(pipeline: Any, source: str) -> None:
    """Put LoRA weights into a transformer of a pipeline, beside those that are there.

    Args:
        pipeline: A pipeline of diffusers.
        source: A folder with `pytorch_lora_weights.safetensors`, or a .safetensors file in a format
            that the pipeline's `load_lora_weights` reads; "builtin" are the built-in model's.
            `transformer_2=FOLDER` is for the second transformer of Wan 2.2.

    Raises:
        ValueError: There is no such file, no such transformer, or the weights do not fit it.
    """
    part, file = lora_place(source)
    model = getattr(pipeline, part, None)
    if model is None or not hasattr(model, "load_lora_adapter"):
        reason = "has no" if model is None else "takes no adapters in its"
        raise ValueError(f"{type(pipeline).__name__} {reason} {part}. Leave out {file}.")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError(
            "LoRA needs PEFT. Install it with: pip install 'nabla-attn[train]'."
        ) from None
    before = _adapters(model)
    try:
        _load(pipeline, model, part, file)
    except Exception as error:
        name = type(model).__name__
        raise ValueError(f"{file} does not fit {name} ({first_line(error)}).") from error
    added = [name for name in _adapters(model) if name not in before]
    if not added:
        raise ValueError(f"{file} has no LoRA weights for {type(model).__name__}.")
    if problem := _problem_of(_weights_of(model, added)):
        model.delete_adapters(added)
        raise ValueError(f"{file} cannot be used: {problem}.")
    # Loading one more leaves those before aside.
    model.set_adapters(_adapters(model))
    _warn_of_rest(pipeline, model, file, added)


def lora_fingerprint(pipeline: Any) -> str | None:
    """Hash of the adapters that a pipeline's transformers use, weights and scales; None without.

    Those that were loaded with diffusers' own methods count as well.
    """
    used = [
        (f"{place}.{name}.{key}", layer.scaling[adapter], value)
        for place, model in enumerate(denoisers(pipeline))
        if _adapters(model)
        for name, layer in _tuned(model)
        for adapter in layer.active_adapters
        for key, value in layer.state_dict().items()
        if adapter in key.split(".")
    ]
    if not used:
        return None
    total = hashlib.sha256()
    for key, scale, value in used:
        total.update(f"{key} {scale}\n".encode() + _bytes(value))
    return total.hexdigest()


def _load(pipeline: Any, model: Any, part: str, file: Path) -> None:
    options = {"weight_name": file.name, "local_files_only": True}
    if not hasattr(pipeline, "load_lora_weights"):
        model.load_lora_adapter(file.parent, **options)
    elif part == PARTS[0]:
        pipeline.load_lora_weights(file.parent, **options)
    else:
        pipeline.load_lora_weights(file.parent, load_into_transformer_2=True, **options)


def _warn_of_rest(pipeline: Any, model: Any, file: Path, added: list[str]) -> None:
    """Warn of what a file has and the model does not take."""
    keys = _read_keys(pipeline, file)
    asked = {_layer_of(key) for key in keys}
    used = {
        f"{PARTS[0]}.{name}"
        for name, layer in _tuned(model)
        if any(adapter in layer.scaling for adapter in added)
    }
    name = type(model).__name__
    left = asked - used - {each.removeprefix(f"{PARTS[0]}.") for each in used}
    _warn(file, left, len(asked), f"have no place in {name} and are left out")
    with safe_open(file, framework="pt") as tensors:
        whole = {key for key in tensors.keys() if key.endswith(WHOLE_CHANGES)}  # noqa: SIM118
    _warn(file, whole, len(keys), "change whole weights and may be left out", what="tensors")


def _warn(file: Path, names: set[str], count: int, problem: str, what: str = "layers") -> None:
    if names:
        warnings.warn(
            f"{file}: {len(names)} of its {count} {what} {problem}, first {min(names)}.",
            stacklevel=4,
        )


def _read_keys(pipeline: Any, file: Path) -> list[str]:
    """The names of a file's tensors, as diffusers' formats have them."""
    if hasattr(pipeline, "lora_state_dict"):
        found = pipeline.lora_state_dict(file.parent, weight_name=file.name, local_files_only=True)
        return list(found[0] if isinstance(found, tuple) else found)
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _layer_of(key: str) -> str:
    """The layer that a tensor of an adapter belongs to."""
    return key.split(".lora")[0].removesuffix(".alpha").removesuffix(".dora_scale")


def _adapters(model: Any) -> list[str]:
    return list(getattr(model, "peft_config", {}))


def _problem_of(weights: list[tuple[str, Tensor]]) -> str:
    """What is wrong with the weights of adapters; "" where nothing is."""
    # What the file has one half of alone never got values.
    if missing := [key for key, value in weights if value.is_meta]:
        return f"{len(missing)} of its {len(weights)} tensors are missing, first {missing[0]}"
    if odd := [key for key, value in weights if not value.isfinite().all()]:
        return f"{odd[0]} has values that are no finite numbers"
    return ""


def _weights_of(model: Any, adapters: list[str]) -> list[tuple[str, Tensor]]:
    return [
        (f"{name}.{key}", value)
        for name, layer in _tuned(model)
        for key, value in layer.state_dict().items()
        if any(adapter in key.split(".") for adapter in adapters)
    ]


def _tuned(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters
    ]


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
