"""What any Trainer, transformers' or TRL's, has to know of a model with adapters: checkpoints hold
them and no base model, and a resumed run continues bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reft.model.reft_model import ReftModel
from reft.nn.bank import Bank
from reft.nn.shards import whole
from reft.train import checkpoints, deepspeed, fsdp2
from reft.train.answers import ChecksAnswers
from reft.train.lora import read_lora, save_lora, set_lora


class AdapterTrainer(ChecksAnswers):
    """A Trainer that decays, saves and restores adapters. Made for subclasses, which say by
    :meth:`_reft_model` whose they are, and for TRL's trainers beside it among their bases."""

    _stage: Path | None = None

    def _reft_model(self) -> ReftModel:
        model: ReftModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, without the coordinates of orthonormal R: the rows of R have length 1
        wherever these go, so that decay would shrink nothing and only drag R back to its start."""
        coordinates = {
            f"{path}.free" for path, module in model.named_modules() if isinstance(module, Bank)
        }
        return [
            name for name in super().get_decay_parameter_names(model) if name not in coordinates
        ]

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's. Under an engine that shards parameters the adapter is restored before it
        does: the base point of R is no parameter, so that no engine's own checkpoint has it. And
        every rank begins with the adapter of rank 0. A run that is begun anew in a folder with
        checkpoints warns of them.

        Raises:
            ValueError: no whole checkpoint to resume from, where that is asked for; one of
                DeepSpeed's without it, or another one under it; a file in it that is damaged, holds
                code, which is never run, or NaN. Nothing was changed.
            OSError: checkpoints could not be written.
        """
        path = resume_from_checkpoint
        if path is True:
            found = checkpoints.last_checkpoint(str(self.args.output_dir))
            if found is None:
                raise ValueError(
                    f"there is no whole checkpoint to resume from in {self.args.output_dir}"
                )
            path = str(found)
        if path and isinstance(path, str):
            deepspeed.check_checkpoint(path, self.is_deepspeed_enabled)
            checkpoints.check_states(path)
            if self._is_sharded():
                self._restore(path)
        if self.args.should_save and self.args.save_strategy != "no":
            checkpoints.prepare(Path(str(self.args.output_dir)), anew=not path)
        fsdp2.before_training(self._reft_model(), self)
        return super().train(path, *args, **kwargs)

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. Of a sharded model what is trained is gathered and no more."""
        model = self._reft_model()
        if not (fsdp2.is_sharded(model) or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self._gathered(model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter as it is published, and nothing else; to be called by every rank."""
        model = self._reft_model()
        sharded = fsdp2.is_sharded(model) or self.is_deepspeed_enabled
        state = self._gathered(model) if sharded else None
        if self.args.should_save:
            model.save_pretrained(folder, state_dict=state)
        self.accelerator.wait_for_everyone()

    def _gathered(self, model: ReftModel) -> dict[str, Tensor]:
        read = deepspeed.precise if self.is_deepspeed_enabled else whole
        return fsdp2.gather_trained(model, read)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's.

        Raises:
            ValueError: an engine under which a rank has some of the tokens of a prompt.
        """
        super().create_accelerator_and_postprocess()
        deepspeed.refuse_parts(self.accelerator)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. It is made between engine and checkpoint: there DeepSpeed is told what
        checkpoints hold."""
        deepspeed.leave_out_base(self.accelerator)
        return super().create_scheduler(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; but a run that was killed behind its last step has none left, where
        Trainer's looks at the number of steps after it has taken one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's; the checkpoint is there whole or not at all.

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
        """
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writes, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with checkpoints.written_whole(run, name, writes=writes, wait=wait) as stage:
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            if self.state.best_model_checkpoint == str(stage / name):
                self.state.best_model_checkpoint = str(run / name)
                if writes:
                    self.state.save_to_json(str(stage / name / TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if writes:
            checkpoints.rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        """Of a checkpoint that is being written, the folder where it is."""
        return super()._get_output_dir(trial) if self._stage is None else str(self._stage)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, of a checkpoint that has its name."""
        if self._stage is None:
            super()._push_from_checkpoint(checkpoint_folder)

    # Trainer's own would write the whole base into every checkpoint of FSDP2. The adapter's states
    # are small: of every engine that leaves it to us they are gathered into the files that one
    # process writes, so that any number of ranks may go on from them, sharded or not.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.lr_scheduler is not None
        optimizer = fsdp2.gather_optimizer(self.optimizer)
        if self.args.should_save:
            torch.save(optimizer, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None
        optimizer, scheduler = (
            checkpoints.read_state(Path(checkpoint) / name)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        fsdp2.scatter_optimizer(self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(scheduler)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter and the tokenizer, never the base model."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        # An engine that shards parameters has gathered them; every rank was needed for that.
        self._reft_model().save_pretrained(
            folder, training_state=checkpoint, state_dict=state_dict or None
        )
        save_lora(self._reft_model(), folder, state_dict or None)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str | os.PathLike[str], model: nn.Module | None = None
    ) -> None:
        if not self._is_sharded():
            self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # the base point is still that of this run
            super()._load_best_model()
        else:
            self._restore(str(self.state.best_model_checkpoint))

    def _restore(self, checkpoint: str | os.PathLike[str]) -> None:
        """Of a checkpoint the adapter and PEFT's, both or neither."""
        model = self._reft_model()
        lora = read_lora(model, checkpoint)
        model.restore(checkpoint)
        set_lora(model, lora)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the card that was saved with the adapter stays, where Trainer's draft, of a
        whole model, would replace it."""


def require_reft_model(model: object, trainer: str) -> None:
    """Raise TypeError if this is no :class:`reft.ReftModel`."""
    if not isinstance(model, ReftModel):
        raise TypeError(
            f"{trainer} trains a ReftModel, from reft.get_reft_model(base_model, config); got "
            f"{type(model).__name__}"
        )
