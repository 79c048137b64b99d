"""Evaluation by generated answers, as transformers' ``Seq2SeqTrainer`` has it, beside evaluation by
logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from reft.model.prompts import IGNORED
from reft.train.adapter_trainer import AdapterTrainer


class GeneratingTrainer(AdapterTrainer, Seq2SeqTrainer):
    """An :class:`AdapterTrainer` that generates where its arguments are
    ``Seq2SeqTrainingArguments`` and say so, and is transformers' ``Trainer`` with any others."""

    def _use_generation_config(self) -> None:
        """Seq2SeqTrainer has put the configuration of the arguments on the wrapper; ``generate``
        reads the base's."""
        model, given = self._reft_model(), getattr(self.args, "generation_config", None)
        if given is not None:
            vars(model).pop("generation_config", None)
            base: Any = model.get_base_model()
            base.generation_config = self.load_generation_config(given)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """As Seq2SeqTrainer's with its arguments, else as Trainer's, without ``gen_kwargs``.

        Raises:
            TypeError: ``gen_kwargs`` without Seq2SeqTrainingArguments.
        """
        if self._may_generate(gen_kwargs):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        return Trainer.evaluate(self, eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> Any:
        """As :meth:`evaluate`."""
        if self._may_generate(gen_kwargs):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        return Trainer.predict(self, test_dataset, ignore_keys, metric_key_prefix)

    def _may_generate(self, gen_kwargs: dict[str, Any]) -> bool:
        if isinstance(self.args, Seq2SeqTrainingArguments):
            return True
        if gen_kwargs:
            raise TypeError(
                f"{', '.join(gen_kwargs)} are of generation, which needs "
                "Seq2SeqTrainingArguments(predict_with_generate=True)"
            )
        return False

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """As Seq2SeqTrainer's where answers are generated, else as Trainer's.

        A causal model gets the prompts of the batch alone, padded on the left, where
        Seq2SeqTrainer would let it go on behind the answers.

        Raises:
            ValueError: sequences that are packed into one row.
        """
        if prediction_loss_only or not getattr(self.args, "predict_with_generate", False):
            return Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
        config: Any = self._reft_model().config
        if getattr(config, "is_encoder_decoder", False) or "input_ids" not in inputs:
            return super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs
            )
        loss, labels = None, inputs.get("labels")
        if labels is not None:
            loss, _, _ = Trainer.prediction_step(self, model, inputs, True, ignore_keys)
        _, tokens, _ = super().prediction_step(
            model, prompts_of(inputs), prediction_loss_only, ignore_keys, **gen_kwargs
        )
        return loss, tokens, labels


def prompts_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts of a padded batch, (B, S), alone and padded on the left: what is attended and
    lies before the first label that is not −100, or is counted by ``prompt_lengths``.

    Raises:
        ValueError: a batch of sequences that are packed into one row.
    """
    if batch.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "predict_with_generate needs padded batches: leave padding_free out of the collator"
        )
    ids: Tensor = batch["input_ids"]
    mask, labels, lengths = (
        batch.get(name) for name in ("attention_mask", "labels", "prompt_lengths")
    )
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if lengths is not None:
        counted = torch.as_tensor(lengths, device=ids.device).unsqueeze(1)
        kept = kept & (kept.cumsum(1) <= counted)
    elif labels is not None and labels.shape == ids.shape:
        kept = kept & ((labels != IGNORED).cumsum(1) == 0)
    width = int(kept.sum(1).max())
    order = kept.int().argsort(dim=1, stable=True)[:, ids.shape[1] - width :]
    # What has an entry a token goes by these columns or, as the labels, not at all.
    rest = {
        name: value
        for name, value in batch.items()
        if not (isinstance(value, Tensor) and value.shape[:2] == ids.shape)
        and name not in ("labels", "prompt_lengths")
    }
    moved = {
        name: batch[name].gather(1, order)
        for name in ("input_ids", "token_type_ids")
        if isinstance(batch.get(name), Tensor)
    }
    return {**rest, **moved, "attention_mask": kept.gather(1, order).long()}
