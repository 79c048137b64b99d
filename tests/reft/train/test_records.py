"""Data files: their formats, and errors with the line of an invalid record."""

from __future__ import annotations

import json

import pytest

from reft.train.records import PROMPT_COMPLETION, TEXT_LABEL, read_records

ROWS = [
    {"prompt": "2 + 2 =", "completion": "4"},
    {"prompt": "line\nbreak and \u2028", "completion": "ü 漢"},
]


def write(tmp_path, text: str, name: str = "data.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(json.dumps(row) for row in ROWS),
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n \n",
        "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n",
        "\ufeff" + "\n".join(json.dumps(row) for row in ROWS),
        json.dumps(ROWS),
        "\n" + json.dumps(ROWS, indent=2),
    ],
    ids=["jsonl", "blank-lines", "windows", "byte-order-mark", "json", "indented"],
)
def test_all_forms_of_a_file_hold_the_same_records(tmp_path, text):
    assert read_records(str(write(tmp_path, text))) == ROWS


def test_text_and_label(tmp_path):
    rows = [{"text": "x", "label": 1}, {"text": "y", "label": "no"}, {"text": "z", "label": 0.5}]
    path = write(tmp_path, json.dumps(rows))
    assert read_records(path, required=TEXT_LABEL) == rows


def test_optional_fields_may_be_there_or_not(tmp_path):
    path = write(tmp_path, '{"prompt": "p"}\n{"prompt": "q", "completion": "c"}')
    rows = read_records(path, required=("prompt",), optional=("completion",))
    assert rows == [{"prompt": "p"}, {"prompt": "q", "completion": "c"}]


GOOD = '{"prompt": "p", "completion": "c"}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["holds no records", "'prompt', 'completion'"]),
        ("[]", ["holds no records"]),
        ("\n\n", ["holds no records"]),
        (f"{GOOD}\nprompt,completion", ["line 2", "not JSON", "column 1"]),
        (f"{GOOD}\n\n{GOOD[:-5]}", ["line 3", "not JSON"]),
        (f"[{GOOD},\n{GOOD}\n,3 4]", ["line 3", "not JSON"]),
        (f"{GOOD}\n3", ["line 2", "an object", "int"]),
        (f"[{GOOD}, null]", ["record 2", "an object", "NoneType"]),
        (f'{GOOD}\n{{"prompt": "p"}}', ["line 2", "'completion' is missing", "has 'prompt'"]),
        ("{}", ["line 1", "'prompt', 'completion' is missing", "no field"]),
        (
            f'[{GOOD}, {{"prompt": "p", "completion": "c", "id": 1}}]',
            ["record 2", "unknown", "'id'"],
        ),
        ('{"prompt": 3, "completion": "c"}', ["line 1", "'prompt'", "str", "got 3"]),
        ('{"prompt": "p", "completion": null}', ["line 1", "'completion'", "str", "None"]),
    ],
)
def test_an_invalid_file_is_refused_with_the_line(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        read_records(path, required=PROMPT_COMPLETION)
    for words in [str(path), *says]:
        assert words in str(caught.value)


def test_a_label_must_be_a_number_or_a_name(tmp_path):
    path = write(tmp_path, '{"text": "t", "label": true}')
    with pytest.raises(ValueError, match="'label' must be of type int or float or str, got True"):
        read_records(path, required=TEXT_LABEL)


def test_a_path_that_is_no_text_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such data file.*nowhere\.json"):
        read_records(tmp_path / "nowhere.json")
    with pytest.raises(IsADirectoryError, match="folder"):
        read_records(tmp_path)
    binary = tmp_path / "data.bin"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_records(binary)
