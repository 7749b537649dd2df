"""Run a module in several processes that find each other as `torchrun`'s do; every wait has a limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(world: int, module: str, *arguments: str, limit: float = 240.0) -> None:
    """Run `python -m module` on `world` ranks; fails with their output where one fails or takes too long."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                command,
                env={**os.environ, **common, **own},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            processes.append(process)
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=limit)
            assert process.returncode == 0, f"rank {rank} of {world}: {output}"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
