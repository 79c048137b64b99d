"""The conditions of a measurement in one sentence: machine, versions, commits, peers and date."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.report.tables import in_order
from benchmarks.result_rows import Row


def measured_on(rows: Sequence[Row]) -> list[str]:
    """A sentence per machine; the commits that were measured on it are listed in the sentence.

    Where machines or commits differ, each is followed by its suites in brackets.
    """
    machines = _grouped(rows, _machine)
    sentences = []
    for machine, group in machines.items():
        suites = f" ({_suites(group)})" if len(machines) > 1 else ""
        sentences.append(
            f"Measured{suites} on {machine}{_commits(group)}; {peer_versions(group)}{_days(group)}."
        )
    return sentences


def _grouped(rows: Sequence[Row], name: Callable[[Mapping[str, Any]], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name(row.machine), []).append(row)
    return groups


def _machine(machine: Mapping[str, Any]) -> str:
    threads, cores = machine.get("threads"), machine.get("cores")
    words = [str(machine.get("device", "an unknown device"))]
    if machine.get("driver"):
        words.append(f"driver {machine['driver']}")
    if threads:
        words.append(
            f"{threads} thread{'s' * (threads != 1)}" + (f" of {cores} cores" if cores else "")
        )
    words += [
        f"{name} {machine[name]}"
        for name in ("torch", "triton", "transformers")
        if machine.get(name)
    ]
    if machine.get("python"):
        words.append(f"Python {machine['python']}")
    if machine.get("platform"):
        words.append(machine["platform"])
    return ", ".join(words)


def _commit(machine: Mapping[str, Any]) -> str:
    commit = str(machine.get("commit") or "")
    return f"{commit.rstrip('+')} with uncommitted changes" if commit.endswith("+") else commit


def _commits(rows: Sequence[Row]) -> str:
    """ ", commit A" or ", commits A (op, load) and B (step)"; empty if no commit is known."""
    commits = {commit: group for commit, group in _grouped(rows, _commit).items() if commit}
    if len(commits) < 2:
        return "".join(f", commit {commit}" for commit in commits)
    suites = {commit: _suites(group) for commit, group in commits.items()}
    if len(set(suites.values())) == 1:
        return f", commits {' and '.join(suites)}"
    return ", commits " + " and ".join(f"{commit} ({names})" for commit, names in suites.items())


def _suites(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row.suite for row in rows))


def peer_versions(rows: Sequence[Row]) -> str:
    """The versions of other libraries, "pyreft 0.1.0, adapters 1.2.0; ", or an empty string."""
    versions = dict.fromkeys(
        f"{row.peer.split(',')[0]}{' of PEFT' * (row.peer == 'LoRA')} {row.version}"
        for row in in_order(rows)
        if row.version and not row.peer.startswith("ours")
    )
    return ", ".join(versions) + "; " if versions else ""


def _days(rows: Sequence[Row]) -> str:
    days = sorted({row.when[:10] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
