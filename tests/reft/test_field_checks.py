"""Field checks: accepted values, stored values, and the form of the errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import pytest

from reft import field_checks
from reft.field_checks import check_fields, choice, distinct, integer, number, optional


class Color(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (integer(1), 1),
        (integer(1), 10**30),
        (integer(0, bits=3), 7),
        (number(0), 0),
        (number(0, exclusive=True), 1e-9),
        (number(0, below=1), 0.5),
        (choice("red", "blue"), "blue"),
        (optional(choice("red")), None),
        (distinct(integer(0), "different integers"), (3, 0)),
        (field_checks.BOOLEAN, False),
        (field_checks.TEXT, ""),
        (field_checks.NAME, "a"),
    ],
)
def test_accepted_values_are_kept(check, value):
    assert check("field", value) is value


@pytest.mark.parametrize(
    ("check", "value", "allowed"),
    [
        (integer(1), 0, "an integer of at least 1"),
        (integer(1), True, "an integer of at least 1"),
        (integer(1), 1.0, "an integer of at least 1"),
        (integer(0, bits=3), 8, "an integer of at least 0 and below 2^3"),
        (number(0), -1, "a number of at least 0"),
        (number(0), math.nan, "a number of at least 0"),
        (number(0), math.inf, "a number of at least 0"),
        (number(0), 10**400, "a number of at least 0"),
        (number(0), False, "a number of at least 0"),
        (number(0, exclusive=True), 0, "a number above 0"),
        (number(0, below=1), 1, "a number of at least 0 and below 1"),
        (choice("red", "blue", "green"), 3, '"red", "blue" or "green"'),
        (optional(integer(1)), "x", "None or an integer of at least 1"),
        (distinct(integer(0), "different integers"), (1, 1), "different integers"),
        (distinct(integer(0), "different integers"), (), "different integers"),
        (distinct(integer(0), "different integers"), [1], "different integers"),
        (field_checks.BOOLEAN, 1, "True or False"),
        (field_checks.TEXT, "\ud800", "a string"),
        (field_checks.NAME, "", "a string that is not empty"),
    ],
)
def test_refused_values_are_named_with_what_is_allowed(check, value, allowed):
    with pytest.raises(ValueError) as caught:
        check("section.field", value)
    assert str(caught.value).startswith(f"section.field must be {allowed}, got ")


def test_a_misspelt_choice_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"got 'bleu' \(did you mean 'blue'\?\)"):
        choice("red", "blue")("field", "bleu")


def test_a_member_of_an_enumeration_is_kept_as_text():
    assert type(choice("red")("field", Color.RED)) is str


def test_fields_of_a_frozen_dataclass_are_checked_and_converted():
    @dataclass(frozen=True)
    class Settings:
        size: int
        names: tuple[str, ...]

        def __post_init__(self) -> None:
            words = field_checks.FieldCheck("names", lambda value: isinstance(value, list), tuple)
            check_fields(self, "settings", {"size": integer(1), "names": words})

    assert Settings(2, ["a"]).names == ("a",)
    with pytest.raises(ValueError, match=r"settings\.size must be an integer of at least 1, got 0"):
        Settings(0, ["a"])


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"it has no field 'sise' \(did you mean 'size'\?\); its"):
        field_checks.refuse_unknown_fields("it", {"size": 1, "sise": 2}, ["size", "name"])
