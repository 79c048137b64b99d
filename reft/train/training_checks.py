"""Whether a run can change anything: what it trains, and whether its data have an edited token."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft.model import peft_compat as peft_base
from reft.model.forward_plan import ForwardPlan
from reft.model.prompts import IGNORED
from reft.model.reft_model import ReftModel
from reft.train.data_samples import kept_random_state

if TYPE_CHECKING:
    from reft.train.adapter_trainer import AdapterTrainer

logger = logging.getLogger(__name__)

#: So many examples are looked at before a run is stopped.
LOOKED_AT = 64


# ---------------------------------------------------------------- parameters


def require_trained(model: ReftModel, optimizer: Any = None) -> None:
    """Refuse a run that has nothing to train.

    Args:
        optimizer: one that was made by hand; None for the one that the Trainer makes.

    Raises:
        ValueError: no adapter is active; neither it nor a head of its own nor a layer of PEFT's
            requires a gradient; the optimizer has none of them.
    """
    name = model.active_adapter
    if name is None:
        raise ValueError(
            "nothing would be trained, no adapter is active: model.set_adapter(name) activates "
            "one, model.add_adapter(name, config) makes one"
        )
    edits, beside = _trained(model)
    if not edits and not beside:
        raise ValueError(
            f"nothing would be trained, adapter {name!r} is frozen: load it with "
            f"is_trainable=True, or call model.set_adapter({name!r})"
        )
    if optimizer is not None:
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        if held.isdisjoint(map(id, [*edits, *beside])):
            raise ValueError(
                "nothing would be trained, the optimizer holds no parameter that requires a "
                "gradient: make it of those of the ReftModel, or leave it to the Trainer"
            )
    if not edits:
        logger.warning(
            "the edits of adapter %r are not trained, they are frozen; modules beside them are",
            name,
        )


def _trained(model: ReftModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What requires a gradient: of the active adapter's edits; of its heads and PEFT's layers."""
    registry, base, name = model._registry, model.get_base_model(), model.active_adapter
    assert name is not None
    edits = [one for one in registry.adapter(name).parameters() if one.requires_grad]
    modules = list(registry.heads.modules_of(base, name).values())
    beside = [one for part in modules for one in part.parameters() if one.requires_grad]
    if peft_base.has_layers(base):
        own = {id(one) for one in registry.parameters()}
        beside += [one for one in base.parameters() if one.requires_grad and id(one) not in own]
    return edits, beside


# ---------------------------------------------------------------- the first batch


@contextmanager
def watched(wrapper: ReftModel, model: nn.Module) -> Iterator[list[ForwardPlan]]:
    """Gather the plans of the forwards inside; what was compiled runs as it was written.

    Args:
        wrapper: whose adapters are asked about.
        model: what is called.
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
        one._compiled_call_impl is not None or "_orig_mod" in one._modules
        for one in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class FirstBatch:
    """Looks at the first batch of a run, and no further where it has an edited token.

    Attributes:
        seen: whether the run goes on whatever comes.
    """

    def __init__(self) -> None:
        self.seen = False
        self._examples = 0

    def check(
        self, trainer: AdapterTrainer, model: nn.Module, inputs: Any, plans: list[ForwardPlan]
    ) -> None:
        """Go on, or refuse to. All ranks do the same; to be called by each of them.

        Args:
            model: as the Trainer calls it.
            inputs: the batch.
            plans: of its forwards.

        Raises:
            ValueError: no example that was looked at has an edited token. Nothing was changed.
        """
        if _on_any_rank(trainer, _edits_trained(plans)):
            self.seen = True
            if not _has_targets(inputs):
                logger.warning(
                    "every label of the first batch is -100, so that it trains nothing: check that "
                    "examples have completions, and that these are not cut off"
                )
            return
        wrapper = trainer._reft_model()
        reason = why_nothing(wrapper, inputs)
        _, beside = _trained(wrapper)
        if beside:
            self.seen = True
            logger.warning(
                "the first batch trains modules beside the edits and no edit: %s",
                reason,
            )
            return
        if _can_be_picked(trainer.train_dataset):
            goes_on = _on_any_rank(trainer, _others_edit(trainer, model))
            self.seen = goes_on
        else:  # what comes next can only be waited for
            self._examples += trainer.get_total_train_batch_size(trainer.args)
            goes_on = self._examples < LOOKED_AT
        if not goes_on:
            model.zero_grad()
            raise ValueError(f"nothing would be trained by the training data: {reason}")
        logger.warning("the first batch trains nothing: %s. Other batches do, or may", reason)


def _edits_trained(plans: Sequence[ForwardPlan]) -> bool:
    """Whether a forward with gradients edits a token by parameters that are trained."""
    return any(
        plan.recorded
        and any(one.requires_grad for one in member.adapter.parameters())
        and any(bool((rows >= 0).any()) for rows in member.rows)
        for plan in plans
        for member in plan.members
    )


def _has_targets(inputs: Any) -> bool:
    """Whether a loss counts any label; where a batch has none to look at, it may."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return True
    return bool((labels != IGNORED).any())


def _others_edit(trainer: AdapterTrainer, model: nn.Module) -> bool:
    """Whether a token of other examples, from all over the training data, is edited."""
    data: Any = trainer.train_dataset
    collate: Any = trainer.data_collator
    if hasattr(data, "column_names"):  # of the library datasets
        data = trainer._remove_unused_columns(data, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    size, wrapper = max(1, trainer._train_batch_size), trainer._reft_model()
    places = spread_places(len(data), LOOKED_AT)
    with kept_random_state(trainer.args.device), torch.no_grad():
        for begin in range(0, len(places), size):
            batch = collate([data[place] for place in places[begin : begin + size]])
            names = batch.get("adapter_names") if isinstance(batch, Mapping) else None
            candidate = names is None or wrapper.active_adapter in names
            autocast = trainer.compute_loss_context_manager()
            with watched(wrapper, model) as plans, autocast:
                trainer.compute_loss(model, trainer._prepare_inputs(batch))
            edits = [one for plan in plans for site in plan.edits.values() for one in site]
            found = candidate and any(bool((one.rows.rows >= 0).any()) for one in edits)
            if _on_any_rank(trainer, found):  # together, so that all of them call the model alike
                return True
    return False


def spread_places(length: int, most: int) -> list[int]:
    """At most so many places of a sequence, from all over it, in order."""
    count = min(length, most)
    return [place * length // count for place in range(count)]


def _can_be_picked(data: Any) -> bool:
    return isinstance(data, Sized) and hasattr(data, "__getitem__")


def _on_any_rank(trainer: AdapterTrainer, found: bool) -> bool:
    flag = torch.tensor([int(found)], device=trainer.accelerator.device)
    gathered: Tensor = trainer.accelerator.gather(flag)
    return bool(gathered.any())


# ---------------------------------------------------------------- the reason


def why_nothing(model: ReftModel, inputs: Any) -> str:
    """Why no token of a batch is edited, and what to do."""
    registry, name = model._registry, model.active_adapter
    assert name is not None
    if registry.disabled:
        return "adapters are switched off, inside disable_adapter(); train outside of it"
    batch: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
    config = model.configs[name]
    if batch.get("adapter_names") is not None:
        return f"check adapter_names, {name!r} is the adapter that is trained"
    if batch.get("edit_positions") is not None:
        return "edit_positions name none; give each example at least one token"
    if config.positions == "image":
        return 'positions "image" edit image tokens, and the examples hold none'
    longest = _longest_prompt(batch, registry.causal)
    if registry.causal and registry.sites.side == "decoder" and longest == 0:
        longest = 1  # the token that a decoder starts from
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
        f"positions {config.positions!r} fall on no attended token of a prompt; check that "
        "examples have prompts, with labels of -100, and an attention_mask that is not all 0"
    )


def _longest_prompt(batch: Mapping[str, Any], causal: bool) -> int | None:
    """Tokens of the longest prompt of a padded batch; None where the batch does not tell."""
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
