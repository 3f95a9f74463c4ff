"""A laboratory process for the session, and the reason why there can be none."""

import json
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TORCH = "2.13.0"
HERE = Path(__file__).parent


def why_not():
    if not torch.__version__.startswith(TORCH):
        return f"it patches private parts of torch {TORCH}: this is {torch.__version__}"
    if torch.cuda.is_available():
        return "a GPU is here: run with -m gpu instead"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the CUDA side of Triton runs on Linux on x86-64 only"
    if find_spec("triton") is None:
        return "triton is not installed: pip install -c constraints.txt triton"
    if shutil.which("g++") is None:
        return "g++ is not on PATH"
    return None


def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu_compile)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


class Lab:
    """Asks the process of `lab.py`, which lowers and compiles for GPUs."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "tests.gpu_compile.lab", folder]
        self._answers = {}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE.parents[1],
        )

    def attention(self, architecture, **case):
        """See `lab.attention`; a case that was asked before is not lowered again."""
        request = json.dumps({"architecture": architecture, **case}, sort_keys=True)
        if request not in self._answers:
            self._answers[request] = self._ask(request)
        return self._answers[request]

    def _ask(self, request):
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            pytest.fail(answer["error"] + "\n" + answer.get("traceback", ""), pytrace=False)
        return answer["result"]

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    laboratory = Lab(tmp_path_factory.mktemp("lab"))
    yield laboratory
    laboratory.close()
