"""Trained parts of methods: modules beside an attention module's own, and the file that keeps them.

An attention module gets a child `nabla_parts` with a module for each method that has parts, so that
they move, train and are saved with the model, as adapters do.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nabla_attn.config import SparseConfig, parse
from nabla_attn.errors import first_line
from nabla_attn.files import whole_file
from nabla_attn.methods import find, names
from nabla_attn.models.modules import attention_modules, num_heads, unwrap
from nabla_attn.models.table import row_of

CHILD = "nabla_parts"
METHOD_PARTS = "method_parts.safetensors"
"""The name of the file beside weights that were trained with the parts in it."""

_KEY = re.compile(rf"(\w+)\.(.+)\.{CHILD}\.([a-z0-9]+)\.([\w.]+)")
_QUERY_LAYERS = ("to_q", "to_query", "to_qkv")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Path of an attention module -> method -> its parts there.
LayerParts = dict[str, dict[str, nn.Module]]


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The trained parts of an attention module, by the names of their methods."""
    child: Any = module._modules.get(CHILD)
    return {} if child is None else dict(child.items())


def make_parts(model: nn.Module, method_names: Iterable[str]) -> LayerParts:
    """Parts at their neutral element for the layers of a model that have none.

    Args:
        model: A model in the table, without wrappers.
        method_names: Methods; those without parts are passed over.

    Raises:
        ValueError: An attention module does not say its sizes.
    """
    wanted = [name for name in sorted(method_names) if find(name).parts is not None]
    made: LayerParts = {}
    for path, module in attention_modules(model, row_of(model)).items() if wanted else ():
        missing = [name for name in wanted if name not in parts_of(module)]
        made[path] = {name: _neutral(name, module, path) for name in missing}
    return made


def attach(model: nn.Module, parts: LayerParts) -> LayerParts:
    """Put parts into a model; returns those of the same methods that were there before."""
    before: LayerParts = {}
    for path, mine in parts.items():
        module = model.get_submodule(path)
        before[path] = {name: part for name, part in parts_of(module).items() if name in mine}
        if mine:
            module.add_module(CHILD, nn.ModuleDict(parts_of(module) | mine))
    return before


def detach(model: nn.Module, parts: LayerParts) -> None:
    """Take parts out of a model."""
    for path, mine in parts.items():
        module = model.get_submodule(path)
        left = {name: part for name, part in parts_of(module).items() if name not in mine}
        module._modules.pop(CHILD, None)
        if left:
            module.add_module(CHILD, nn.ModuleDict(left))


def add_method_parts(model: nn.Module, method_names: Iterable[str]) -> None:
    """Put parts at their neutral element into the layers that have none, to stay in the model.

    Raises:
        ValueError: An attention module does not say its sizes.
    """
    model = unwrap(model)
    attach(model, make_parts(model, method_names))


def read_method_parts(models: Mapping[str, nn.Module], file: str | Path) -> dict[str, LayerParts]:
    """The parts of a file, by the names of the models that they fit; they are not put in.

    Raises:
        ValueError: It is no file of trained parts, one of other models, or has odd numbers.
    """
    found: dict[str, dict[str, dict[str, dict[str, Tensor]]]] = {}
    for key, value in _read_tensors(Path(file)).items():
        match = _KEY.fullmatch(key)
        if match is None or match[3] not in names() or find(match[3]).parts is None:
            raise ValueError(f"{file}: {key[:80]!r} is no trained part of a method.")
        model, path, method, name = match.groups()
        found.setdefault(model, {}).setdefault(path, {}).setdefault(method, {})[name] = value
    if len(found) == len(models) == 1:
        # Of a pipeline's second transformer alone, for example.
        found = {next(iter(models)): next(iter(found.values()))}
    return {name: _fitted(models, name, layers, file) for name, layers in found.items()}


def algorithm_of(file: str | Path) -> SparseConfig:
    """The algorithm that a file of trained parts was trained with.

    Raises:
        ValueError: It is no such file.
    """
    with _opened(Path(file)) as tensors:
        return _algorithm(file, tensors.metadata())


def save_method_parts(
    path: Path, weights: Mapping[str, Tensor], algorithm: SparseConfig | str
) -> None:
    """Write a file of trained parts, whole or not at all.

    Args:
        path: The file.
        weights: Parts as `named_method_parts` names them.
        algorithm: The algorithm that they were trained with.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"algorithm": str(algorithm)})


def named_method_parts(name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parts among the weights of a model, named as in the file.

    Args:
        name: The model's name in its pipeline.
        weights: Its weights, by their names in it.
    """
    return {f"{name}.{key}": value for key, value in weights.items() if is_method_part(key)}


def is_method_part(name: str) -> bool:
    """Whether a weight of this name belongs to a method's trained parts."""
    return f".{CHILD}." in name


def method_parts_fingerprint(models: Iterable[nn.Module]) -> str | None:
    """Hash of the trained parts in models; None without any."""
    total, has_parts = hashlib.sha256(), False
    for place, model in enumerate(models):
        for name, value in _weights(unwrap(model)):
            has_parts = True
            content = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            total.update(f"{place}.{name}\n".encode() + content)
    return total.hexdigest() if has_parts else None


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in model.named_parameters() if is_method_part(name))


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise ValueError(
            f"{file} is no file of trained parts ({first_line(error)}). Pass what nabla train or "
            "Handle.save_method_parts wrote."
        ) from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with _opened(file) as tensors:
        _algorithm(file, tensors.metadata())
        found = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    for key, value in found.items():
        if value.dtype not in _DTYPES or not value.isfinite().all():
            raise ValueError(f"{file}: {key[:80]!r} has values that are no finite numbers.")
    return found


def _algorithm(file: str | Path, metadata: Mapping[str, str] | None) -> SparseConfig:
    try:
        return parse((metadata or {})["algorithm"])
    except KeyError:
        raise ValueError(f"{file} is no file of trained parts: it names no algorithm.") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _fitted(
    models: Mapping[str, nn.Module],
    name: str,
    layers: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    file: str | Path,
) -> LayerParts:
    """Parts of one model with the values of a file."""
    if name not in models:
        raise ValueError(f"{file} has parts of a {name[:40]!r}: got {', '.join(models)}.")
    model = models[name]
    modules = attention_modules(model, row_of(model))
    methods = sorted({method for mine in layers.values() for method in mine})
    if odd := sorted(set(layers) - set(modules)):
        raise ValueError(f"{file}: {type(model).__name__} has no layer {odd[0][:80]!r}.")
    fitted: LayerParts = {}
    for path, module in modules.items():
        fitted[path] = {}
        for method in methods:
            part = _neutral(method, module, path)
            values = layers.get(path, {}).get(method, {})
            wanted = {key: tuple(value.shape) for key, value in part.named_parameters()}
            given = {key: tuple(value.shape) for key, value in values.items()}
            if given != wanted:
                raise ValueError(
                    f"{file} does not fit {type(model).__name__}: {method} of {path} needs "
                    f"{wanted}, got {given or 'nothing'}."
                )
            part.load_state_dict(dict(values))
            fitted[path][method] = part
    return fitted


def _neutral(method: str, module: nn.Module, path: str) -> nn.Module:
    """A method's parts for one attention module, beside its weights and in their type."""
    build = find(method).parts
    assert build is not None
    layers = (getattr(module, name, None) for name in _QUERY_LAYERS)
    query = next((layer for layer in layers if hasattr(layer, "in_features")), None)
    if query is None:
        raise ValueError(
            f"{path}: {type(module).__name__} has none of {', '.join(_QUERY_LAYERS)}, which say "
            f"the sizes that the parts of {method} need. Use another method."
        )
    heads = num_heads(module)
    outputs = query.out_features // (3 if query is getattr(module, "to_qkv", None) else 1)
    part = build(heads=heads, dim=outputs // heads, width=query.in_features)
    weights = [weight for weight in module.parameters() if weight.dtype in _DTYPES]
    return part.to(weights[0].device, weights[0].dtype) if weights else part
