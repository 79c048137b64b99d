"""A training run of a second in a process that can be killed, forked from a server that has
imported everything."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_models import PAD, VOCAB, llama
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from reft import ReftConfig, ReftTrainer, get_reft_model
from reft.train.checkpoints import last_checkpoint

STEPS, EACH = 10, 2

#: Files that Trainer and this library write into a checkpoint.
FILES = {
    *("adapter_config.json", "adapter_model.safetensors", "run_settings.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"),
}

#: Python's audit events of creating, renaming and removing files and folders.
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir")


@dataclass(frozen=True)
class Wishes:
    """Events that shall happen in a run.

    Attributes:
        die_at: the number of the event below the run's folder, from when the fourth step is saved
            on, at which it kills itself.
        at_save: called with the folder when a checkpoint is complete.
    """

    die_at: int | None = None
    at_save: Callable[[Path, int], None] | None = None


def records() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for length in (5, 9, 7, 12, 6, 8, 11, 10):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return made


def batch_of(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    ids = filled("input_ids", PAD)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": (ids != PAD) * 1}


def keep_all(folder: Path, step: int) -> None:
    """Hard-link a checkpoint, so that it survives its removal by the run."""
    source = folder / f"checkpoint-{step}"
    target = folder.parent / "all" / source.name
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)


class Watch(TrainerCallback):
    """Counts the steps of this process and its file events, and calls ``at_save``."""

    def __init__(self, wishes: Wishes) -> None:
        self.wishes, self.steps, self.events = wishes, 0, 0
        self.counting = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.counting = state.global_step == 2 * EACH

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.wishes.at_save is not None:
            self.wishes.at_save(Path(args.output_dir), state.global_step)

    def hear(self, event: str, arguments: tuple[Any, ...], folder: str) -> None:
        if self.counting and event in EVENTS and str(arguments[0]).startswith(folder):
            if self.events == self.wishes.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.events += 1


def train(folder: Path, facts: Path, begun: Any, wishes: Wishes) -> None:
    """Train in ``folder``, from its last checkpoint if there is one. The results, or the disk's
    error, go into ``facts``."""
    torch.set_num_threads(1)
    gc.freeze()  # every training collects garbage: exclude the imported modules
    warnings.simplefilter("error")
    torch.manual_seed(1)
    model = get_reft_model(llama(), ReftConfig(rank=2, positions="f1+l1", dropout=0.2))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=3, seed=3,
        learning_rate=2e-2, weight_decay=0.01, lr_scheduler_type="cosine", logging_steps=1,
        save_strategy="steps", save_steps=EACH, save_total_limit=2,
        eval_strategy="steps", eval_steps=EACH,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = ReftTrainer(model, arguments, batch_of, records(), eval_dataset=records()[:2])
    watch = Watch(wishes)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    sys.addaudithook(lambda event, said: watch.hear(event, said, str(folder)))
    record: dict[str, Any] = {"from": last_checkpoint(folder)}
    begun.set()
    clock = time.perf_counter()
    try:
        if record["from"] is None:
            try:
                trainer.train(resume_from_checkpoint=True)
            except ValueError as refusal:
                record["refusal"] = str(refusal)
        trainer.train(resume_from_checkpoint=record["from"] is not None)
        trainer.save_adapter(folder / "adapter")
    except OSError as error:
        record["error"] = str(error)
    record["seconds"] = time.perf_counter() - clock
    record |= {"steps": watch.steps, "events": watch.events}
    record["curve"] = [
        {name: row[name] for name in ("step", "loss", "grad_norm", "eval_loss") if name in row}
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    ]
    record["weights"] = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    torch.save(record, facts)


@dataclass
class Run:
    """A run in a folder; each :meth:`go` starts one process of it."""

    folder: Path
    facts: Path
    processes: list[int] = field(default_factory=list)

    def go(self, wishes: Wishes = Wishes(), *, kill_after: float | None = None) -> int:
        """Train until the end or until a kill so many seconds after training began; return the exit
        code, −9 for a killed process."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["small_run"])
        begun = context.Event()
        process = context.Process(target=train, args=(self.folder, self.facts, begun, wishes))
        # The server, which the first process starts, finds its modules by this path.
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            process.start()
        if kill_after is not None:
            assert begun.wait(120)
            time.sleep(kill_after)
            process.kill()
        process.join(120)
        assert process.exitcode is not None
        self.processes.append(process.exitcode)
        return process.exitcode

    def read(self) -> dict[str, Any]:
        return torch.load(self.facts, weights_only=False)
