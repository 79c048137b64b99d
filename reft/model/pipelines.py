"""Registration of the wrapper's class with transformers' pipelines."""

from __future__ import annotations

import sys


def announce(name: str) -> None:
    """Add a wrapper's class, for every task, to the table of PEFT's classes in the pipelines.

    A pipeline logs an error of two hundred class names about a class that is in no table, and then
    runs. Importing the pipelines takes seconds, so they are not imported here: pipelines that are
    imported after the model was wrapped still log the error.
    """
    pipelines = sys.modules.get("transformers.pipelines.base")
    for names in getattr(pipelines, "SUPPORTED_PEFT_TASKS", {}).values():
        if name not in names:
            names.append(name)
