"""The checkpoint to go on from is the newest whole one."""

from __future__ import annotations

import pytest

from reft.train.checkpoints import last_checkpoint


def checkpoint(folder, step: int, state: str | None) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if state is not None:
        (path / "trainer_state.json").write_text(state, encoding="utf-8")


def test_the_newest_by_number(tmp_path):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step, "{}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 3'])
def test_half_a_checkpoint_is_passed_over(state, tmp_path):
    checkpoint(tmp_path, 5, "{}")
    checkpoint(tmp_path, 6, state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
