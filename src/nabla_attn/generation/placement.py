"""Where and in which numbers a pipeline computes: devices, dtypes, offloading, tiles, few bits."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nabla_attn.errors import first_line
from nabla_attn.machine import computes_bfloat16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OFFLOADS = ("model", "sequential", "group")
# The name of a way to quantize -> the package that does it.
QUANTIZERS = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "torchao": "torchao"}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a pipeline saves memory.

    Attributes:
        offload: What keeps parts off the GPU while they rest: "model" moves whole parts,
            "sequential" layer by layer, "group" a few layers at a time; empty for nothing.
        vae_tiling: Whether the VAE decodes in tiles.
        vae_slicing: Whether the VAE decodes the videos of a batch one by one.
        quantize: The way in which the transformer's weights take fewer bits: a name of
            `QUANTIZERS`, or a .gguf file of weights; empty for none.
    """

    offload: str = ""
    vae_tiling: bool = False
    vae_slicing: bool = False
    quantize: str = ""

    def check(self, device: torch.device) -> None:
        """Refuse what cannot be done here, before anything is loaded.

        Raises:
            ValueError: A name is unknown, a package or file is missing, or the device is the CPU
                where only a GPU will do.
        """
        if self.offload and self.offload not in OFFLOADS:
            raise ValueError(f"unknown --offload {self.offload!r}. Known: {', '.join(OFFLOADS)}.")
        if self.offload and device.type == "cpu":
            raise ValueError(
                f"--offload {self.offload} keeps parts on the CPU until a GPU needs them, and the "
                "device is cpu. Leave it out, or pass --device cuda."
            )
        if self.is_gguf:
            if not Path(self.quantize).is_file():
                raise ValueError(f"--quantize {self.quantize}: there is no such file.")
            _need_package("gguf", self.quantize)
        elif self.quantize:
            if self.quantize not in QUANTIZERS:
                known = ", ".join(QUANTIZERS)
                raise ValueError(
                    f"unknown --quantize {self.quantize!r}. Known: {known}, or a .gguf file."
                )
            _need_package(QUANTIZERS[self.quantize], self.quantize)
            if QUANTIZERS[self.quantize] == "bitsandbytes" and device.type != "cuda":
                raise ValueError(
                    f"--quantize {self.quantize} runs on CUDA, and the device is {device}. "
                    "Leave it out, or pass torchao or a .gguf file."
                )

    @property
    def is_gguf(self) -> bool:
        """Whether `quantize` is a file of quantized weights."""
        return self.quantize.lower().endswith(".gguf")

    def quantization(self, dtype: torch.dtype) -> Any:
        """diffusers' configuration for `quantize`; None where nothing is quantized.

        Args:
            dtype: The dtype of the products.
        """
        import diffusers

        if not self.quantize:
            return None
        if self.is_gguf:
            return diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        if self.quantize == "int8":
            return diffusers.BitsAndBytesConfig(load_in_8bit=True)
        if self.quantize == "nf4":
            return diffusers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig())

    def place(self, pipeline: Any, device: torch.device) -> Any:
        """The pipeline on its device, offloaded and in tiles as asked for.

        Raises:
            ValueError: The pipeline or its VAE cannot do it.
        """
        for name, is_on in (("tiling", self.vae_tiling), ("slicing", self.vae_slicing)):
            if is_on:
                _enable(pipeline.vae, name)
        try:
            if self.offload == "model":
                pipeline.enable_model_cpu_offload(device=device)
            elif self.offload == "sequential":
                pipeline.enable_sequential_cpu_offload(device=device)
            elif self.offload == "group":
                pipeline.enable_group_offload(onload_device=device, offload_type="leaf_level")
            else:
                pipeline.to(device)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            if not self.offload or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{type(pipeline).__name__} cannot be offloaded by {self.offload} "
                f"({first_line(error)}). Pass another --offload, or none."
            ) from error
        return pipeline


def resolve_device(name: str) -> torch.device:
    """A torch device by name; `"auto"` takes a GPU if there is one.

    Raises:
        ValueError: The name is not a device's, or this machine does not have it.
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
    """A torch dtype by name or short name; `"auto"` is bfloat16 where the device computes in it.

    Raises:
        ValueError: The name is unknown.
    """
    name = SHORT_DTYPES.get(name, name)
    if name != "auto":
        if name not in DTYPES:
            known = ", ".join(("auto", *DTYPES, *SHORT_DTYPES))
            raise ValueError(f"unknown dtype {name!r}. Known: {known}.")
        return DTYPES[name]
    if computes_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def _need_package(package: str, asked: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"--quantize {asked} needs {package}. Install it with: pip install {package}."
        ) from None


def _enable(vae: Any, name: str) -> None:
    try:
        getattr(vae, f"enable_{name}")()
    except (AttributeError, NotImplementedError):
        raise ValueError(f"{type(vae).__name__} has no {name}. Leave out --vae-{name}.") from None
