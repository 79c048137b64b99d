"""Mutation tests: break the library one line at a time and check that a test fails.

Each entry of ``catalogue.toml`` replaces one piece of one module's source. The replacement happens
when the module is imported; no file changes. ``python tests/mutation/run.py [name …]`` runs the
tests that an entry names and prints the result. The exit code is 1 if a mutant survives, if its
text does not occur exactly once in its file, or if the tests fail without a mutant.

Every mutant is a fork of one process that has imported torch, triton and transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import linecache
import multiprocessing
import os
import re
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = Path(__file__).with_name("catalogue.toml")
#: Seconds after which a mutant counts as an endless loop.
TIMEOUT = 240.0
#: The same for the unchanged library, which runs the tests of all mutants.
UNCHANGED_TIMEOUT = 1500.0
#: pytest's cleanup of unraisable exceptions collects garbage five times: half a second a mutant.
OPTIONS = "-x -q -W ignore --tb=no -p no:cacheprovider -p no:unraisableexception"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong variant of the library.

    Attributes:
        name: its name in the catalogue.
        file: path of the module, relative to the repository.
        old: text that occurs exactly once in the file.
        new: its replacement.
        tests: test files of which at least one test must fail.
        select: pytest's ``-k`` expression, which keeps these tests few.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str

    @property
    def stale(self) -> bool:
        """Whether the entry must be rewritten: no such file, or the text is not there once."""
        path = ROOT / self.file
        return not path.is_file() or path.read_text(encoding="utf-8").count(self.old) != 1


def load(path: Path = CATALOGUE) -> list[Mutant]:
    """Read the catalogue; ValueError if two mutants have one name."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    mutants = [Mutant(**(entry | {"tests": tuple(entry["tests"])})) for entry in entries]
    if len({mutant.name for mutant in mutants}) != len(mutants):
        raise ValueError(f"{path}: two mutants have the same name")
    return mutants


def unchanged(mutants: list[Mutant]) -> Mutant:
    """Build an entry without a replacement that runs the tests of all these mutants."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    select = " or ".join(sorted({f"({mutant.select})" for mutant in mutants}))
    return Mutant("unchanged", "", "", "", tuple(tests), select)


def mutate(mutant: Mutant) -> None:
    """Replace the text in the source that later imports read, and that ``inspect`` shows."""
    path = str(ROOT / mutant.file)
    source = Path(path).read_text(encoding="utf-8").replace(mutant.old, mutant.new)
    read, read_stats = SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_data(loader: SourceFileLoader, name: str) -> bytes:
        return source.encode() if name == path else read(loader, name)

    def path_stats(loader: SourceFileLoader, name: str) -> object:
        if name == path:
            raise OSError("a mutant has no bytecode")
        return read_stats(loader, name)

    SourceFileLoader.get_data = get_data
    SourceFileLoader.path_stats = path_stats
    # Triton compiles the text that inspect returns. Entries without a time are never checked.
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)


def run_tests(mutant: Mutant, log: Path) -> None:
    """Run the mutant's tests in this fork and end it with pytest's exit code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if mutant.file:
        mutate(mutant)
    import pytest

    status = pytest.main([*mutant.tests, "-k", mutant.select, *OPTIONS.split()])
    sys.stdout.flush()
    os._exit(int(status))


def verdict(mutant: Mutant, status: int | None, log: str) -> tuple[bool, str]:
    """Judge pytest's exit code, None for a run that was stopped: (is it as expected, result)."""
    if mutant.name == "unchanged":
        return (
            (True, "passes") if status == 0 else (False, f"the tests fail without a mutant\n{log}")
        )
    if status is None:
        return True, "killed: timeout"
    if status < 0:
        return True, f"killed: signal {-status}"
    if status == 1:
        failure = re.search(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
        return True, f"killed: {failure[1] if failure else 'a test failed'}"
    if status == 0:
        return False, "SURVIVED"
    return False, f"no test ran (pytest's exit code {status})\n{log}"


def run(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, bool, str]]:
    """Run the mutants, ``jobs`` at a time, and yield each with its verdict as it ends."""
    context = multiprocessing.get_context("fork")
    waiting, running = deque(mutants), {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.popleft()
                log = Path(folder, mutant.name)
                process = context.Process(target=run_tests, args=(mutant, log))
                process.start()
                running[process.sentinel] = (mutant, process, log, time.monotonic())
            ended = set(wait(list(running), timeout=5.0))
            for sentinel, (mutant, process, log, started) in list(running.items()):
                timeout = UNCHANGED_TIMEOUT if mutant.name == "unchanged" else TIMEOUT
                status = None
                if sentinel in ended:
                    process.join()
                    status = process.exitcode
                elif time.monotonic() - started > timeout:
                    process.kill()
                    process.join()
                else:
                    continue
                del running[sentinel]
                yield mutant, *verdict(mutant, status, log.read_text(errors="replace"))


def prepare() -> None:
    """Import once what every mutant needs, and nothing of the library."""
    for name in [name for name in os.environ if name.startswith(("PYTEST_", "COV_"))]:
        del os.environ[name]
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= environment | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
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
    gc.collect()
    gc.freeze()  # so that no fork walks through, and copies, what is imported here


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="mutants to run; all without")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument(
        "--skip-unchanged", action="store_true", help="do not run the tests without a mutant"
    )
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the forks' pytest reads its own
    mutants = load()
    unknown = set(options.names) - {mutant.name for mutant in mutants}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in mutants if not options.names or mutant.name in options.names]
    failures = 0
    for mutant in mutants:
        if mutant.stale:
            failures += 1
            print_line(f"{mutant.name:40} STALE: {mutant.file} does not hold its text exactly once")
    fresh = [mutant for mutant in mutants if not mutant.stale]
    prepare()
    first = [] if options.skip_unchanged else [unchanged(fresh)]
    for mutant, expected, result in run([*first, *fresh], options.jobs):
        failures += not expected
        print_line(f"{mutant.name:40} {result}")
    print_line(f"{len(mutants)} mutants, {failures} failures")
    gc.unfreeze()  # frozen objects are reported as leaks when Python exits
    return 1 if failures else 0


def print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
