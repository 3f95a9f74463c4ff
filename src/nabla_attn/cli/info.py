"""`nabla info`: what is installed and what can run on this machine."""

from typing import Annotated, Any

import typer

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
) -> None:
    """Print versions, the device, which backends run on it, and the models known."""
    from rich.console import Console
    from rich.table import Table

    from nabla_attn.generation.placement import resolve_device

    if memory is not None:
        from nabla_attn.wan.memory import describe_memory

        rows = describe_memory(*memory, frames)
    else:
        if frames is not None:
            raise ValueError("--frames is of --memory. Pass --memory TASK SIZE too.")
        place = resolve_device(device)
        rows = [*_describe_machine(place), *_describe_backends(place), *_describe_models()]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _describe_machine(device: Any) -> list[tuple[str, str]]:
    import torch

    from nabla_attn.generation.placement import resolve_dtype
    from nabla_attn.record import collect_versions, describe_device

    features = torch.cpu.get_capabilities()
    present = [name for name in CPU_FEATURES if features.get(name)]
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    return [
        *collect_versions().items(),
        ("device", f"{device}: {describe_device(device)}"),
        ("CPU features", ", ".join(present) or "none of " + ", ".join(CPU_FEATURES)),
        ("dtype auto", dtype),
    ]


def _describe_backends(device: Any) -> list[tuple[str, str]]:
    from nabla_attn import backends

    rows = [
        (f"backend {name}", "runs" if reason is None else f"cannot run: {reason}")
        for name, reason in backends.available(device).items()
    ]
    return [*rows, ("backend auto", backends.AUTO_RULE)]


def _describe_models() -> list[tuple[str, str]]:
    from nabla_attn.generation.pipeline import model_directory
    from nabla_attn.models import model_rows

    known = [row.name for row in model_rows() if row.refusal is None]
    try:
        files = [path for path in model_directory("builtin").rglob("*") if path.is_file()]
        builtin = f"present, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
    except ValueError as error:
        builtin = str(error)
    return [("models", ", ".join(known)), ("built-in model", builtin)]
