"""Are the tests able to fail? Break the library one line at a time and see whether they notice.

Each entry of ``catalogue.toml`` is applied to a copy of the package in a temporary folder, where
the tests that ought to notice are run. ``python tests/mutation/run.py [name …]`` prints what became
of each; it ends with 1 if a mutant survives, if its text is no longer found exactly once, or if the
tests fail on the unchanged library.

Every mutant is a fork of one process that has imported torch and triton already.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = Path(__file__).with_name("catalogue.toml")
#: What a copy holds: the package, its tests and how they are run.
COPIED = (
    "reft_kernels", "reft", "tests/kernels", "tests/reft", "tests/conftest.py", "pyproject.toml"
)  # fmt: skip
#: Seconds, for a mutant that loops for ever.
PATIENCE = 240.0
#: The same for the unchanged library, which runs the tests of all mutants.
LONGER = 1500.0


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong variant.

    Attributes:
        file: below the repository. old: text that stands there exactly once. new: what replaces it.
        tests: test files that ought to notice. select: the ``-k`` expression that keeps them few.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str

    @property
    def stale(self) -> bool:
        """Whether the text is not there, or more than once, so that the entry must be rewritten."""
        return (ROOT / self.file).read_text(encoding="utf-8").count(self.old) != 1


def load(path: Path = CATALOGUE) -> list[Mutant]:
    """The catalogue; names are unique."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    mutants = [Mutant(**(entry | {"tests": tuple(entry["tests"])})) for entry in entries]
    if len({mutant.name for mutant in mutants}) != len(mutants):
        raise ValueError(f"{path}: two mutants of one name")
    return mutants


def _patience(mutant: Mutant) -> float:
    return LONGER if mutant.name == "unchanged" else PATIENCE


def unchanged(mutants: list[Mutant]) -> Mutant:
    """The library as it is, under all the tests that the mutants name."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    select = " or ".join(sorted({f"({mutant.select})" for mutant in mutants}))
    return Mutant("unchanged", "", "", "", tuple(tests), select)


def copy_of_the_library(mutant: Mutant, folder: Path) -> None:
    """The parts of the repository that matter, with the mutant's line in place of the right one."""
    for part in COPIED:
        source, target = ROOT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    if mutant.file:
        path = folder / mutant.file
        path.write_text(
            path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8"
        )


def run_tests(mutant: Mutant, folder: Path) -> None:
    """Run in a fork; ends it with pytest's exit status."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    options = f"-x -q -W ignore --tb=no -p no:cacheprovider -p no:xdist -c {folder}/pyproject.toml"
    status = pytest.main([*mutant.tests, "-k", mutant.select, *options.split()])
    sys.stdout.flush()
    os._exit(int(status))


def verdict(mutant: Mutant, status: int | None, log: str) -> tuple[bool, str]:
    """(as it should be, what happened) from pytest's exit status, None for one that was stopped."""
    if mutant.name == "unchanged":
        return (
            (True, "passes") if status == 0 else (False, f"the tests fail without a mutant\n{log}")
        )
    if status is None:
        return True, "killed: never ended"
    if status < 0:
        return True, f"killed: signal {-status}"
    if status == 1:
        first = re.search(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
        return True, f"killed: {first[1] if first else 'a test failed'}"
    if status == 0:
        return False, "SURVIVED"
    return False, f"no test ran (pytest's status {status})\n{log}"


def run(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, bool, str]]:
    """Run them, ``jobs`` at a time, and tell of each as it ends."""
    context = multiprocessing.get_context("fork")
    waiting, running = deque(mutants), {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.popleft()
                folder = Path(parent, mutant.name)
                copy_of_the_library(mutant, folder)
                process = context.Process(target=run_tests, args=(mutant, folder))
                process.start()
                running[process.sentinel] = (mutant, process, folder, time.monotonic())
            ended = set(wait(list(running), timeout=5.0))
            for sentinel, (mutant, process, folder, started) in list(running.items()):
                status = None
                if sentinel in ended:
                    process.join()
                    status = process.exitcode
                elif time.monotonic() - started > _patience(mutant):
                    process.kill()
                    process.join()
                else:
                    continue
                del running[sentinel]
                log = (folder / "log").read_text(errors="replace")
                yield mutant, *verdict(mutant, status, log)
                shutil.rmtree(folder, ignore_errors=True)


def prepare() -> None:
    """Import what every mutant needs, once, and nothing of the library."""
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "COV_"))]:
        del os.environ[name]
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401
    import torch._dynamo
    import transformers.trainer  # noqa: F401
    from transformers import BertForSequenceClassification, LlamaForCausalLM  # noqa: F401

    assert not {"reft", "reft_kernels"} & sys.modules.keys()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="mutants to run; all without")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (2)")
    asked = parser.parse_args()
    sys.argv = sys.argv[:1]  # the forks' pytest reads its own
    mutants = load()
    unknown = set(asked.names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in mutants if not asked.names or mutant.name in asked.names]
    wrong = 0
    for mutant in mutants:
        if mutant.stale:
            wrong += 1
            say(f"{mutant.name:40} STALE: {mutant.file} does not hold its text exactly once")
    fresh = [mutant for mutant in mutants if not mutant.stale]
    prepare()
    for mutant, right, what in run([unchanged(fresh), *fresh], asked.jobs):
        wrong += not right
        say(f"{mutant.name:40} {what}")
    say(f"{len(mutants)} mutants, {wrong} not as they should be")
    return 1 if wrong else 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
