"""`resnet-func summary`: a network as a table."""

from __future__ import annotations

from typing import Any

from resnet_func.app.commands.common import plain_console
from resnet_func.app.options import Summary
from resnet_func.models import summary, zoo
from resnet_func.models.interop.load import check_zoo_name, load_network
from resnet_func.models.resnet import build


def main(options: Summary) -> None:
    """Print the network's layers, output shapes, parameters and multiply-accumulates."""
    changes: dict[str, Any] = {"num_classes": options.num_classes} if options.num_classes else {}
    if ":" in options.model:
        size = options.image_size or 224
        rows = summary.summarize_network(*load_network(options.model, **changes), (3, size, size))
    else:  # from its config alone: no parameter is drawn
        changes |= {"norm": options.norm} | ({} if options.stem == "auto" else {"stem": options.stem})
        check_zoo_name(options.model)
        config = zoo.config(options.model, **changes)
        rows = summary.summarize(build(config), options.image_size or (32 if config.stem == "cifar" else 224))
    plain_console().print(summary.table(rows))
