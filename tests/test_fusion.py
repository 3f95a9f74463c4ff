"""Where the compiler does not work, chains of operations run uncompiled and say so once."""

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nabla_attn import fusion
from nabla_attn.backends import flex
from nabla_attn.errors import Note

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget(monkeypatch, tmp_path):
    monkeypatch.setenv("NABLA_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(fusion, "_FAILED", {})

    def clear():
        for function in (fusion._why_no_cache, fusion._why_not_build, fusion._warn_of):
            function.cache_clear()

    clear()
    yield
    clear()


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


def test_a_compiler_without_headers_is_found_before_anything_is_compiled(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp: error: Python.h: No such file' >&2; exit 1")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(fusion, "compiled", lambda *_: pytest.fail("it was compiled"))
    with pytest.warns(UserWarning, match=r"uncompiled.*g\+\+ cannot build: Python.h: No such file"):
        assert fusion.fused(double, 1, CPU) is double
    assert "cannot build" in flex.why_not(CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fusion.fused(double, 1, CPU) is double


def test_a_cache_that_cannot_be_written_leaves_the_compiler_out():
    # A process of its own: torch reads the setting when its compiler is imported.
    code = (
        "import torch; from nabla_attn import fusion; double = lambda x: 2 * x\n"
        "run = fusion.fused(double, 2**30, torch.device('cpu'))\n"
        "assert run is double, run; print(fusion.why_not_compile(torch.device('cpu')))"
    )
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": "/proc/no/such/place"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "torch.compile's cache cannot be written" in process.stdout
    assert "built uncompiled" in process.stderr


def test_compiling_that_fails_is_tried_once(monkeypatch):
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

    assert issubclass(BackendCompilerFailed, TorchDynamoException)
    tries = []

    def fail(x):
        tries.append(x)
        raise TorchDynamoException("no space left\nand more")

    monkeypatch.setattr(fusion, "compiled", lambda *_: fail)
    with pytest.warns(UserWarning, match=r"is slower: compiling failed: no space"):
        assert fusion.fused(double, 1, CPU)(torch.ones(1)) == 2
    assert fusion.fused(double, 1, CPU) is double
    assert len(tries) == 1
    assert "compiling failed: no space left" in flex.why_not(CPU)


def test_an_error_of_the_function_itself_is_raised(monkeypatch):
    def fail(x):
        raise ValueError("of the function")

    monkeypatch.setattr(fusion, "compiled", lambda function, *_: function)
    with pytest.raises(ValueError, match="of the function"):
        fusion.fused(fail, 1, CPU)(torch.ones(1))
    assert fusion.why_not_compile(CPU) is None


def test_maps_are_compiled_where_that_pays_within_the_block(monkeypatch):
    monkeypatch.setattr(fusion, "compiled", lambda *_: double)
    few, many = 10**6, 10**9
    with fusion.fusing_for(few):
        assert fusion.fused(triple, 1, CPU) is triple
        with fusion.fusing_for(many):
            assert fusion.fused(triple, 1, CPU)(torch.ones(1)) == 2
        assert fusion.fused(triple, 1, CPU) is triple
    assert fusion.fused(triple, 1, CPU)(torch.ones(1)) == 2


def test_counts_of_two_threads_that_overlap_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(fusion, "compiled", lambda *_: double)
    monkeypatch.setattr(fusion, "why_not_compile", lambda device: None)
    both, first_left = threading.Barrier(2), threading.Event()

    def count(is_first):
        with FlopCounterMode(display=False):
            assert fusion.fused(triple, 1, torch.device("cuda")) is triple
            both.wait()
            if not is_first:
                first_left.wait()
        first_left.set()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(count, (True, False)))
    assert fusion.fused(triple, 1, torch.device("cuda"))(torch.ones(1)) == 2


def test_a_gpu_compiles_always(monkeypatch):
    monkeypatch.setattr(fusion, "compiled", lambda *_: double)
    monkeypatch.setattr(fusion, "why_not_compile", lambda device: None)
    with fusion.fusing_for(0):
        assert fusion.fused(triple, 1, torch.device("cuda"))(torch.ones(1)) == 2


def test_a_wait_is_named_until_the_cache_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "first"))

    def call():
        fusion.compiled.cache_clear()
        run = fusion.compiled(double)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert run(torch.ones(1)) == 2 and run(torch.ones(1)) == 2
        assert all(issubclass(each.category, Note) for each in said)
        return [str(each.message) for each in said]

    assert call() == ["compiling double, about 10 s, once"]
    assert call() == []
    # Another cache; how long it took is known now.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "second"))
    path = fusion.machine_file("compile", CPU)
    path.write_text(path.read_text().replace("0.0", "42.4"))
    assert call() == ["compiling double, about 42 s, once"]
    path.write_text("[]")
    assert call() == ["compiling double, about 10 s, once"]


def test_a_home_that_cannot_be_written_is_no_fault(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setenv("NABLA_ATTN_CACHE", "/proc/no/such/place")
    fusion.compiled.cache_clear()
    with pytest.warns(Note):
        assert fusion.compiled(double)(torch.ones(1)) == 2
