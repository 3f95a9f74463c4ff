"""The parts that lie in a checkpoint directory of the original layout, found but not read."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from nabla_attn.wan import names
from nabla_attn.wan.parts import PartPlan, describe, plan_part
from nabla_attn.wan.shapes import WanConfig
from nabla_attn.wan.tasks import WAN_FAMILIES, WanFamily
from nabla_attn.wan.tensor_files import open_tensor_file, read_config, shown

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
# Original file names (Wan2.1 wan/configs/*.py); the same names with .safetensors are read too.
VAE_STEMS = ("Wan2.1_VAE", "Wan2.2_VAE")
T5_STEM = "models_t5_umt5-xxl-enc-bf16"
CLIP_STEM = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
TOKENIZER = "google/umt5-xxl"
EXPERTS = ("high_noise_model", "low_noise_model")  # Wan 2.2 A14B
MAX_SHARDS = 1000


@dataclass(frozen=True)
class TransformerFiles:
    """The weight files of one transformer and its config.json."""

    paths: tuple[Path, ...]
    config: WanConfig

    @contextmanager
    def open(self) -> Iterator[PartPlan]:
        """Open and check every file; they close together."""
        with ExitStack() as stack:
            files = [stack.enter_context(open_tensor_file(path)) for path in self.paths]
            yield plan_part("transformer", files, self.config)

    def inputs(self) -> tuple[int, int, bool, bool, bool]:
        """What tells families apart, from the headers alone.

        Returns:
            Width and input channels, then whether there are image tokens, positions of two image
            tokens, and VACE blocks.

        Raises:
            ValueError: The files hold no Wan transformer.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(open_tensor_file(path)) for path in self.paths]
            infos = {
                names.strip_prefix(n): info for file in files for n, info in file.infos.items()
            }
        patch = infos.get("patch_embedding.weight")
        if patch is None or len(patch.shape) != 5:
            where = ", ".join(map(str, self.paths))
            raise ValueError(f"{where}: expected a Wan transformer, found {describe(infos)}.")
        return (
            patch.shape[0],
            patch.shape[1],
            any(name.startswith("img_emb.") for name in infos),
            "img_emb.emb_pos" in infos,
            any(name.startswith("vace_blocks.") for name in infos),
        )


@dataclass(frozen=True)
class WanLayout:
    """An original checkpoint, part by part.

    Attributes:
        root: Its directory, or the single file.
        transformers: One, or for Wan 2.2 A14B the high-noise and the low-noise expert.
        vae: The file, None where it is absent.
        text_encoder: The file, None where it is absent.
        image_encoder: The file, None where it is absent.
        tokenizer: The directory, None where it is absent.
    """

    root: Path
    transformers: tuple[TransformerFiles, ...]
    vae: Path | None
    text_encoder: Path | None
    image_encoder: Path | None
    tokenizer: Path | None

    @property
    def config(self) -> WanConfig:
        """The config of the (first) transformer."""
        return self.transformers[0].config

    @property
    def family(self) -> str:
        """A key of `tasks.WAN_FAMILIES`, told by the tensors of the transformers.

        Raises:
            ValueError: No family has such transformers, or two experts are not alike.
        """
        found = {files.inputs() for files in self.transformers}
        if len(found) > 1:
            raise ValueError(
                f"{self.root}: {' and '.join(EXPERTS)} are transformers of different kinds. "
                "Download the checkpoint again."
            )
        _, channels, has_image_tokens, has_two_images, has_vace = found.pop()
        for name, family in WAN_FAMILIES.items():
            if (
                channels == family.channels
                and len(self.transformers) == family.num_experts
                and has_image_tokens == family.has_image_tokens
                and has_two_images == (name == "flf2v")
                and has_vace == (family.pipeline == "WanVACEPipeline")
            ):
                return name
        raise ValueError(
            f"{self.root}: no task is known for {len(self.transformers)} transformer(s) with "
            f"{channels} input channels, {'with' if has_image_tokens else 'without'} image tokens "
            f"and {'with' if has_vace else 'without'} VACE blocks. Its weights alone load with "
            "load_wan_transformer."
        )

    @property
    def task(self) -> str:
        """The task that the checkpoint is for, by its family and size."""
        return WAN_FAMILIES[self.family].task_for(self.transformers[0].inputs()[0])

    def check_complete(self) -> WanFamily:
        """Return the checkpoint's family if every part that its pipeline needs is there.

        Raises:
            ValueError: A part is missing, or belongs to another family.
        """
        family = WAN_FAMILIES[self.family]
        vae_stem = VAE_STEMS[family.is_2_2_vae]
        wanted = [(self.vae, f"{vae_stem}.pth"), (self.text_encoder, f"{T5_STEM}.pth")]
        wanted.append((self.tokenizer, f"{TOKENIZER}/"))
        if family.has_image_tokens:
            wanted.append((self.image_encoder, f"{CLIP_STEM}.pth"))
        if missing := [name for path, name in wanted if path is None]:
            raise ValueError(
                f"{self.root} lacks {', '.join(missing)}. Download the whole checkpoint, or use "
                "load_wan_transformer for the transformer alone."
            )
        if self.vae is not None and not self.vae.name.startswith(vae_stem):
            raise ValueError(
                f"{self.root}: its transformer works with {vae_stem}, found {self.vae.name}."
            )
        return family


def is_diffusers_directory(path: str | Path) -> bool:
    """Whether `path` is a diffusers pipeline directory."""
    return (Path(path) / "model_index.json").is_file()


def read_layout(path: str | Path) -> WanLayout:
    """Find the parts of an original Wan checkpoint.

    Args:
        path: The checkpoint directory, or one file with a whole transformer.

    Raises:
        ValueError: Nothing is there, it is of another layout, shards are missing or extra, an
            index names files outside the directory, or config.json has impossible values.
    """
    root = Path(path)
    if not root.exists():
        raise ValueError(f"no such checkpoint: {root}. Pass a directory of original Wan weights.")
    if is_diffusers_directory(root):
        raise ValueError(f"{root} is a diffusers directory already; no conversion is needed.")
    folder = root.parent if root.is_file() else root
    return WanLayout(
        root=root,
        transformers=_find_transformers(root),
        vae=_find_file(folder, *VAE_STEMS),
        text_encoder=_find_file(folder, T5_STEM),
        image_encoder=_find_file(folder, CLIP_STEM),
        tokenizer=folder / TOKENIZER if (folder / TOKENIZER).is_dir() else None,
    )


def _find_file(folder: Path, *stems: str) -> Path | None:
    names = [f"{stem}{end}" for stem in stems for end in (".pth", ".safetensors")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has {found[0].name} and {found[1].name}. Keep one of them.")
    return found[0] if found else None


def _find_transformers(root: Path) -> tuple[TransformerFiles, ...]:
    if root.is_file():
        return (TransformerFiles((root,), WanConfig.load(root.with_name("config.json"))),)
    folders = [root / name for name in EXPERTS]
    if any(folder.is_dir() for folder in folders):
        return tuple(_find_shards(folder) for folder in folders)
    return (_find_shards(root),)


def _find_shards(folder: Path) -> TransformerFiles:
    config = WanConfig.load(folder / "config.json")
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
                f"{index} names {shown(repr(name))}; an index may only name .safetensors files "
                "beside it."
            )
        names.add(name)
    return names


def _numbered(found: list[Path]) -> set[str]:
    """The shards that names like `-00001-of-00003` promise; the plain name stands alone."""
    for path in found:
        if match := re.fullmatch(rf"{STEM}-[0-9]{{5}}-of-([0-9]{{5}})\.safetensors", path.name):
            total = min(int(match.group(1)), MAX_SHARDS)
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
