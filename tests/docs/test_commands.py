"""Every command in a document: it parses, and, but for those named here, it runs at small size."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from nabla_attn.cli import app
from nabla_attn.generation.video import write_video

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "comfyui/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Sizes in documents, and the small ones that run here.
SMALLER = {"480x832x81": "32x48x5", "832x480x81": "48x32x5"}
SMALLER |= dict.fromkeys(("--height 480", "--height 720"), "--height 32")
SMALLER |= dict.fromkeys(("--width 832", "--width 1280"), "--width 32")
SMALLER |= {"--frames 81": "--frames 5", "--clips 2048": "--clips 2", "--num-prompts 4": ""}
VIDEO = "--height 32 --width 32 --frames 5 --steps 1"
TRAINING = "steps=1 watch.tensorboard=false watch.prompts=0 data.validation=1"
WORLD = "data.folder=world data.clips=3 data.frames=5 data.height=32 data.width=32"
ADDED = {
    "generate": VIDEO,
    "compare": VIDEO,
    "evaluate": f"{VIDEO} --num-prompts 1",
    # Fourteen blocks, so that low densities exist.
    "calibrate": f"{VIDEO} --frames 53 --num-prompts 1",
    "train": TRAINING,
}
# Commands that no test here runs, and why.
NOT_RUN = {
    "nabla train builtin": "takes hours; tests/moving_shapes runs its stages",
    "nabla train --recipe": "takes hours",
    "nabla studio": "serves until it is stopped; tests/studio",
    "nabla evaluate --sparse-algo nabla-*": "searches with many videos; tests/evaluation",
    "nabla encode shards": "needs shards; tests/training",
    "nabla vote results": "needs votes; tests/vote",
    "nabla vote out/study": "serves until it is stopped; tests/vote",
    "nabla wan": "needs an original checkpoint; tests/wan",
    "nabla convert": "needs an original checkpoint; tests/wan",
    "nabla generate --task": "needs an original checkpoint; tests/wan",
    "nabla generate --model runs/builtin": "what the training of hours leaves",
    "nabla evaluate vbench-read": "reads what VBench writes; tests/evaluation",
    "nabla evaluate --num-prompts 64": "the whole study",
    "nabla evaluate pack": "packs the whole study; tests/evaluation",
    "nabla report benchmarks/results": "reads the whole study; tests/viz",
    "nabla calibrate --speed-up": "times this machine; tests/calibrate",
    "nabla generate --prompt a large red square moving right on a black background --schedule": (
        "is for the built-in model; tests/generation"
    ),
    "nabla bench": "takes minutes; tests/bench",
    "nabla generate --model builtin --parts": "needs trained parts; tests/training",
}

ENCODE = "nabla encode videos --model DIR --sizes 32x48x5 --output encoded"
SUBCOMMANDS = ("summary", "pack", "vbench-write", "vbench-read")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`(nabla [a-z][^`]*)`(?!`)")


def commands(page):
    """The command lines in the code blocks of a page, one string each."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in ("", "bash", "sh", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words


def nabla_arguments(words):
    """What `nabla` gets; None if the command is another one."""
    if words[0] == "nabla":
        return words[1:]
    if words[:2] == ["python", "generate.py"]:
        return ["generate", *words[2:]]
    if "nabla_attn.cli" in words:
        return words[words.index("nabla_attn.cli") + 1 :]
    return None


def find(arguments):
    """The command that arguments lead to, and the context and arguments that are left for it."""
    command = typer.main.get_command(app)
    name, context, rest = "nabla", None, list(arguments)
    while hasattr(command, "resolve_command") and rest:
        context = command.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
    return name, command, context, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(page):
        arguments = nabla_arguments(words)
        if arguments:
            name, command, context, rest = find(word for word in arguments if word != "...")
            command.make_context(name, rest, parent=context)
        elif words[0] == "make":
            assert words[1] in targets, words
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
            path = ROOT / words[2].replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_sentences_exist(page):
    for text in INLINE.findall(page.read_text(encoding="utf-8")):
        _, command, _, rest = find(shlex.split(text)[1:])
        known = {option.replace("_", "-") for each in command.params for option in each.opts}
        for word in rest:
            option = word.partition("=")[0].replace("_", "-")
            assert not option.startswith("--") or option in known, text


def is_run(words):
    text = " ".join(words)
    return words[0] == "nabla" and "..." not in words and not text.startswith(tuple(NOT_RUN))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(map(is_run, commands(page)))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_run(page, tiny_wan, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(videos, "videos")
    Path("prompts.txt").write_text("a red circle\n")
    lines = [words for words in commands(page) if is_run(words)]
    if any("data.folder=encoded" in word for words in lines for word in words):
        lines.insert(0, shlex.split(ENCODE))
    for words in lines:
        if words[1] == "encode":
            # Documents show ways to fill one folder, and only one of them fills it.
            shutil.rmtree("encoded", ignore_errors=True)
        arguments = small(words[1:], tiny_wan)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"nabla {' '.join(arguments)}\n{result.output}"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of two small videos with captions."""
    folder = tmp_path_factory.mktemp("videos")
    for index in range(2):
        frames = np.full((5, 48, 48, 3), 60 * index, np.uint8)
        write_video(frames, folder / f"{index}.mp4", 16)
        (folder / f"{index}.txt").write_text("a red circle")
    return folder


def small(words, model):
    """The arguments of a command, made to run in about a second."""
    text = shlex.join(words)
    for large, little in SMALLER.items():
        text = text.replace(large, little)
    text = re.sub(r"\b(MODEL_DIR|DIR)\b", str(model), text)
    verb = words[0]
    has_options = verb in ADDED and (len(words) == 1 or words[1] not in SUBCOMMANDS)
    if has_options or verb == "warmup":
        if verb == "train" and "model=" not in text:
            text += f" model={model}"
        elif verb != "train" and "--model" not in text:
            text += f" --model {model}"
    if has_options:
        text += f" {ADDED[verb]}"
        if "calibrate/schedule.json" in text:
            # Of the size that it was calibrated for.
            text += " --frames 53"
    if verb == "train" and "data.folder" not in text:
        text += f" {WORLD}"
    return shlex.split(text)
