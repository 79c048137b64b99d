"""Progress bar of training on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressCallback(TrainerCallback):
    """Show a progress bar of optimizer steps with the latest losses, or lines without a terminal.

    Args:
        console: the console to print on.
        opening: a line to print when training begins, or None.
    """

    def __init__(self, console: Console, opening: str | None = None) -> None:
        self.console = console
        self.opening = opening
        self.losses: dict[str, str] = {}
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", losses="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.opening is not None:
            self.console.print(self.opening)
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        losses: dict[str, str] = {
            name: f"{name.replace('_', ' ')} {logs[name]:.4f}"
            for name in ("loss", "eval_loss")
            if logs and name in logs
        }
        if not losses:
            return
        self.losses |= losses
        self.bar.update(self.task, losses=", ".join(self.losses.values()))
        if not self.console.is_terminal:
            self.console.print(f"step {state.global_step}: {', '.join(losses.values())}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()
