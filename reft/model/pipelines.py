"""The wrapper in transformers' table of adapter models that its pipelines take."""

from __future__ import annotations

import sys


def announce(name: str) -> None:
    """Enter a class of wrappers beside PEFT's for every task.

    A pipeline logs an error, two hundred class names long, about a class that no table has, and
    then runs. Importing the pipelines takes seconds, so they are not imported for this: what is
    imported after the model was wrapped still logs it.
    """
    pipelines = sys.modules.get("transformers.pipelines.base")
    for names in getattr(pipelines, "SUPPORTED_PEFT_TASKS", {}).values():
        if name not in names:
            names.append(name)
