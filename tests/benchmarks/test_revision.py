"""Content ids equal git's tree ids and lead back to a commit."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from benchmarks.revision import commit, content_id, named_commits, tree_id


def git(root, *arguments):
    done = subprocess.run(
        ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("REFT_COMMIT", raising=False)


@pytest.fixture
def repository(tmp_path):
    """A repository of two packages, with names that git and Python sort differently."""
    root = tmp_path / "checkout"
    for name, text in {
        "reft/__init__.py": "",
        "reft/model.py": "import reft\n",
        "reft/model/a.py": "ä = 1\n",
        "reft/model-b.py": "b = 1\n",
        "reft_kernels/measured.json": "[]\n",
        "reft_kernels/run.sh": "#!/bin/sh\n",
        "benchmarks/gpu.py": "pass\n",
    }.items():
        path = root / name
        if path.name == "model.py":
            path = path.with_name("model0.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "reft_kernels" / "run.sh").chmod(0o755)
    (root / "reft" / "link").symlink_to("model0.py")
    (root / ".gitignore").write_text("__pycache__/\n*.pyc\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_tree_ids_are_those_of_git(repository):
    (repository / "reft" / "__pycache__").mkdir()
    (repository / "reft" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"x")
    (repository / "reft" / "old.pyc").write_bytes(b"x")
    (repository / "reft" / "empty" / "__pycache__").mkdir(parents=True)
    for name in ("reft", "reft_kernels"):
        assert tree_id(repository / name).hex() == git(repository, "rev-parse", f"HEAD:{name}")
    before = tree_id(repository / "reft")
    (repository / "reft" / "model" / "a.py").write_text("ä = 2\n", encoding="utf-8")
    assert tree_id(repository / "reft") != before


def test_a_copy_without_git_leads_back_to_its_commit(repository, tmp_path):
    first = git(repository, "rev-parse", "HEAD")
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns(".git"), symlinks=True)
    trees = [git(repository, "rev-parse", f"HEAD:{name}")[:12] for name in ("reft_kernels", "reft")]
    assert commit(copy) == content_id(copy) == f"tree-{trees[0]}-{trees[1]}"
    (repository / "reft" / "model0.py").write_text("changed = 1\n")
    git(repository, "commit", "-q", "-a", "-m", "second")
    text = f'{{"commit": "{commit(copy)}", "other": "tree-000000000000-{trees[1]}"}}'
    assert named_commits(text, repository) == (
        f'{{"commit": "{first[:12]}", "other": "tree-000000000000-{trees[1]}"}}'
    )


def test_a_commit_without_the_packages_is_skipped(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "nothing")
    text = "tree-000000000000-000000000000"
    assert named_commits(text, tmp_path) == text


def test_the_name_of_a_checkout(repository, monkeypatch):
    head = git(repository, "rev-parse", "--short=12", "HEAD")
    assert commit(repository) == head
    (repository / "reft" / "model0.py").write_text("changed = 1\n")
    assert commit(repository) == f"{head}+"
    monkeypatch.setenv("REFT_COMMIT", "given")
    assert commit(repository) == "given"
