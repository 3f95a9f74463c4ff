"""`nabla info`: what is installed and what can run on this machine."""

from typing import Annotated, Any

import typer

from nabla_attn.cli import options as opt
from nabla_attn.cli import output as out

EXACT = {
    "code": "exact to the code",
    "paper": "exact to the paper",
    "reconstructed": "reconstructed",
}
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def info(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    memory: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="TASK SIZE",
            help="What a released Wan model needs on a GPU instead, such as t2v-14B 1280*720.",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames of the video of --memory.", show_default="by task")
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the sparse attention methods instead.")
    ] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Print versions, the device, whether compiler and backends work, algorithms and models."""
    from nabla_attn.generation.placement import resolve_device

    if methods:
        _print_methods(as_json=as_json)
        return
    if memory is not None:
        from nabla_attn.wan.memory import describe_memory, measure_up

        values: dict[str, Any] = {"memory": measure_up(*memory, frames)}
        rows = describe_memory(values["memory"])
    else:
        if frames is not None:
            raise ValueError("--frames belongs to --memory. Pass --memory TASK SIZE too.")
        values = _collect(resolve_device(device))
        rows = _rows(values)
    if as_json:
        out.print_json(values)
    else:
        _print(rows)


def _collect(device: Any) -> dict[str, Any]:
    """Return what `--json` prints; reasons are None where something works."""
    import torch

    from nabla_attn import backends
    from nabla_attn.config import grammar
    from nabla_attn.fusion import why_not_compile
    from nabla_attn.generation.placement import resolve_dtype
    from nabla_attn.models import model_rows
    from nabla_attn.record import collect_versions, describe_device

    features = torch.cpu.get_capabilities()
    return {
        "versions": collect_versions(),
        "device": str(device),
        "device_name": describe_device(device),
        "cpu_features": [name for name in CPU_FEATURES if features.get(name)],
        "dtype": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "compiler": why_not_compile(device),
        "backends": backends.available(device),
        "backend_auto": backends.AUTO_RULE,
        "algorithms": grammar(),
        "models": [row.name for row in model_rows() if row.refusal is None],
        "builtin_model": _find_builtin(),
    }


def _print_methods(*, as_json: bool) -> None:
    """Print a line for each method, or all of their rows as JSON."""
    from nabla_attn.methods import describe, find, names

    rows = [describe(find(name)) for name in names()]
    if as_json:
        out.print_json({"methods": rows})
        return
    for row in rows:
        needs = f"; needs {', '.join(row['needs'])}" if row["needs"] else ""
        out.say(f"{row['form']}  ({row['kind']}, {EXACT[row['exactness']]}{needs})")
        out.say(f"    {row['title']}")
    out.say("Sources, licences and published settings: docs/methods.md, or --json.")


def _find_builtin() -> dict[str, Any]:
    from nabla_attn.generation.pipeline import model_directory

    try:
        folder = model_directory("builtin")
    except ValueError as error:
        return {"folder": None, "bytes": 0, "reason": str(error)}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"folder": str(folder), "bytes": size, "reason": None}


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    none = "none of " + ", ".join(CPU_FEATURES)
    reason, builtin = values["compiler"], values["builtin_model"]
    return [
        *values["versions"].items(),
        ("device", f"{values['device']}: {values['device_name']}"),
        ("CPU features", ", ".join(values["cpu_features"]) or none),
        ("dtype auto", values["dtype"]),
        ("compiler", "works" if reason is None else f"does not work: {reason}"),
        *(
            (f"backend {name}", "runs" if why is None else f"cannot run: {why}")
            for name, why in values["backends"].items()
        ),
        ("backend auto", values["backend_auto"]),
        ("algorithms", values["algorithms"]),
        ("models", ", ".join(values["models"])),
        ("built-in model", builtin["reason"] or f"present, {builtin['bytes'] / 1e6:.1f} MB"),
    ]


def _print(rows: list[tuple[str, str]]) -> None:
    if out.Settings.is_quiet:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    Console(highlight=False).print(table)
