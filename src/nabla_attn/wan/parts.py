"""The parts of a pipeline: how each is told, renamed, built, checked and filled with its weights.

A part is planned first: its model is built on the meta device from the shapes of the weights, and
every tensor is compared with it. Only then is anything read, one tensor at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nabla_attn.errors import first_line
from nabla_attn.progress import ProgressCallback, ignore_progress
from nabla_attn.wan import names, shapes
from nabla_attn.wan.tensor_files import FLOAT_DTYPES, TensorFile, open_tensor_file, shown


@dataclass(frozen=True)
class PartKind:
    """One kind of part.

    Attributes:
        component: Its folder and keyword in a diffusers pipeline.
        signature: Tensor names that only this part has, in the original layout.
        move: From tensor names to new names.
        configure: From shapes to the model's config.
        model_class: Name of the model's class, in diffusers or, with `config_class`, transformers.
        config_class: Name of the class that holds its config.
        ties: Names that share another parameter and are not stored.
    """

    component: str
    signature: tuple[str, ...]
    move: Callable[[Iterable[str]], names.Moves]
    configure: Callable[..., dict[str, Any]]
    model_class: str
    config_class: str | None = None
    ties: tuple[str, ...] = ()

    @property
    def weights_stem(self) -> str:
        """Name of the weight file in a diffusers directory, without suffix."""
        return "model" if self.config_class else "diffusion_pytorch_model"

    def build(self, config: dict[str, Any]) -> Any:
        """The model of `config`, its parameters on the meta device."""
        import diffusers
        import transformers
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            if self.config_class:
                held = getattr(transformers, self.config_class)(**config)
                return getattr(transformers, self.model_class)(held)
            name = "WanVACETransformer3DModel" if "vace_layers" in config else self.model_class
            return getattr(diffusers, name)(**config)


KINDS = {
    "transformer": PartKind(
        "transformer",
        ("blocks.0.self_attn.q.weight", "patch_embedding.weight"),
        names.move_transformer,
        shapes.transformer_config,
        "WanTransformer3DModel",
    ),
    "text encoder": PartKind(
        "text_encoder",
        ("token_embedding.weight", "blocks.0.attn.q.weight"),
        names.move_t5,
        shapes.t5_config,
        "UMT5EncoderModel",
        "UMT5Config",
        ties=("encoder.embed_tokens.weight",),
    ),
    "VAE": PartKind(
        "vae",
        ("conv1.weight", "decoder.upsamples.0.residual.0.gamma"),
        names.move_vae,
        shapes.vae_config,
        "AutoencoderKLWan",
    ),
    "Wan 2.2 VAE": PartKind(
        "vae",
        ("conv1.weight", "decoder.upsamples.0.upsamples.0.residual.0.gamma"),
        names.move_vae_2_2,
        shapes.vae_2_2_config,
        "AutoencoderKLWan",
    ),
    "image encoder": PartKind(
        "image_encoder",
        ("visual.cls_embedding", "visual.patch_embedding.weight"),
        names.move_clip,
        shapes.clip_config,
        "CLIPVisionModel",
        "CLIPVisionConfig",
    ),
}
# What else a file may be taken for.
OTHER_SIGNATURES = {
    "LoRA": ("blocks.0.self_attn.q.lora_A.weight",),
    "transformer (diffusers names)": ("blocks.0.attn1.to_q.weight",),
    "text encoder (transformers names)": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "VAE (diffusers names)": ("quant_conv.weight",),
}


def describe(tensor_names: Iterable[str]) -> str:
    """Name the part that tensors belong to, or `"unknown tensors"`."""
    plain = {names.strip_prefix(name) for name in tensor_names}
    signatures = {name: kind.signature for name, kind in KINDS.items()} | OTHER_SIGNATURES
    found = (name for name, signature in signatures.items() if plain.issuperset(signature))
    return next(found, "unknown tensors")


def vae_kind(path: Path) -> str:
    """The kind of VAE that a file name promises; its tensors are checked against it."""
    return "Wan 2.2 VAE" if path.name.startswith("Wan2.2") else "VAE"


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from: a tensor, or one of `num_pieces` equal pieces of it."""

    file: TensorFile
    name: str
    piece: int = 0
    num_pieces: int = 1

    def read(self, shape: Iterable[int], dtype: torch.dtype | None) -> torch.Tensor:
        """The values in `shape`, cast to `dtype`; None leaves them as stored."""
        value = self.file.read(self.name)
        if self.num_pieces > 1:
            value = value.chunk(self.num_pieces, dim=0)[self.piece]
        return value.reshape(tuple(shape)).to(dtype or value.dtype)


@dataclass(frozen=True)
class PartPlan:
    """A model on the meta device and the source of each of its parameters, all checked."""

    kind: PartKind
    model: nn.Module
    sources: dict[str, Source]

    def dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype to keep a parameter in.

        Args:
            name: Name of the parameter.
            dtype: The dtype that was asked for; None is the stored one, float8 widened to bfloat16.
                In half precision the modules that diffusers and transformers keep in float32 stay
                so; transformers keeps them in float16 alone.
        """
        halves = (torch.float16,) if self.kind.config_class else (torch.float16, torch.bfloat16)
        if dtype in halves:
            kept: Any = getattr(self.model, "_keep_in_fp32_modules", None) or ()
            if any(part in name.split(".") for part in kept):
                return torch.float32
        source = self.sources[name]
        stored = source.file.infos[source.name].dtype
        assert stored is not None
        return dtype or (stored if stored.itemsize > 1 else torch.bfloat16)


def plan_part(kind_name: str, files: Iterable[TensorFile], *config_args: Any) -> PartPlan:
    """Check open weight files against the model that their shapes describe; allocate nothing.

    Args:
        kind_name: A key of `KINDS`, the part that the files are expected to hold.
        files: The open files of this part.
        config_args: Further arguments of the kind's `configure`.

    Raises:
        ValueError: The files hold another part, lack tensors, have extra ones or one twice, or
            shapes or dtypes do not fit. The message names file and tensor.
    """
    kind = KINDS[kind_name]
    stored = _plain_names(files)
    where = ", ".join(sorted({str(source.file.path) for source in stored.values()}))
    found = describe(stored)
    if found != kind_name:
        article = "" if found.startswith("unknown") else "the "
        raise ValueError(
            f"{where}: expected the {kind_name}, found {article}{found}. Put each file under its "
            "own name."
        )
    infos = {name: source.file.infos[source.name] for name, source in stored.items()}
    try:
        model = kind.build(kind.configure(infos, *config_args))
        moves = kind.move(stored)
    except Exception as error:
        # Names and shapes are the file's own, and may be anything.
        raise ValueError(
            f"{where}: no {kind_name} that can be built: {first_line(error)}."
        ) from error
    sources = _split(moves, stored)
    _check_against_model(f"{where}: {kind_name}", model, sources, kind.ties)
    return PartPlan(kind, model, sources)


def _plain_names(files: Iterable[TensorFile]) -> dict[str, Source]:
    """The tensors of all files by their names without prefix."""
    stored: dict[str, Source] = {}
    for file in files:
        for name in file.infos:
            plain = names.strip_prefix(name)
            if plain in stored:
                raise ValueError(
                    f"tensor {shown(plain)} is in both {stored[plain].file.path} and {file.path}. "
                    "Remove the one that does not belong there."
                )
            stored[plain] = Source(file, name)
    return stored


def _split(moves: names.Moves, stored: dict[str, Source]) -> dict[str, Source]:
    """The source of each new name."""
    sources: dict[str, Source] = {}
    for old, targets in moves.items():
        file, name = stored[old].file, stored[old].name
        info = file.infos[name]
        if targets and info.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{file.path}: {shown(name)} is stored as {info.dtype}; only float weights are "
                "read. Take the unquantised checkpoint."
            )
        if len(targets) > 1 and (not info.shape or info.shape[0] % len(targets)):
            raise ValueError(
                f"{file.path}: {shown(name)} has shape {info.shape}, which does not split into "
                f"{len(targets)} equal pieces. Download it again."
            )
        for piece, target in enumerate(targets):
            if target in sources:
                raise ValueError(
                    f"{file.path}: {shown(name)} and {shown(sources[target].name)} both give "
                    f"{shown(target)}. Remove one."
                )
            sources[target] = Source(file, name, piece, len(targets))
    return sources


def _check_against_model(
    what: str, model: nn.Module, sources: dict[str, Source], ties: tuple[str, ...]
) -> None:
    wanted = {name: p.shape for name, p in model.state_dict().items() if name not in ties}
    if missing := sorted(wanted.keys() - sources.keys()):
        raise ValueError(f"{what} lacks {_some(missing)}. Download it again.")
    if extra := sorted(sources[name].name for name in sources.keys() - wanted.keys()):
        raise ValueError(
            f"{what} has tensors that no model of its shape has: {_some(extra)}. Remove the file "
            "that does not belong there."
        )
    for name, source in sources.items():
        info = source.file.infos[source.name]
        got = list(info.shape)
        if source.num_pieces > 1:
            got[0] //= source.num_pieces
        # Class and position embeddings carry leading axes of one.
        if [n for n in got if n != 1] != [n for n in wanted[name] if n != 1]:
            raise ValueError(
                f"{source.file.path}: {source.name} has shape {info.shape}, its model needs "
                f"{tuple(wanted[name])}. The file belongs to another checkpoint."
            )


def _some(tensor_names: list[str], limit: int = 4) -> str:
    rest = len(tensor_names) - limit
    some = ", ".join(map(shown, tensor_names[:limit]))
    return some + (f" and {rest} more" if rest > 0 else "")


def fill(
    plan: PartPlan, dtype: torch.dtype | None, on_progress: ProgressCallback = ignore_progress
) -> Any:
    """Read the weights of a plan into its model; the peak is the model and one tensor more.

    Args:
        plan: The plan, its files still open.
        dtype: Dtype of the parameters; None keeps the stored ones (float8 becomes bfloat16).
        on_progress: Called after every tensor.
    """
    from accelerate.utils import set_module_tensor_to_device

    model: Any = plan.model
    state = model.state_dict()
    for done, (name, source) in enumerate(plan.sources.items(), start=1):
        value = source.read(state[name].shape, plan.dtype_of(name, dtype))
        set_module_tensor_to_device(model, name, "cpu", value=value, dtype=value.dtype)
        on_progress(f"loading {plan.kind.component}", done, len(plan.sources))
    if plan.kind.ties:
        model.tie_weights()
    return model.eval().requires_grad_(False)


@contextmanager
def open_part(kind_name: str, path: str | Path, *config_args: Any) -> Iterator[PartPlan]:
    """Open and check the one file of a VAE, text encoder or image encoder."""
    with open_tensor_file(path) as file:
        yield plan_part(kind_name, [file], *config_args)


def load_part(
    kind_name: str,
    path: str | Path,
    *config_args: Any,
    dtype: torch.dtype | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Any:
    """Load a VAE, text encoder or image encoder from its original file.

    Args:
        kind_name: `"VAE"`, `"Wan 2.2 VAE"`, `"text encoder"` or `"image encoder"`.
        path: The file.
        config_args: For the image encoder, its number of heads if they are not 80 wide.
        dtype: Dtype of the parameters; None is the stored one.
        on_progress: Called after every tensor.

    Raises:
        ValueError: The file is no whole part of that kind, or is unsafe to read.
    """
    with open_part(kind_name, path, *config_args) as plan:
        return fill(plan, dtype, on_progress)
