"""Start a script in several processes with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT, ROOT / "tests" / "reft", Path(__file__).parent)


def torchrun(*arguments: str | Path, processes: int = 2, timeout: float = 300) -> str:
    """Run a script and return its output; AssertionError with the output if a process fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)),
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(processes)),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )
    printed = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, printed[-6000:]
    return printed
