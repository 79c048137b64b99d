"""Adapter folders: bit-exact round trips, and the old or new adapter after any crash."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reft.config import ReftConfig
from reft.io import atomic_write as atomic
from reft.io.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter, write_adapter

OLD = ReftConfig(rank=2, layers=[0, 3], modules_to_save=["classifier"])
NEW = replace(OLD, rank=5, intervention="direft", positions="l1")


def tensors(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    stacked = torch.randn(4, 3, 5, generator=rng)
    return {
        "rotation": stacked[1],  # a slice of a stack, as parameters of one bank are
        "rotation.base": stacked[2],
        "encode.weight": stacked[3].T,
        "bias": torch.randn(3, generator=rng).bfloat16(),
        "double": torch.randn(2, generator=rng, dtype=torch.float64).requires_grad_(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(seed),
    }


def same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> bool:
    return set(read) == set(written) and all(
        read[name].dtype == value.dtype and torch.equal(read[name], value)
        for name, value in written.items()
    )


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    path = tmp_path / "made" / "with" / "parents"
    write_adapter(path, NEW, tensors(1))
    config, read = read_adapter(str(path))
    assert config == NEW
    assert same(read, tensors(1))
    assert not any(value.requires_grad for value in read.values())
    assert sorted(entry.name for entry in path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_special_values_keep_their_bits(tmp_path):
    bits = torch.tensor([0, 1, 0x7F800000, 0x7FC00001, -0x80000000, -1], dtype=torch.int32)
    write_adapter(tmp_path, OLD, {"x": bits.view(torch.float32)})
    assert torch.equal(read_adapter(tmp_path)[1]["x"].view(torch.int32), bits)


def test_writing_does_not_touch_the_tensors_or_other_files(tmp_path):
    (tmp_path / "trainer_state.json").write_text("kept")
    given, expected = tensors(1), tensors(1)
    write_adapter(tmp_path, OLD, given)
    assert same(given, expected)
    assert given["double"].requires_grad
    assert (tmp_path / "trainer_state.json").read_text() == "kept"


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    write_adapter(tmp_path, OLD, tensors(1))
    _, read = read_adapter(tmp_path)
    write_adapter(tmp_path, OLD, tensors(2))
    assert same(read, tensors(1))


def test_the_two_files_are_plain_json_and_safetensors(tmp_path):
    write_adapter(tmp_path, OLD, tensors(1))
    assert ReftConfig.from_dict(json.loads((tmp_path / CONFIG_FILE).read_text())) == OLD
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as stored:
        assert stored.metadata()["format"] == "pt"
        assert ReftConfig.from_json(stored.metadata()["reft_config"]) == OLD
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(content)


# ------------------------------------------------------------------ crashes


class Crash(BaseException):
    """A simulated kill. It is no Exception, so that no handler catches it."""


class Crashing:
    """Wrapper of operating system calls that crashes at the n-th call."""

    def __init__(self, monkeypatch, at: int | None) -> None:
        self.at, self.calls = at, []
        for name in ("replace", "fsync", "open", "close"):
            monkeypatch.setattr(atomic.os, name, self.wrap(f"os.{name}", getattr(os, name)))
        monkeypatch.setattr(atomic, "open", self.open, raising=False)
        self.unlink = Path.unlink

    def step(self, name: str) -> None:
        self.calls.append(name)
        if self.at is not None and len(self.calls) > self.at:
            raise Crash(name)

    def wrap(self, name, function):
        def call(*args, **kwargs):
            self.step(name)
            return function(*args, **kwargs)

        return call

    def open(self, *args, **kwargs):
        self.step("open")
        file = open(*args, **kwargs)  # noqa: SIM115 PTH123
        write = file.write

        class Torn:
            """A file whose write is interrupted half way."""

            def __enter__(inner):
                return inner

            def __exit__(inner, *_):
                file.close()

            def write(inner, content):
                write(content[: len(content) // 2])
                file.flush()
                self.step("write")
                return write(content[len(content) // 2 :])

            def __getattr__(inner, name):
                return getattr(file, name)

        return Torn()


def steps_of_a_write(tmp_path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        counted = Crashing(patch, at=None)
        write_adapter(tmp_path / "counted", OLD, tensors(1))
    return counted.calls


def test_a_write_is_made_of_the_steps_that_the_crash_tests_stop_at(tmp_path):
    one_file = ["open", "write", "os.fsync", "os.replace", "os.open", "os.fsync", "os.close"]
    assert steps_of_a_write(tmp_path) == one_file * 2


@pytest.mark.parametrize("cleaned", [True, False], ids=["exception", "killed"])
@pytest.mark.parametrize("at", range(14))
def test_a_crash_leaves_the_old_or_the_new_adapter(tmp_path, monkeypatch, at, cleaned):
    path = tmp_path / "adapter"
    write_adapter(path, OLD, tensors(1))
    with monkeypatch.context() as patch:
        crashing = Crashing(patch, at)
        if not cleaned:  # a killed process does not tidy up either
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        with pytest.raises(Crash):
            write_adapter(path, NEW, tensors(2))
    renamed = crashing.calls[:-1].count("os.replace")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config, read = read_adapter(path)
    assert config == (NEW if renamed else OLD)
    assert same(read, tensors(2) if renamed else tensors(1))
    assert len(caught) == (1 if renamed == 1 else 0)
    # The next save repairs the folder, whatever files were left.
    write_adapter(path, NEW, tensors(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, read = read_adapter(path)
    assert config == NEW
    assert same(read, tensors(3))
    assert sorted(entry.name for entry in path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("at", range(14))
def test_a_crash_in_the_first_write_leaves_nothing_or_the_whole(tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        crashing = Crashing(patch, at)
        with pytest.raises(Crash):
            write_adapter(tmp_path / "adapter", NEW, tensors(2))
    if crashing.calls[:-1].count("os.replace"):
        config, read = read_adapter(tmp_path / "adapter")
        assert config == NEW
        assert same(read, tensors(2))
    else:
        with pytest.raises(FileNotFoundError):
            read_adapter(tmp_path / "adapter")


def test_a_full_disk_keeps_the_old_adapter(tmp_path, monkeypatch):
    write_adapter(tmp_path, OLD, tensors(1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_adapter(tmp_path, NEW, tensors(2))
    config, read = read_adapter(tmp_path)
    assert config == OLD
    assert same(read, tensors(1))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


# ------------------------------------------------------------------ refused folders


def test_disagreeing_files_are_reported_and_the_header_believed(tmp_path):
    write_adapter(tmp_path, NEW, tensors(1))
    (tmp_path / CONFIG_FILE).write_text(OLD.to_json())
    with pytest.warns(UserWarning) as caught:
        config, _ = read_adapter(tmp_path)
    assert config == NEW
    message = str(caught[0].message)
    for said in (WEIGHTS_FILE, CONFIG_FILE, "rank = 5 and 2", "'direft' and 'loreft'"):
        assert said in message
    assert "layers" not in message


def test_a_weights_file_without_a_header_takes_the_json(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        read_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(OLD.to_json())
    config, read = read_adapter(tmp_path)
    assert config == OLD
    assert same(read, {"x": torch.ones(2)})


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such adapter directory.*nowhere"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"adapter is a directory.*file"):
        read_adapter(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=rf"no {WEIGHTS_FILE} \(it has: file\)"):
        read_adapter(tmp_path)
    with pytest.raises(NotADirectoryError, match="file"):
        write_adapter(tmp_path / "file", OLD, tensors(1))
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(NotADirectoryError, match="below"):
        write_adapter(tmp_path / "file" / "below", OLD, tensors(1))


def test_a_damaged_json_file_is_refused_by_name(tmp_path):
    write_adapter(tmp_path, OLD, tensors(1))
    text = (tmp_path / CONFIG_FILE).read_text()
    for damaged in ("", text[: len(text) // 2], "\x00\x01", "[]"):
        (tmp_path / CONFIG_FILE).write_text(damaged)
        with pytest.raises(ValueError, match=CONFIG_FILE):
            read_adapter(tmp_path)


@pytest.mark.parametrize("where", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_newer_format_is_refused(tmp_path, where):
    write_adapter(tmp_path, OLD, tensors(1))
    newer = json.dumps({**OLD.to_dict(), "format_version": 99, "new_field": 1})
    if where == CONFIG_FILE:
        (tmp_path / CONFIG_FILE).write_text(newer)
    else:
        save_file({"x": torch.ones(1)}, tmp_path / WEIGHTS_FILE, metadata={"reft_config": newer})
    with pytest.raises(ValueError, match=rf"(?s){where}.*format_version.*99"):
        read_adapter(tmp_path)


def test_only_tensors_are_written(tmp_path):
    with pytest.raises(TypeError, match=r"tensors\['x'\] must be a torch.Tensor, got list"):
        write_adapter(tmp_path / "new", OLD, {"x": [1.0]})
    assert not (tmp_path / "new").exists()
