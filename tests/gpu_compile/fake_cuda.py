"""A CUDA device that is not there: enough of one to lower graphs and compile kernels for it.

Patches private parts of torch 2.13 and Triton 3.7; tensors on the device are fake.
"""

import ctypes
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Compute capability, multiprocessors, shared memory of a block and of a multiprocessor, threads.
ARCHITECTURES = {
    "sm_80": ((8, 0), 108, 166_912, 167_936, 2048),
    "sm_89": ((8, 9), 128, 101_376, 102_400, 1536),
    "sm_90": ((9, 0), 132, 232_448, 233_472, 2048),
    "sm_100": ((10, 0), 148, 232_448, 233_472, 2048),
    "sm_120": ((12, 0), 170, 101_376, 102_400, 1536),
}


def load_hooks(folder: Path) -> None:
    """Build and load the C++ side; must come before torch is imported."""
    torch = Path(sysconfig.get_paths()["purelib"]) / "torch"
    library = folder / "cuda_hooks.so"
    if not library.exists():
        building = folder / f"cuda_hooks.{os.getpid()}.so"
        source = Path(__file__).with_name("cuda_hooks.cpp")
        link = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
        flags = ["-O0", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{torch}/include"]
        subprocess.run(["g++", *flags, source, "-o", building, *link], check=True)
        building.rename(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def device_properties(architecture: str) -> SimpleNamespace:
    """What `torch.cuda.get_device_properties` says of the device."""
    (major, minor), processors, block_memory, processor_memory, threads = ARCHITECTURES[
        architecture
    ]
    return SimpleNamespace(
        name=architecture,
        major=major,
        minor=minor,
        multi_processor_count=processors,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=threads,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=block_memory,
        shared_memory_per_multiprocessor=processor_memory,
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        is_integrated=False,
    )


class FakeDriver:
    """What Triton asks of a driver to compile for a target."""

    def __init__(self, properties: SimpleNamespace) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 10 * properties.major + properties.minor, 32)
        limits = {
            "max_shared_mem": properties.shared_memory_per_block_optin,
            "multiprocessor_count": properties.multi_processor_count,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: limits)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda


@contextmanager
def fake_cuda(architecture: str) -> Iterator[None]:
    """Inside the block, torch and Triton see one device of this architecture."""
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    def forget() -> None:
        DeviceProperties.create.cache_clear()
        for function in vars(_triton).values():
            getattr(function, "cache_clear", lambda: None)()

    properties = device_properties(architecture)
    driver = triton.runtime.driver
    before = driver._active
    with ExitStack() as stack:
        for owner, name, value in _patches(properties):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        driver.set_active(FakeDriver(properties))
        stack.callback(driver.set_active, before)
        forget()
        stack.callback(forget)
        yield


def _patches(properties: SimpleNamespace) -> Iterator[tuple[Any, str, Any]]:
    import torch
    from torch._dynamo import _trace_wrapped_higher_order_op as traced
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import fuse_attention, joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _triton

    capability = (properties.major, properties.minor)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "get_compute_capability": 10 * capability[0] + capability[1],
        "get_raw_stream": 0,
        "is_bf16_supported": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "synchronize": None,
        "_lazy_init": None,
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        say = _always(answer)
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            if hasattr(owner, name):
                yield owner, name, say if owner is torch.cuda else staticmethod(say)
    yield torch.cuda, "get_rng_state", lambda *_: torch.zeros(1)
    yield torch.version, "cuda", "13.0"
    yield _triton, "has_triton", lambda: True
    yield triton_helpers, "set_driver_to_gpu", lambda: None
    # Patterns for fused attention and constants would be traced on the device.
    yield fuse_attention, "_sfdp_init", lambda *_, **__: None
    yield joint_graph, "lazy_init", lambda *_, **__: None
    yield post_grad, "lazy_init", lambda *_, **__: None
    yield FakeTensorMode, "avoid_device_init", property(lambda mode: True)
    yield traced.TransformGetItemToIndex, "__torch_function__", _index_without_constants


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer


def _index_without_constants(
    mode: Any, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    """An int in the index of a mask becomes a filled tensor: a constant would need the device."""
    import torch
    from torch._dynamo import _trace_wrapped_higher_order_op as traced
    from torch.utils import _pytree as pytree

    if function is torch.Tensor.__getitem__:
        tensor, index = args
        leaves = pytree.tree_leaves(index)
        if all(isinstance(leaf, (torch.Tensor, int)) for leaf in leaves):
            full = (
                torch.full((), leaf, dtype=torch.int64, device=tensor.device)
                if isinstance(leaf, int)
                else leaf
                for leaf in leaves
            )
            return traced.mod_index(tensor, list(full))
    return function(*args, **(kwargs or {}))
