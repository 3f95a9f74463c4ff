"""Triton kernels in Inductor's code -> machine code for an architecture, and what it takes."""

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.gpu_compile.fake_cuda import ARCHITECTURES

KERNEL = re.compile(
    r"async_compile\.triton\('(?P<name>[^']+)', '''(?P<source>.*?)''', device_str='cuda'", re.S
)
TENSOR_CORES = re.compile(r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma")


def sources(code: str) -> Iterator[tuple[str, str]]:
    """Name and source of every kernel in a module that Inductor wrote."""
    for match in KERNEL.finditer(code):
        yield match["name"], match["source"].replace("\\'\\'\\'", "'''")


def load_source(source: str) -> ModuleType:
    """Import a kernel's source from a file of its own, which Triton reads."""
    name = f"kernel_{hashlib.sha1(source.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        path = Path(tempfile.mkdtemp()) / f"{name}.py"
        path.write_text(source)
        spec = spec_from_file_location(name, path)
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def compile_kernel(name: str, source: str, architecture: str) -> dict[str, Any]:
    """Compile the first configuration of a kernel.

    Returns:
        The kernel's name and kind, registers and bytes of stack of a thread, bytes of shared
        memory and of what the architecture has, and its instructions for tensor cores.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tuner = getattr(load_source(source), name)
    (major, minor), _, has_shared, *_ = ARCHITECTURES[architecture]
    config = tuner.configs[0]
    meta = tuner._create_compile_meta(config) | {"cc": 10 * major + minor}
    program = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    options = tuner._create_compile_options(config, meta)
    target = GPUTarget("cuda", 10 * major + minor, 32)
    built = triton.compile(program, target=target, options=options)
    registers, stack = resources(built.asm["cubin"])
    return {
        "name": name,
        "is_template": "@triton_heuristics.template" in source,
        "registers": registers,
        "stack": stack,
        "shared": built.metadata.shared,
        "has_shared": has_shared,
        "warps": built.metadata.num_warps,
        "stages": config.num_stages,
        "tensor_core": len(TENSOR_CORES.findall(built.asm["ptx"])),
        "is_divisible": "IS_DIVISIBLE : tl.constexpr = True" in source,
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as NVIDIA's own tool reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)
