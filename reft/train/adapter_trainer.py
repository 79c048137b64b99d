"""Base class of all trainers: checkpoints hold the adapter without the base, and a resumed run
continues bit for bit."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reft.adapter.parameters import AdapterParameters
from reft.adapter.sharding import full_tensor
from reft.model.end_tokens import learn_ends
from reft.model.reft_model import ReftModel
from reft.train import checkpoints, deepspeed, fsdp2, run_settings
from reft.train.answer_checks import CheckedCollator, edits_depend_on_prompt
from reft.train.lora_checkpoints import read_lora, set_lora
from reft.train.seeded_init import initialise_from_seed
from reft.train.training_checks import FirstBatchCheck, recorded_plans, require_trainable

logger = logging.getLogger(__name__)


class AdapterTrainer(Trainer):
    """A Trainer that decays, saves and restores adapters.

    Subclasses may override :meth:`_reft_model`, which returns the wrapped model, and may have one
    of TRL's trainers as a further base.

    Attributes:
        steps_trained: optimizer steps of the last :meth:`train`, without the steps before the
            checkpoint from which it resumed.
    """

    steps_trained = 0
    _stage: Path | None = None
    _first_batch: FirstBatchCheck
    _resumed: str | None = None
    _changed: set[str]
    _settings: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first_batch, self._changed = FirstBatchCheck(), set()
        initialise_from_seed(self._reft_model(), self.args.seed)

    def _reft_model(self) -> ReftModel:
        model: ReftModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters with weight decay: Trainer's, without the coordinates of R.

        The rows of R have length 1 for all coordinates. Decay would not shrink them, it would only
        pull R back to its initialisation.
        """
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
        """Train as Trainer does, and write checkpoints that are complete or not there.

        Every rank begins with the adapter of rank 0. Under an engine that shards parameters the
        adapter is restored before it is sharded. A new run in a folder with checkpoints warns.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last checkpoint in
                ``args.output_dir``.
            args: Trainer's further arguments.
            allow_changes: resume from a checkpoint of a run with other data, another learning rate
                or the like, or with more steps than this run has. Otherwise that is refused.
            kwargs: Trainer's further arguments.

        Returns:
            Trainer's result.

        Raises:
            ValueError: there is no complete checkpoint to resume from; it is a published adapter;
                it belongs to a run with other settings; it was written with DeepSpeed and this run
                is without, or vice versa; a file in it is damaged, holds code, which is never run,
                or NaN; or the model has no trainable parameters. Nothing was changed. At the first
                batch: no example has a token that is edited.
            OSError: checkpoints could not be written.
        """
        path = resume_from_checkpoint
        if path is True:
            last = checkpoints.last_checkpoint(str(self.args.output_dir))
            if last is None:
                raise ValueError(
                    f"there is no whole checkpoint to resume from in {self.args.output_dir}"
                )
            path = str(last)
        steps_before, self._changed, self._settings = 0, set(), None
        self._resumed = os.fspath(path) if path else None
        if self._resumed is not None:
            path = self._resumed
            checkpoints.require_checkpoint(path)
            deepspeed.check_checkpoint(path, self.is_deepspeed_enabled)
            checkpoints.check_states(path)
            self._changed = run_settings.check_resumed(self, path, allow_changes)
            steps_before = run_settings.state_of(path).get("global_step", 0)
        if self.model_init is None:
            self._require_trainable()
        if self.args.should_save and self.args.save_strategy != "no":
            checkpoints.prepare(Path(str(self.args.output_dir)), is_new_run=not path)
        if self.model_init is None:
            self._prepare_model()
        self._first_batch = FirstBatchCheck()
        result = super().train(path, *args, **kwargs)
        self.steps_trained = self.state.global_step - steps_before
        if not self.steps_trained:
            logger.warning(
                "no step was trained: %s",
                f"{path} has all {steps_before} steps of this run already; increase max_steps or "
                "num_train_epochs"
                if path
                else "the training data gave no batch",
            )
        return result

    def _hp_search_setup(self, trial: Any) -> None:
        """Set a trial up as Trainer does, then check and prepare the model of ``model_init``: it
        exists now, and no engine has wrapped it yet."""
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self._require_trainable()
            self._prepare_model()

    def _require_trainable(self) -> None:
        given_optimizer = None if self._is_sharded() else self.optimizer
        require_trainable(self._reft_model(), given_optimizer)

    def _prepare_model(self) -> None:
        """Prepare the adapter before an engine wraps the model."""
        model = self._reft_model()
        initialise_from_seed(model, self.args.seed)
        learn_ends(model._registry, model.get_base_model(), self._trained_end_tokens())
        if self._resumed and self._is_sharded():
            self._restore(self._resumed)
        fsdp2.before_training(model, self)

    def _trained_end_tokens(self) -> list[int]:
        """Return the token ids that end completions in the training data, as far as known."""
        return []

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Create a data loader that refuses sequences with several answers."""
        plain = self.data_collator
        if edits_depend_on_prompt(self._reft_model()):
            self._set_signature_columns_if_needed()  # reads attributes of the collator
            self.data_collator = CheckedCollator(plain)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = plain

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch as Trainer does; check at the first batch that tokens are edited.

        Raises:
            ValueError: neither the first batch nor other data has an edited token.
        """
        if self._first_batch.passed:
            return super().training_step(model, inputs, *args, **kwargs)
        wrapper = self._reft_model()
        with recorded_plans(wrapper, model) as plans:
            try:
                loss = super().training_step(model, inputs, *args, **kwargs)
            except RuntimeError as error:
                if "does not require grad" in str(error):  # autograd's error for no edited token
                    self._first_batch.check(self, wrapper, model, inputs, plans)
                raise
        self._first_batch.check(self, wrapper, model, inputs, plans)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter as Trainer saves a model; of a sharded model, only the trainable
        parameters and buffers are gathered."""
        model = self._reft_model()
        if not (fsdp2.is_sharded(model) or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self._gathered(model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter in its published format, with PEFT's adapters beside it.

        Every rank must call this.
        """
        model = self._reft_model()
        sharded = fsdp2.is_sharded(model) or self.is_deepspeed_enabled
        state = self._gathered(model) if sharded else None
        if self.args.should_save:
            model.save_pretrained(folder, state_dict=state)
        self.accelerator.wait_for_everyone()

    def _gathered(self, model: ReftModel) -> dict[str, Tensor]:
        read = deepspeed.full_precision if self.is_deepspeed_enabled else full_tensor
        return fsdp2.gather_trainable(model, read)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as Trainer does.

        Raises:
            ValueError: an engine that splits prompts across ranks or replaces edited modules.
        """
        super().create_accelerator_and_postprocess()
        deepspeed.check_parallelism(self.accelerator)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create the scheduler as Trainer does, and exclude the base from DeepSpeed's checkpoints:
        at this point the engine exists and no checkpoint has been loaded."""
        deepspeed.exclude_base(self.accelerator)
        return super().create_scheduler(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch as Trainer does, or none if all steps are done.

        Trainer checks the number of steps only after a step, so that resuming a finished run would
        train one more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint as Trainer does, complete or not at all.

        Raises:
            OSError: it cannot be written; earlier checkpoints are unchanged.
        """
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writes, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with checkpoints.atomic_checkpoint(run, name, writes=writes, wait=wait) as stage:
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
        """Return Trainer's folder, or the staging folder while a checkpoint is written."""
        return super()._get_output_dir(trial) if self._stage is None else str(self._stage)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint as Trainer does, but not from the staging folder."""
        if self._stage is None:
            super()._push_from_checkpoint(checkpoint_folder)

    # Trainer's methods would write the whole base into every checkpoint of FSDP2. The adapter's
    # optimizer state is small: it is gathered into one file, under every engine but DeepSpeed, so
    # that any number of ranks can resume from it, sharded or not.

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
                "%s has no %s, as with save_only_model=True: training continues from its adapter, "
                "and the missing state begins anew",
                checkpoint,
                " and no ".join(missing),
            )
        requested = run_settings.optimizer_settings(self.optimizer)
        if OPTIMIZER_NAME not in missing:
            state = checkpoints.read_state(files[OPTIMIZER_NAME])
            fsdp2.scatter_optimizer(self.optimizer, state)
        if SCHEDULER_NAME not in missing:
            self.lr_scheduler.load_state_dict(checkpoints.read_state(files[SCHEDULER_NAME]))
        run_settings.apply_changes(self.optimizer, self.lr_scheduler, requested, self._changed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter and the tokenizer, never the base model."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        # Under an engine that shards parameters, all ranks have gathered the state dict before.
        self._reft_model().save_pretrained(
            folder, training_state=is_checkpoint, state_dict=state_dict or None
        )
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str | os.PathLike[str], model: nn.Module | None = None
    ) -> None:
        if not self._is_sharded():
            self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # the base point of R has not changed since
            super()._load_best_model()
        else:
            self._restore(str(self.state.best_model_checkpoint))

    def _restore(self, checkpoint: str | os.PathLike[str]) -> None:
        """Restore the adapter and PEFT's adapters from a checkpoint, both or neither."""
        model = self._reft_model()
        lora = read_lora(model, checkpoint)
        model.restore(checkpoint)
        set_lora(model, lora)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: Trainer's draft describes a whole model and would replace the adapter's own
        model card."""


def require_reft_model(model: object, trainer: str) -> None:
    """Raise TypeError if ``model`` is not a :class:`reft.ReftModel`."""
    if not isinstance(model, ReftModel):
        raise TypeError(
            f"{trainer} trains a ReftModel, from reft.get_reft_model(base_model, config); got "
            f"{type(model).__name__}"
        )
