"""`isynet list`: the published networks."""

from isynet.cli.output import AsJson, print_rows


def list(as_json: AsJson = False) -> None:
    """List the published networks with the figures published for them."""
    import torch

    from isynet.checkpoint import create
    from isynet.counting import count
    from isynet.family import FAMILY, PUBLISHED

    rows = []
    for name, text in FAMILY.items():
        with torch.device("meta"):
            net = create(name)
        published = PUBLISHED.get(name)
        rows.append(
            {
                "name": name,
                "M parameters": sum(value.numel() for value in net.parameters()) / 1e6,
                "G MACs at 224": count(text).matrix / 1e9,
                "top-1 %": published.top1 if published else None,
                "Ascend 310 ms": published.milliseconds if published else None,
                "architecture": text,
            }
        )
    print_rows(rows, as_json=as_json)
