"""What any Trainer, transformers' or TRL's, has to know of a model with adapters: checkpoints hold
them and no base model, and a resumed run continues bit for bit."""

from __future__ import annotations

import logging
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

from reft.adapter.parameters import AdapterParameters
from reft.adapter.sharding import whole
from reft.model.ends import learn_ends
from reft.model.reft_model import ReftModel
from reft.train import checkpoints, deepspeed, fsdp2, run_settings
from reft.train.answer_checks import ChecksAnswers
from reft.train.lora_checkpoints import read_lora, set_lora
from reft.train.seeded_init import draw_from_seed
from reft.train.training_checks import FirstBatch, require_trained, watched

logger = logging.getLogger(__name__)


class AdapterTrainer(ChecksAnswers):
    """A Trainer that decays, saves and restores adapters. Made for subclasses, which say by
    :meth:`_reft_model` whose they are, and for TRL's trainers beside it among their bases.

    Attributes:
        steps_trained: optimizer steps of the last :meth:`train`, without those before a checkpoint
            that it went on from.
    """

    steps_trained = 0
    _stage: Path | None = None
    _first: FirstBatch
    _resumed: str | None = None
    _changed: set[str]
    _settings: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first, self._changed = FirstBatch(), set()
        draw_from_seed(self._reft_model(), self.args.seed)

    def _reft_model(self) -> ReftModel:
        model: ReftModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, without the coordinates of orthonormal R: the rows of R have length 1
        wherever these go, so that decay would shrink nothing and only drag R back to its start."""
        coordinates = {
            f"{path}.free"
            for path, module in model.named_modules()
            if isinstance(module, AdapterParameters)
        }
        return [
            name for name in super().get_decay_parameter_names(model) if name not in coordinates
        ]

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        allow_changes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Train as Trainer does. Under an engine that shards parameters the adapter is restored
        before it does. Every rank begins with the adapter of rank 0. A run that is begun anew in a
        folder with checkpoints warns of them.

        Args:
            resume_from_checkpoint: as Trainer's.
            allow_changes: go on from a checkpoint of a run with other data, another learning rate
                or the like, or with more steps than this one has. Otherwise that is refused.

        Raises:
            ValueError: no whole checkpoint to resume from, where that is asked for, or an adapter
                as it is published; a checkpoint of another run; one of DeepSpeed's without it, or
                another one under it; a file in it that is damaged, holds code, which is never run,
                or NaN; no adapter that is trained. Nothing was changed. At the first batch: none
                of the data has a token that is edited.
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
        done, self._changed, self._settings = 0, set(), None
        self._resumed = os.fspath(path) if path else None
        if self._resumed is not None:
            path = self._resumed
            checkpoints.require_checkpoint(path)
            deepspeed.check_checkpoint(path, self.is_deepspeed_enabled)
            checkpoints.check_states(path)
            self._changed = run_settings.check_resumed(self, path, allow_changes)
            done = run_settings.state_of(path).get("global_step", 0)
        if self.model_init is None:
            self._require_trained()
        if self.args.should_save and self.args.save_strategy != "no":
            checkpoints.prepare(Path(str(self.args.output_dir)), anew=not path)
        if self.model_init is None:
            self._begin()
        self._first = FirstBatch()
        result = super().train(path, *args, **kwargs)
        self.steps_trained = self.state.global_step - done
        if not self.steps_trained:
            logger.warning(
                "no step was trained: %s",
                f"{path} has all {done} steps of this run already; give it more with max_steps or "
                "num_train_epochs"
                if path
                else "the training data gave no batch",
            )
        return result

    def _hp_search_setup(self, trial: Any) -> None:
        """As Trainer's. What ``model_init`` has made is there by now, and no engine has it yet."""
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self._require_trained()
            self._begin()

    def _require_trained(self) -> None:
        by_hand = None if self._is_sharded() else self.optimizer
        require_trained(self._reft_model(), by_hand)

    def _begin(self) -> None:
        """What a model needs before an engine has it."""
        model = self._reft_model()
        draw_from_seed(model, self.args.seed)
        learn_ends(model._registry, model.get_base_model(), self._taught_ends())
        if self._resumed and self._is_sharded():
            self._restore(self._resumed)
        fsdp2.before_training(model, self)

    def _taught_ends(self) -> list[int]:
        """The tokens that completions are trained to end with, as far as this trainer knows."""
        return []

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's. The first batch must have a token that is edited.

        Raises:
            ValueError: neither it nor other data has one.
        """
        if self._first.seen:
            return super().training_step(model, inputs, *args, **kwargs)
        with watched(self._reft_model(), model) as plans:
            try:
                loss = super().training_step(model, inputs, *args, **kwargs)
            except RuntimeError as error:
                if "does not require grad" in str(error):  # autograd's word for the same
                    self._first.check(self, model, inputs, plans)
                raise
        self._first.check(self, model, inputs, plans)
        return loss

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
        """Write the adapter as it is published, and LoRA beside it; to be called by every
        rank."""
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
            if writes:
                if self._settings is None:
                    self._settings = run_settings.settings_of(self)
                run_settings.write(stage / name, self._settings)
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
        assert self.lr_scheduler is not None and self.optimizer is not None
        files = {name: Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME)}
        missing = [name for name, file in files.items() if not file.exists()]
        if missing:
            logger.warning(
                "%s has no %s, as with save_only_model=True: training goes on from its adapter, "
                "and what is missing begins anew",
                checkpoint,
                " and no ".join(missing),
            )
        asked = run_settings.rates_of(self.optimizer)
        if OPTIMIZER_NAME not in missing:
            state = checkpoints.read_state(files[OPTIMIZER_NAME])
            fsdp2.scatter_optimizer(self.optimizer, state)
        if SCHEDULER_NAME not in missing:
            self.lr_scheduler.load_state_dict(checkpoints.read_state(files[SCHEDULER_NAME]))
        run_settings.set_rates(self.optimizer, self.lr_scheduler, asked, self._changed)

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
