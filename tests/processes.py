"""Processes of their own for tests of signals, deaths and ranks, with the heavy imports done.

A process is forked from one that has imported PyTorch and diffusers, so that many start in no time.
What a fresh interpreter imports is no matter of these tests.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

IMPORTED = [
    "nabla_attn.training.train",
    "nabla_attn.generation.generate",
    "diffusers.pipelines.wan.pipeline_wan",
    "peft",
    "accelerate",
]


def start_process(target, *arguments, **environment):
    """Run a function of a module in a process, here and with this environment and what is added."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    place = (os.environ | environment, Path.cwd())
    process = context.Process(target=_run, args=(*place, target, arguments))
    process.start()
    return process


def _run(environment, folder, target, arguments):
    # The process that this one is forked from may have been started elsewhere.
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None
    torch.set_num_threads(1)
    target(*arguments)


def exit_codes(processes, timeout=120):
    """How processes ended; those that have not within the seconds are killed, and have None."""
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


class NablaCommand:
    """`python -m nabla_attn.cli` with arguments; what it says is in two files of a folder."""

    def __init__(self, folder, *arguments):
        folder.mkdir(parents=True)
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        streams = (str(self.stdout), str(self.stderr))
        self.process = start_process(_run_nabla, streams, [*map(str, arguments)])

    def wait_for(self, words, path):
        """Wait until the process says the words."""
        while not (path.exists() and words in path.read_text()):
            assert self.process.is_alive(), self.stderr.read_text()
            time.sleep(0.01)

    def send(self, number):
        """Send a signal, and give the exit code."""
        os.kill(self.process.pid, number)
        return self.exit_code()

    def exit_code(self):
        """Wait for the end."""
        (code,) = exit_codes([self.process])
        return code


def _run_nabla(streams, arguments):
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["nabla", *arguments]
    runpy.run_module("nabla_attn.cli", run_name="__main__", alter_sys=True)
