"""Answers of a saved adapter in a fresh process that has only its files.

``python -m reft.demo.reload MODULE ADAPTER ANSWERS [ARGUMENTS]`` imports a demo's module, calls its
``answers_of_saved(Path(ADAPTER), **json.loads(ARGUMENTS))`` and writes the strings as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def answers_of_fresh_process(module: str, adapter: Path, **arguments: Any) -> list[str]:
    """Call ``answers_of_saved(adapter, **arguments)`` of a module in a new Python.

    Args:
        module: full name of the module.
        adapter: folder of the adapter.
        arguments: JSON values.

    Raises:
        RuntimeError: the process failed; the message ends with its stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        command = [sys.executable, "-m", "reft.demo.reload", module, str(adapter.absolute())]
        command += [str(answers), json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"reloading the adapter in a fresh process failed with exit code "
                f"{done.returncode}:\n{done.stderr[-2000:]}"
            )
        return list(json.loads(answers.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run in the fresh process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("arguments", nargs="?", default="{}")
    given = parser.parse_args(arguments)
    demo = importlib.import_module(given.module)
    answers = demo.answers_of_saved(given.adapter, **json.loads(given.arguments))
    given.answers.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
