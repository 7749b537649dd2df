"""`resnet-func summary`: a network as a table."""

from __future__ import annotations

from typing import Any

from resnet_func.app.commands.common import plain_console
from resnet_func.app.options import Summary
from resnet_func.models import summary
from resnet_func.models.load import load_network


def main(options: Summary) -> None:
    """Print the network's layers, output shapes, parameters and multiply-accumulates."""
    changes: dict[str, Any] = {"num_classes": options.num_classes} if options.num_classes else {}
    if ":" not in options.model:
        changes["norm"] = options.norm
        if options.stem != "auto":
            changes["stem"] = options.stem
    model, params, state = load_network(options.model, **changes)
    small = model.config is not None and model.config.stem == "cifar"
    size = options.image_size or (32 if small else 224)
    plain_console().print(summary.table(summary.summarize_network(model, params, state, (3, size, size))))
