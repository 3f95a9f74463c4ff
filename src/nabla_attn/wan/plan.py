"""Weight files against the model that their shapes describe, checked before anything is read."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nabla_attn.wan import rules
from nabla_attn.wan.kinds import describe
from nabla_attn.wan.parts import KINDS, PartKind
from nabla_attn.wan.tensor_files import FLOAT_DTYPES, TensorFile

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from: a tensor, or one of ``pieces`` equal pieces of it."""

    file: TensorFile
    name: str
    piece: int = 0
    pieces: int = 1

    def read(self, shape: torch.Size, dtype: torch.dtype | None) -> torch.Tensor:
        """The values in ``shape``, cast to ``dtype`` (None: as stored)."""
        value = self.file.read(self.name)
        if self.pieces > 1:
            value = value.chunk(self.pieces, dim=0)[self.piece]
        return value.reshape(shape).to(dtype or value.dtype)


@dataclass(frozen=True)
class PartPlan:
    """A model on the meta device and the source of each of its parameters, all checked."""

    kind: PartKind
    config: dict[str, Any]
    model: "nn.Module"
    sources: dict[str, Source]


def plan_part(kind_name: str, files: Iterable[TensorFile], *config_args: Any) -> PartPlan:
    """Check open weight files against the model that their shapes describe; allocate nothing.

    Args:
        kind_name: a key of ``KINDS``, what the files are expected to hold.
        files: the open files of this part.
        config_args: further arguments of the kind's ``configure``.

    Raises:
        ValueError: the files hold another part, miss tensors, have extra ones, a tensor twice,
            wrong shapes, or types that are no floats. The message names file and tensor.
    """
    kind = KINDS[kind_name]
    owner = _owners(files)
    where = _file_names(owner)
    found = describe(owner)
    if found != kind_name:
        raise ValueError(
            f"{where}: expected the {kind_name}, found {_article(found)}. Put each file under "
            "its own name."
        )
    infos = {rules.strip_prefix(name): file.infos[name] for name, file in owner.items()}
    try:
        config = kind.configure(infos, *config_args)
    except KeyError as error:
        raise ValueError(
            f"{where}: {kind_name} without tensor {error}. Download it again."
        ) from None
    model = kind.build(config)
    sources = _sources(kind.move(owner), owner)
    _check_against_model(kind_name, where, model, sources, kind.ties)
    return PartPlan(kind, config, model, sources)


def _owners(files: Iterable[TensorFile]) -> dict[str, TensorFile]:
    owner: dict[str, TensorFile] = {}
    for file in files:
        for name in file.infos:
            if name in owner:
                raise ValueError(
                    f"tensor {name} is in both {owner[name].path} and {file.path}. Remove the "
                    "file that does not belong there."
                )
            owner[name] = file
    return owner


def _file_names(owner: dict[str, TensorFile]) -> str:
    return ", ".join(sorted({str(file.path) for file in owner.values()}))


def _article(found: str) -> str:
    return found if found.startswith("unknown") else f"the {found}"


def _sources(moves: rules.Moves, owner: dict[str, TensorFile]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for old, targets in moves.items():
        file = owner[old]
        if targets and file.infos[old].dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{file.path}: {old} is stored as {file.infos[old].dtype}; only float weights are "
                "read. Take the unquantised checkpoint."
            )
        for piece, target in enumerate(targets):
            if target in sources:
                raise ValueError(
                    f"{file.path}: {old} and {sources[target].name} both give {target}."
                )
            sources[target] = Source(file, old, piece, len(targets))
    return sources


def _check_against_model(
    kind_name: str,
    where: str,
    model: "nn.Module",
    sources: dict[str, Source],
    ties: tuple[str, ...],
) -> None:
    wanted = {name: p.shape for name, p in model.state_dict().items() if name not in ties}
    if missing := sorted(wanted.keys() - sources.keys()):
        raise ValueError(f"{where}: {kind_name} lacks {_some(missing)}. Download it again.")
    if extra := sorted(sources[name].name for name in sources.keys() - wanted.keys()):
        raise ValueError(
            f"{where}: {kind_name} has tensors that no model of its shape has: {_some(extra)}. "
            "Remove the file that does not belong there."
        )
    for name, source in sources.items():
        info = source.file.infos[source.name]
        got = list(info.shape)
        if got and source.pieces > 1:
            got[0] //= source.pieces
        # Class and position embeddings carry leading axes of one.
        if [n for n in got if n != 1] != [n for n in wanted[name] if n != 1]:
            raise ValueError(
                f"{source.file.path}: {source.name} has shape {info.shape}, its model needs "
                f"{tuple(wanted[name])}. The file belongs to another checkpoint."
            )


def _some(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
