"""Where a measurement was taken."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from resnet_func import runtime


def capture() -> dict[str, Any]:
    """Hardware and versions, as JSON: nothing that names the host."""
    return {
        "cpu": runtime.cpu_name(),
        "cores": runtime.available_cores(),
        "vector_extensions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load_before": os.getloadavg()[0],
        "commit": _commit(),
    }


def _commit() -> str | None:
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return result.stdout.strip() or None
