"""`isynet mem`: how much of a machine's matrix rate networks and attention layers can use."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from isynet.cli.output import AsJson, Machine, Size, print_rows, warn_unknown

if TYPE_CHECKING:
    from nabla_attn.cost.work import Work


def mem(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Networks, ours or of other families (`resnet18`), or files."),
    ] = None,
    size: Size = 224,
    machine: Machine = "",
    attention: Annotated[
        list[str] | None,
        typer.Option(help="TOKENS,HEADS,DIM or TOKENS,HEADS,DIM,DENSITY; again for more."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print work and the matrix efficiency measure (MEM).

    Plain MEM has no unit and compares networks; with --machine it is the share of the predicted
    time that useful matrix work takes. Both are reconstructed from the abstract of the paper.
    """
    from isynet.counting import count_named
    from nabla_attn.cost.rates import find_rates

    if not models and not attention:
        raise ValueError("name a network, or pass --attention TOKENS,HEADS,DIM,DENSITY.")
    rates = find_rates(machine) if machine else None
    rows = []
    for model in models or ():
        work = count_named(model, size)
        warn_unknown(model, work.unknown)
        rows.append(_row(model, work, rates, None))
    for text in attention or ():
        rows.append(_row(f"attention {text}", _read_attention(text), rates, 1))
    print_rows(rows, as_json=as_json)


def _row(name: str, work: "Work", rates: Any, batch: int | None) -> dict[str, Any]:
    row = {
        "name": name,
        "M MACs": work.matrix / 1e6,
        "M issued": work.issued() / 1e6,
        "M moved": work.moved / 1e6,
        "M vector": work.vector / 1e6,
        "kernels": work.kernels,
        "plain MEM": work.mem,
    }
    if rates:
        row[f"MEM {rates.name}"] = rates.mem(work, batch=batch)
        row["predicted ms"] = rates.seconds(work, batch=batch) * 1e3
    return row


def _read_attention(text: str) -> "Work":
    from nabla_attn.cost.attention import attention_work

    try:
        tokens, heads, dim, density = (*text.split(","), "1")[: max(4, text.count(",") + 1)]
        sizes = int(tokens), int(heads), int(dim)
        share = float(density)
    except ValueError:
        raise ValueError(f"expected TOKENS,HEADS,DIM or with ,DENSITY: got {text!r}.") from None
    return attention_work(*sizes, share)
