"""Evaluation of generated tokens, transformers' ``predict_with_generate``, for encoder-decoder and
causal models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from reft.positions import IGNORED
from reft.train.adapter_trainer import AdapterTrainer


class GeneratingTrainer(AdapterTrainer, Seq2SeqTrainer):
    """An :class:`AdapterTrainer` that is a ``Seq2SeqTrainer`` with ``Seq2SeqTrainingArguments`` and
    a ``Trainer`` with any other arguments."""

    def _use_generation_config(self) -> None:
        """Move the ``generation_config`` of the arguments from the wrapper, where Seq2SeqTrainer
        puts it, to the base, where ``generate`` reads it."""
        model, config = self._reft_model(), getattr(self.args, "generation_config", None)
        if config is not None:
            vars(model).pop("generation_config", None)
            base: Any = model.get_base_model()
            base.generation_config = self.load_generation_config(config)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate as Seq2SeqTrainer with ``Seq2SeqTrainingArguments``, otherwise as Trainer.

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
        """Predict as Seq2SeqTrainer or as Trainer, see :meth:`evaluate`."""
        if self._may_generate(gen_kwargs):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        return Trainer.predict(self, test_dataset, ignore_keys, metric_key_prefix)

    def _may_generate(self, gen_kwargs: dict[str, Any]) -> bool:
        if isinstance(self.args, Seq2SeqTrainingArguments):
            return True
        if gen_kwargs:
            raise TypeError(
                f"{', '.join(gen_kwargs)} are arguments of generation, which needs "
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
        """Evaluate a batch as Seq2SeqTrainer with ``predict_with_generate``, otherwise as Trainer.

        A causal model generates from the prompts of the batch, padded on the left. Seq2SeqTrainer
        would pass the answers as well, and the model would generate after them.

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
    """Return the prompts of a padded batch (B, S) without the answers, padded on the left.

    A prompt is the first ``prompt_lengths`` attended tokens, or else the attended tokens before the
    first label that is not −100.

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
    in_prompt = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if lengths is not None:
        length = torch.as_tensor(lengths, device=ids.device).unsqueeze(1)
        in_prompt = in_prompt & (in_prompt.cumsum(1) <= length)
    elif labels is not None and labels.shape == ids.shape:
        in_prompt = in_prompt & ((labels != IGNORED).cumsum(1) == 0)
    width = int(in_prompt.sum(1).max())
    order = in_prompt.int().argsort(dim=1, stable=True)[:, ids.shape[1] - width :]
    # Fields with one entry per token are gathered below or dropped, as the labels are.
    rest = {
        name: value
        for name, value in batch.items()
        if not (isinstance(value, Tensor) and value.shape[:2] == ids.shape)
        and name not in ("labels", "prompt_lengths")
    }
    gathered = {
        name: batch[name].gather(1, order)
        for name in ("input_ids", "token_type_ids")
        if isinstance(batch.get(name), Tensor)
    }
    return {**rest, **gathered, "attention_mask": in_prompt.gather(1, order).long()}
