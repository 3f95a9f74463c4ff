"""What lies in a checkpoint directory: original Wan layout, diffusers layout, or one file."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_attn.wan.kinds import transformer_family
from nabla_attn.wan.rules import strip_prefix
from nabla_attn.wan.tensor_files import TensorFile, open_tensor_file, read_config

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
# Original file names (Wan2.1 wan/configs/*.py); the same names with .safetensors are read too.
VAE_STEMS = ("Wan2.1_VAE", "Wan2.2_VAE")
T5_STEM = "models_t5_umt5-xxl-enc-bf16"
CLIP_STEM = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
TOKENIZER = "google/umt5-xxl"
EXPERTS = ("high_noise_model", "low_noise_model")  # Wan 2.2 A14B
TEXT_TOKENS = 512


@dataclass(frozen=True)
class TransformerFiles:
    """The weight files of one transformer, found and named but not read."""

    paths: tuple[Path, ...]
    config: dict[str, Any]

    @contextmanager
    def open(self) -> Iterator[list[TensorFile]]:
        """Open every file; they close together."""
        with ExitStack() as stack:
            yield [stack.enter_context(open_tensor_file(path)) for path in self.paths]


@dataclass(frozen=True)
class WanLayout:
    """An original checkpoint, part by part.

    Attributes:
        root: its directory, or the single file.
        transformers: one, or for Wan 2.2 A14B the high-noise and the low-noise expert.
        vae, text_encoder, image_encoder: files, None where absent.
        tokenizer: directory, None where absent.
        family: a key of ``kinds.FAMILIES``, told by the keys of the weights.
    """

    root: Path
    transformers: tuple[TransformerFiles, ...]
    vae: Path | None
    text_encoder: Path | None
    image_encoder: Path | None
    tokenizer: Path | None
    family: str

    @property
    def sparse_algo(self) -> str | None:
        """The algorithm that the weights were trained for, as their config.json says."""
        value = self.transformers[0].config.get("sparse_algo")
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.root}: sparse_algo in config.json is {value!r}, not a string.")
        return value

    @property
    def text_tokens(self) -> int:
        """Length that prompts are padded to."""
        return int(self.transformers[0].config.get("text_len", TEXT_TOKENS))


def is_diffusers_directory(path: str | Path) -> bool:
    """True if ``path`` is a diffusers pipeline directory."""
    return (Path(path) / "model_index.json").is_file()


def read_layout(path: str | Path) -> WanLayout:
    """Find the parts of an original Wan checkpoint; only headers are read.

    Args:
        path: a checkpoint directory, or one file with a whole transformer.

    Raises:
        ValueError: nothing is there, it is of another layout, shards are missing or extra, or an
            index names files outside the directory.
    """
    root = Path(path)
    if not root.exists():
        raise ValueError(f"no such checkpoint: {root}. Pass a directory of original Wan weights.")
    if is_diffusers_directory(root):
        raise ValueError(f"{root} is a diffusers directory already; no conversion is needed.")
    folder = root.parent if root.is_file() else root
    transformers = _find_transformers(root)
    return WanLayout(
        root=root,
        transformers=transformers,
        vae=_find_file(folder, *VAE_STEMS),
        text_encoder=_find_file(folder, T5_STEM),
        image_encoder=_find_file(folder, CLIP_STEM),
        tokenizer=folder / TOKENIZER if (folder / TOKENIZER).is_dir() else None,
        family=_family(transformers),
    )


def _find_file(folder: Path, *stems: str) -> Path | None:
    names = [f"{stem}{end}" for stem in stems for end in (".pth", ".safetensors")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has {found[0].name} and {found[1].name}. Keep one of them.")
    return found[0] if found else None


def _find_transformers(root: Path) -> tuple[TransformerFiles, ...]:
    if root.is_file():
        config = root.with_name("config.json")
        return (TransformerFiles((root,), read_config(config) if config.is_file() else {}),)
    folders = [root / name for name in EXPERTS]
    if any(folder.is_dir() for folder in folders):
        return tuple(_find_shards(folder) for folder in folders)
    return (_find_shards(root),)


def _find_shards(folder: Path) -> TransformerFiles:
    config_path = folder / "config.json"
    config = read_config(config_path) if config_path.is_file() else {}
    found = sorted(folder.glob(f"{STEM}*.safetensors"))
    if not found:
        hint = ""
        if quantised := sorted(folder.glob("*.gguf")):
            hint = f" ({quantised[0].name} is quantised; GGUF is not read)"
        raise ValueError(
            f"{folder} has no {STEM}*.safetensors{hint}. Pass the directory of an original Wan "
            "checkpoint or of a diffusers pipeline."
        )
    index = folder / INDEX
    named = _read_index(index) if index.is_file() else _numbered(found)
    _check_shards(folder, {path.name for path in found}, named)
    return TransformerFiles(tuple(folder / name for name in sorted(named)), config)


def _read_index(index: Path) -> set[str]:
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map. Download it again.")
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{index} names {name!r}; an index may only name .safetensors files beside it."
            )
        names.add(name)
    return names


def _numbered(found: list[Path]) -> set[str]:
    """The shards that names like ``-00001-of-00003`` promise; the plain name stands alone."""
    for path in found:
        if match := re.fullmatch(rf"{STEM}-\d{{5}}-of-(\d{{5}})\.safetensors", path.name):
            total = int(match.group(1))
            return {f"{STEM}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)}
    return {f"{STEM}.safetensors"} if len(found) > 1 else {found[0].name}


def _check_shards(folder: Path, found: set[str], named: set[str]) -> None:
    if missing := sorted(named - found):
        raise ValueError(f"{folder} lacks {', '.join(missing)}. Download it again.")
    if extra := sorted(found - named):
        raise ValueError(
            f"{folder} has extra weight files that do not belong to the checkpoint: "
            f"{', '.join(extra)}. Remove them."
        )


def _family(transformers: tuple[TransformerFiles, ...]) -> str:
    with transformers[0].open() as files:
        names = {strip_prefix(name): info for file in files for name, info in file.infos.items()}
    patch = names.get("patch_embedding.weight")
    if patch is None or len(patch.shape) != 5:
        from nabla_attn.wan.kinds import describe

        where = ", ".join(str(path) for path in transformers[0].paths)
        raise ValueError(f"{where}: expected a Wan transformer, found {describe(names)}.")
    return transformer_family(names, patch.shape[1], len(transformers))
