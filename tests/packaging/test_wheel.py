"""Content and metadata of the wheel; the sdist builds the same wheel."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import reft

ROOT = Path(__file__).resolve().parents[2]
INFO = f"reft-{reft.__version__}.dist-info"
#: Developer tools of the kernels, which tests and benchmarks import from the checkout.
DEVTOOLS = Path("reft_kernels/devtools")

#: Data files that the packages need at run time.
DATA = {
    "reft/py.typed",
    "reft_kernels/py.typed",
    "reft_kernels/README.md",
    "reft_kernels/_triton/measured.json",
    "reft/paper/presets/commonsense.toml",
    "reft/paper/tasks/texts/demos.json",
    "reft/demo/assets/facts/model.safetensors",
    "reft/demo/assets/facts/tokenizer.json",
    "reft/demo/assets/facts/train.jsonl",
    "reft/demo/assets/messages/heldout.jsonl",
}


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        assert file.testzip() is None
        return set(file.namelist())


@pytest.fixture(scope="session")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as file:
        return Parser().parsestr(file.read(f"{INFO}/METADATA").decode())


def test_the_wheel_is_for_every_platform(wheel) -> None:
    assert wheel.name == f"reft-{reft.__version__}-py3-none-any.whl"


def test_the_two_packages_whole_and_nothing_else(wheel, sources) -> None:
    wanted = {
        str(path.relative_to(sources))
        for package in ("reft", "reft_kernels")
        for path in (sources / package).rglob("*")
        if path.is_file() and sources / DEVTOOLS not in path.parents
    }
    info = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert _names(wheel) == wanted | {f"{INFO}/{name}" for name in info}
    assert wanted >= DATA


def test_what_git_tracks_is_what_is_packed(wheel) -> None:
    """A file that was never added to git works here, but is missing in every other checkout's
    wheel."""
    command = ["git", "ls-files", "-z", "--", "reft", "reft_kernels"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as reason:
        pytest.skip(f"these sources are no git checkout: {reason}")
    tracked = set(done.stdout.split("\0")) - {""}
    packed = {name for name in _names(wheel) if not name.startswith(INFO)}
    assert packed == {name for name in tracked if not name.startswith(f"{DEVTOOLS}/")}


def test_files_are_those_of_the_checkout(wheel) -> None:
    with zipfile.ZipFile(wheel) as file:
        for name in sorted(DATA):
            assert file.read(name) == (ROOT / name).read_bytes(), name


def test_what_it_says_of_itself(metadata) -> None:
    assert metadata["Name"] == "reft"
    assert metadata["Version"] == reft.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(">=3.11")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text("utf-8").strip()
    said = set(metadata.get_all("Classifier"))
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert said >= versions | {"Typing :: Typed"}


def test_what_it_asks_for(metadata) -> None:
    """No exact versions and no developer tools; each lower bound is the oldest version tested."""
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {requirement.name for requirement in required if "extra" not in str(requirement.marker)}
    assert plain == {
        "torch", "triton", "transformers", "huggingface_hub", "safetensors", "rich", "typer",
    }  # fmt: skip
    oldest_versions = {}
    for line in (ROOT / "constraints-floor.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("#")[0].strip().partition("==")
            oldest_versions[name] = version
    for dependency in required:
        name = dependency.name
        if name in plain - {"torch"}:  # CONTRIBUTING says why torch's oldest version is not tested
            (oldest,) = [part.version for part in dependency.specifier if part.operator == ">="]
            assert Version(oldest) == Version(oldest_versions[name]), dependency
    assert set(metadata.get_all("Provides-Extra")) >= {"train", "trl", "eval", "vllm"}


def test_its_entry_points(wheel) -> None:
    with zipfile.ZipFile(wheel) as file:
        entry_points = configparser.ConfigParser()
        entry_points.read_string(file.read(f"{INFO}/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == {"reft": "reft.cli.app:main"}
    assert dict(entry_points["vllm.general_plugins"]) == {"reft": "reft.serving.vllm:register"}


def test_the_sdist_makes_the_same_wheel(wheel, sources, tmp_path) -> None:
    build = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"
    made, unpacked = tmp_path / "made", tmp_path / "unpacked"
    made.mkdir()

    def run(kind: str, cwd: Path) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", build.format(kind, str(made))],
            cwd=cwd, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return made / done.stdout.splitlines()[-1]

    with tarfile.open(run("sdist", sources)) as file:
        file.extractall(unpacked, filter="data")
    (tree,) = unpacked.iterdir()
    assert not (tree / "benchmarks").exists()
    again = run("wheel", tree)
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as other:
        assert set(first.namelist()) == set(other.namelist())
        for name in first.namelist():
            assert first.read(name) == other.read(name), name
