"""How every verb behaves: found lazily, dashes or underscores, one line per error, exit codes."""

import difflib
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from nabla_attn.cli import output

# Each is the function, or the group of them, of the same name in the module of that name.
VERBS = (
    "generate",
    "compare",
    "evaluate",
    "calibrate",
    "encode",
    "train",
    "bench",
    "info",
    "warmup",
    "convert",
    "wan",
    "report",
    "studio",
    "view",
    "vote",
)
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# Whose warnings are shown; those of torch and others speak to programmers.
SPEAKERS = "nabla_attn|isynet|diffusers|transformers|peft"


class VerbCommand(TyperCommand):
    """A verb whose options may be written `--like-this` or `--like_this`, and may be quiet."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if all(param.name != "quiet" for param in self.params):
            self.params.append(_quiet_option())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell the options as declared, then parse."""
        declared = [name for param in self.params for name in (*param.opts, *param.secondary_opts)]
        return super().parse_args(ctx, spell_as_declared(args, declared))


class VerbGroup(TyperGroup):
    """The verbs, imported one by one on use, and what happens when one fails.

    Attributes:
        verbs: Names of the verbs in reading order.
        package: The package that has a module for each.
    """

    verbs: tuple[str, ...] = VERBS
    package = "nabla_attn.cli"

    def list_commands(self, ctx: Any) -> list[str]:
        """All verbs, in reading order."""
        return list(self.verbs)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb; `generate --task` is the reference command, which `wan` runs.

        Raises:
            ValueError: There is none of that name; the nearest is named.
        """
        has_task = any(arg.partition("=")[0] == "--task" for arg in args)
        if args[:1] == ["generate"] and has_task:
            args = ["wan", *args[1:]]
        if args and args[0] not in self.verbs and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.verbs, n=1)
            guess = f"Did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no command {args[0]!r}. {guess}--help lists them.")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a verb's module and make its function a command."""
        if cmd_name not in self.verbs:
            return None
        function = getattr(import_module(f"{self.package}.{cmd_name}"), cmd_name)
        if isinstance(function, typer.Typer):
            return typer.main.get_command(function)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name=cmd_name, cls=VerbCommand)(function)
        return typer.main.get_command(single)

    def main(self, *args: Any, **options: Any) -> Any:
        """Run, and leave with 0, 2 after one line on bad input, or 130 after Ctrl-C.

        ValueError and OSError are what a user can mend; anything else keeps its traceback.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("always", category=UserWarning, module=SPEAKERS)
                warnings.showwarning = output.warn_once()
                output.Settings.is_quiet = False
                code = super().main(*args, **(options | {"standalone_mode": False}))
        except KeyboardInterrupt:
            code = INTERRUPTED
        except typer.Abort:
            code = FAILED
        except (ValueError, OSError, TyperException) as error:
            message = error.format_message() if isinstance(error, TyperException) else str(error)
            output.notice("error", message or type(error).__name__)
            code = BAD_INPUT
        if code == INTERRUPTED:
            output.notice("interrupted", "no partial file was left.")
        sys.exit(code or 0)


class RunByDefault(TyperGroup):
    """A verb with commands of which `run` is meant where options stand in the command's place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` in where there is no command."""
        is_bare = not args and not self.no_args_is_help
        if is_bare or (args and args[0] not in (*self.commands, "-h", "--help")):
            args = ["run", *args]
        return super().parse_args(ctx, args)


def spell_as_declared(args: Iterable[str], declared: Iterable[str]) -> list[str]:
    """Options of `args` with the dashes and underscores of `declared`; the rest untouched."""
    spelling = {name.replace("_", "-"): name for name in declared if name.startswith("--")}
    result: list[str] = []
    is_open = True
    for arg in args:
        is_open = is_open and arg != "--"
        name, equals, value = arg.partition("=")
        known = spelling.get(name.replace("_", "-")) if is_open else None
        result.append(f"{known}{equals}{value}" if known else arg)
    return result


def _quiet_option() -> Any:
    """`--quiet`, which no verb's function sees: what prints reads it."""

    def switch(context: typer.Context, value: bool) -> bool:
        output.Settings.is_quiet = value
        return value

    def verb(
        quiet: Annotated[
            bool,
            typer.Option("--quiet", "-q", callback=switch, help="Print only warnings and errors."),
        ] = False,
    ) -> None: ...

    single = typer.Typer(add_completion=False)
    single.command()(verb)
    option = next(each for each in typer.main.get_command(single).params if each.name == "quiet")
    option.expose_value = False
    return option
