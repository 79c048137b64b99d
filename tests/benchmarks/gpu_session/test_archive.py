"""Archives: size limits, unpacking into the folder of the device only, and commits."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile

import pytest
from archive_members import members
from sample_rows import MACHINE, row
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.gpu_session import archive as module
from benchmarks.gpu_session.archive import pack, unpack
from benchmarks.result_rows import RESULTS, read
from benchmarks.revision import content_id

CONTENT = "tree-0123456789ab-ba9876543210"


def packed(tmp_path, name, *files):
    """An archive of files, given as (name, text), and of other members."""
    path = tmp_path / name
    with tarfile.open(path, "w:gz") as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
                continue
            member = tarfile.TarInfo(file[0])
            member.size = len(file[1])
            tar.addfile(member, io.BytesIO(file[1].encode()))
    return path


def link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "named_commits", lambda text: text.replace(CONTENT, "c0ffee"))
    source, home = tmp_path / "scratch", tmp_path / "results.tar.gz"
    (source / "report").mkdir(parents=True)
    measured = row(machine=MACHINE | {"commit": CONTENT})
    (source / "op.jsonl").write_text(measured.as_json() + "\n" + measured.as_json()[:50])
    (source / "settings.json").write_text(json.dumps([{"commit": CONTENT}]))
    (source / "report" / "report.md").write_text(f"commit {CONTENT}\n")
    home.write_bytes(pack(source, "h100-80gb-hbm3")[0])
    (tmp_path / "results" / "h100-80gb-hbm3").mkdir(parents=True)
    kept = tmp_path / "results" / "h100-80gb-hbm3" / "load.jsonl"
    kept.write_text("kept")
    folder = unpack(home, tmp_path / "results")
    assert folder == kept.parent and kept.read_text() == "kept"
    named = dataclasses.replace(measured, machine=MACHINE | {"commit": "c0ffee"})
    assert read(folder / "op.jsonl") == [named]
    assert json.loads((folder / "settings.json").read_text()) == [{"commit": "c0ffee"}]
    assert (folder / "report" / "report.md").read_text() == "commit c0ffee\n"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([("../evil.txt", "x")], "files of one folder, got '../evil.txt'"),
        ([("h200/../../evil.txt", "x")], "files of one folder"),
        ([("/evil.txt", "x")], "files of one folder, got '/evil.txt'"),
        ([link("h200/evil.txt", "/etc/passwd")], "files of one folder, got 'h200/evil.txt'"),
        ([("evil.txt", "x")], "files of one folder, got 'evil.txt'"),
        ([("h200/a", "x"), ("cpu/a", "x")], "one device, got ['cpu', 'h200']"),
        ([], "one device, got []"),
    ],
)
def test_members_outside_are_refused(tmp_path, files, says):
    path = packed(tmp_path, "results.tar.gz", *files)
    output = tmp_path / "results" / "here"
    done = CliRunner().invoke(app, ["unpack", str(path), "--output", str(output)])
    assert done.exit_code == 2 and says in done.stderr
    assert {path.name for path in tmp_path.rglob("*")} == {"results.tar.gz"}


def test_other_files_are_refused_with_a_single_line(tmp_path):
    (tmp_path / "broken").write_text("no archive")
    whole = packed(tmp_path, "whole", ("h200/a.json", "x" * 10_000)).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    for name in ("broken", "absent", "cut"):
        done = CliRunner().invoke(app, ["unpack", str(tmp_path / name)])
        assert done.exit_code == 2 and "was not unpacked" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_session_without_a_gpu_is_not_kept(tmp_path):
    path = packed(tmp_path, "results.tar.gz", ("cpu/session.json", '{"tiny": true}'))
    before = sorted(RESULTS.rglob("*"))
    done = CliRunner().invoke(app, ["unpack", str(path)])
    assert done.exit_code == 2 and "holds no results to keep; give --output" in done.stderr
    assert sorted(RESULTS.rglob("*")) == before
    assert unpack(path, tmp_path / "results") == tmp_path / "results" / "cpu"


def test_an_archive_is_unpacked_without_git(tmp_path, monkeypatch, capsys):
    def fails(text):
        raise FileNotFoundError("git")

    monkeypatch.setattr(module, "named_commits", fails)
    files = [(f"h200/{name}.json", f'["{CONTENT}"]') for name in "ab"]
    unpack(packed(tmp_path, "results.tar.gz", *files), tmp_path)
    assert {path.name for path in (tmp_path / "h200").iterdir()} == {"a.json", "b.json"}
    assert capsys.readouterr().err == "content ids are kept, git failed: git\n"


def test_an_unknown_content_id_is_kept(tmp_path):
    path = packed(tmp_path, "results.tar.gz", ("h200/a.json", f'["{CONTENT}"]'))
    assert (unpack(path, tmp_path) / "a.json").read_text() == f'["{CONTENT}"]'
    assert content_id() != CONTENT


def test_a_large_archive_leaves_out_plots_then_logs(tmp_path):
    (tmp_path / "op.jsonl").write_text(row().as_json() + "\n")
    (tmp_path / "plot.png").write_bytes(os.urandom(4000))
    (tmp_path / "op.log").write_bytes(os.urandom(4000))
    whole, left_out = pack(tmp_path, "h200")
    assert left_out == [] and len(members(whole)) == 3
    smaller, left_out = pack(tmp_path, "h200", limit=len(whole) - 1)
    assert left_out == ["plots"] and set(members(smaller)) == {"h200/op.jsonl", "h200/op.log"}
    smallest, left_out = pack(tmp_path, "h200", limit=3000)
    assert left_out == ["plots", "logs"] and set(members(smallest)) == {"h200/op.jsonl"}
