"""Checks that a run can change the adapter: trainable parameters, and data with edited tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from reft.adapter.host_adapter import HostAdapter
from reft.model import peft_compat as peft_base
from reft.model.forward_plan import ForwardPlan
from reft.model.reft_model import ReftModel
from reft.positions import IGNORED
from reft.train.data_samples import preserve_random_state, spread_indices

logger = logging.getLogger(__name__)

#: How many examples are searched for an edited token before training is refused.
MAX_EXAMPLES = 64


# ---------------------------------------------------------------- parameters


def require_trainable(model: ReftModel, optimizer: Any = None) -> None:
    """Refuse a run without trainable parameters.

    Args:
        model: the wrapped model.
        optimizer: the user's own optimizer, or None if the Trainer creates it.

    Raises:
        ValueError: no adapter is active; neither the active adapter, nor its modules_to_save, nor
            PEFT's layers require a gradient; or the optimizer holds none of these parameters.
    """
    name = model.active_adapter
    if name is None:
        raise ValueError(
            "nothing would be trained, no adapter is active: model.set_adapter(name) activates "
            "an adapter, model.add_adapter(name, config) adds one"
        )
    edits, other = _trainable_parameters(model)
    if not edits and not other:
        raise ValueError(
            f"nothing would be trained, adapter {name!r} is frozen: load it with "
            f"is_trainable=True, or call model.set_adapter({name!r})"
        )
    if optimizer is not None:
        optimized = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        if optimized.isdisjoint(map(id, [*edits, *other])):
            raise ValueError(
                "nothing would be trained, the optimizer holds no trainable parameter of the "
                "model: create it from the ReftModel's parameters, or let the Trainer create it"
            )
    if not edits:
        logger.warning(
            "the edits of adapter %r are frozen: only modules_to_save and PEFT's layers are "
            "trained",
            name,
        )


def _trainable_parameters(model: ReftModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable parameters of the active adapter's edits, and all others: those of its
    modules_to_save and of PEFT's layers."""
    registry, base, name = model._registry, model.get_base_model(), model.active_adapter
    assert name is not None
    edits = _requiring_grad(registry.adapter(name))
    modules = list(registry.modules_to_save.modules_of(base, name).values())
    other = [parameter for module in modules for parameter in _requiring_grad(module)]
    if peft_base.has_layers(base):
        registered = {id(parameter) for parameter in registry.parameters()}
        other += [tensor for tensor in _requiring_grad(base) if id(tensor) not in registered]
    return edits, other


def _requiring_grad(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# ---------------------------------------------------------------- the first batch


@contextmanager
def recorded_plans(wrapper: ReftModel, model: nn.Module) -> Iterator[list[ForwardPlan]]:
    """Collect the edit plan of each forward inside; compiled modules run uncompiled.

    Args:
        wrapper: the model that holds the adapters.
        model: the module that the Trainer calls, the wrapper or a module around or inside it.
    """
    call = wrapper._registry.call
    plans: list[ForwardPlan] = []
    before, call.watched = call.watched, plans
    try:
        with _uncompiled(model):
            yield plans
    finally:
        call.watched = before


def _uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    compiled = any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class FirstBatchCheck:
    """Check that the first batch of a run has an edited token, or that a later one may have.

    Attributes:
        passed: whether the check is over, and training continues.
    """

    def __init__(self) -> None:
        self.passed = False
        self._examples = 0

    def check(
        self,
        trainer: Trainer,
        wrapper: ReftModel,
        model: nn.Module,
        inputs: Any,
        plans: list[ForwardPlan],
    ) -> None:
        """Let training continue, or refuse it. Every rank must call this; all decide alike.

        Args:
            trainer: the Trainer whose data are searched if this batch has no edited token.
            wrapper: the wrapped model that is trained.
            model: the module that the Trainer calls.
            inputs: the batch.
            plans: the plans of its forwards, see :func:`recorded_plans`.

        Raises:
            ValueError: no example that was searched has an edited token. Nothing was changed.
        """
        if _on_any_rank(trainer, _edits_trained(plans)):
            self.passed = True
            if not _has_targets(inputs):
                logger.warning(
                    "every label of the first batch is -100, so that it trains nothing: check that "
                    "examples have completions, and that these are not cut off"
                )
            return
        reason = explain_no_edits(wrapper, inputs)
        _, other = _trainable_parameters(wrapper)
        if other:
            self.passed = True
            logger.warning(
                "the first batch trains modules_to_save or PEFT's layers and no edit: %s",
                reason,
            )
            return
        if _is_indexable(trainer.train_dataset):
            may_edit = _on_any_rank(trainer, _others_edit(trainer, wrapper, model))
            self.passed = may_edit
        else:  # the rest of a stream cannot be sampled
            self._examples += trainer.get_total_train_batch_size(trainer.args)
            may_edit = self._examples < MAX_EXAMPLES
        if not may_edit:
            model.zero_grad()
            raise ValueError(f"nothing would be trained by the training data: {reason}")
        logger.warning("the first batch trains nothing: %s. Other batches do, or may", reason)


def _edits_trained(plans: Sequence[ForwardPlan]) -> bool:
    """Return whether a forward with gradients edits a token with trainable parameters."""
    return any(
        plan.recorded
        and not isinstance(adapter.source, HostAdapter)
        and any(parameter.requires_grad for parameter in adapter.source.parameters())
        and any(bool((group >= 0).any()) for group in rows)
        for plan in plans
        for adapter, rows in zip(plan.adapters, plan.rows, strict=True)
    )


def _has_targets(inputs: Any) -> bool:
    """Return whether the loss counts any label; True for a batch without labels of tokens."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return True
    return bool((labels != IGNORED).any())


def _others_edit(trainer: Trainer, wrapper: ReftModel, model: nn.Module) -> bool:
    """Return whether a sample of the training data has an edited token."""
    data: Any = trainer.train_dataset
    collate: Any = trainer.data_collator
    if hasattr(data, "column_names"):  # a data set of the library datasets
        data = trainer._remove_unused_columns(data, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    size = max(1, trainer._train_batch_size)
    indices = spread_indices(len(data), MAX_EXAMPLES)
    with preserve_random_state(trainer.args.device), torch.no_grad():
        for begin in range(0, len(indices), size):
            batch = collate([data[index] for index in indices[begin : begin + size]])
            names = batch.get("adapter_names") if isinstance(batch, Mapping) else None
            is_candidate = names is None or wrapper.active_adapter in names
            autocast = trainer.compute_loss_context_manager()
            with recorded_plans(wrapper, model) as plans, autocast:
                trainer.compute_loss(model, trainer._prepare_inputs(batch))
            edits = [edit for plan in plans for site in plan.edits.values() for edit in site]
            has_edit = is_candidate and any(bool((edit.rows.rows >= 0).any()) for edit in edits)
            # All ranks stop together, so that each calls the model equally often.
            if _on_any_rank(trainer, has_edit):
                return True
    return False


def _is_indexable(data: Any) -> bool:
    return isinstance(data, Sized) and hasattr(data, "__getitem__")


def _on_any_rank(trainer: Trainer, condition: bool) -> bool:
    flag = torch.tensor([int(condition)], device=trainer.accelerator.device)
    gathered: Tensor = trainer.accelerator.gather(flag)
    return bool(gathered.any())


# ---------------------------------------------------------------- the reason


def explain_no_edits(model: ReftModel, inputs: Any) -> str:
    """Return why no token of a batch is edited, and what to do about it."""
    registry, name = model._registry, model.active_adapter
    assert name is not None
    if registry.disabled:
        return "adapters are switched off, inside disable_adapter(); train outside of it"
    batch: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
    config = model.configs[name]
    if batch.get("adapter_names") is not None:
        return f"check adapter_names, {name!r} is the adapter that is trained"
    if batch.get("edit_positions") is not None:
        return "edit_positions are empty; give each example at least one token"
    if config.positions == "image":
        return 'positions="image" edits image tokens, and the examples hold none'
    longest = _longest_prompt(batch, registry.causal)
    if registry.causal and registry.blocks.side == "decoder" and longest == 0:
        longest = 1  # the decoder start token
    if longest == 0 and batch.get("prompt_lengths") is not None:
        return "prompt_lengths are all 0; give the number of prompt tokens of each example"
    if longest == 0 and registry.causal:
        return (
            "the labels count from the first token on, so that there is no prompt and no token is "
            "edited. Labels of the prompt must be -100: train on records of prompt and completion "
            "with reft.ReftDataCollator (in TRL on the columns prompt and completion, or on "
            "messages with assistant_only_loss=True), not on plain text or with "
            "DataCollatorForLanguageModeling"
        )
    if longest:
        return (
            f"the longest prompt has {longest} token(s), too short for positions "
            f"{config.positions!r} with short_prompts={config.short_prompts!r}; check "
            'that examples hold their prompts, or choose positions "prompt" or '
            'short_prompts="paper"'
        )
    return (
        f"positions {config.positions!r} select no attended token of a prompt; check that "
        "examples have prompts, with labels of -100, and an attention_mask that is not all 0"
    )


def _longest_prompt(batch: Mapping[str, Any], causal: bool) -> int | None:
    """Return the tokens of the longest prompt of a padded batch, None if the batch has neither
    lengths, labels nor a mask."""
    lengths, labels = batch.get("prompt_lengths"), batch.get("labels")
    if lengths is not None:
        return max(map(int, lengths), default=0)
    mask = batch.get("attention_mask")
    if causal and isinstance(labels, Tensor) and labels.ndim == 2:
        before = (labels != IGNORED).cumsum(1) == 0
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            before = before & mask.to(labels.device).bool()
        return int(before.sum(1).max())
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.sum(1).max()) or None
    return None
