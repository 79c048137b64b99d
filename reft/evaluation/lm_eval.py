"""A model for lm-evaluation-harness that passes the end of each prompt to the wrapped model.

The harness scores a continuation by one forward of context and continuation, without an attention
mask and without labels. Its model ``hf`` also runs wrapped models, but nothing marks the end of the
context: the whole row with its padding becomes the prompt, and "l7" edits the end of the
continuation. The model ``reft`` passes ``prompt_lengths``.

Importing this module registers the name; ``python -m reft.evaluation`` is the harness's command
line with this model.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from torch import Tensor
from tqdm import tqdm

from reft.model.reft_model import ReftModel

logger = logging.getLogger(__name__)

#: ((context, continuation) as text, or None; tokens of the context; tokens of the continuation)
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("reft")
class ReftLM(HFLM):
    """``HFLM`` for a :class:`reft.ReftModel`, with the same arguments and ``reft``.

    The prompt is the context of each request. The prompt of a rolling request is only the token
    that the harness puts before each window, so that positions at the ends of a prompt hardly edit.

    Args:
        pretrained: a ReftModel; or a base model, as a module, a folder or a name on the Hub.
        reft: the adapter's folder or name on the Hub; None with a ReftModel.
        kwargs: further arguments of ``HFLM``.

    Raises:
        ValueError: no adapter, or two; or a model that is not causal.
    """

    def __init__(
        self, pretrained: Any, reft: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> None:
        if isinstance(pretrained, ReftModel) != (reft is None):
            raise ValueError(
                "reft must name the adapter of a base model, and be None for a ReftModel; got "
                f"pretrained of type {type(pretrained).__name__} and reft={reft!r}"
            )
        self._adapter = reft
        if reft is not None and not isinstance(pretrained, str):
            pretrained = ReftModel.from_pretrained(pretrained, reft)
        super().__init__(pretrained, **kwargs)
        if self.backend != "causal":
            raise ValueError(f'the model "reft" scores causal models, got a {self.backend} one')

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        assert self._adapter is not None
        self._model = ReftModel.from_pretrained(self.model, self._adapter)

    def get_model_info(self) -> dict[str, Any]:
        """Return ``HFLM``'s information with the adapter and its configuration."""
        config = self.model.configs.get(self.model.active_adapter)
        return {
            **super().get_model_info(),
            "reft": None if self._adapter is None else os.fspath(self._adapter),
            "reft_config": None if config is None else config.to_dict(),
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[_Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, whether it is the greedy one) per request.

        Requests that differ only in their last token share a forward. ``HFLM`` also shares it
        between requests that split the same tokens elsewhere; their prompts differ.

        Raises:
            ValueError: a request without context or continuation, or with a continuation longer
                than the model's limit.
        """
        sharing: dict[Any, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            sharing[_forward_inputs(request)].append(index)
        longest_first = sorted(sharing, key=lambda key: (-len(key[0]) - len(key[1]), key))
        firsts = [requests[sharing[key][0]] for key in longest_first]
        size, schedule = self.batch_size, None
        if size == "auto":
            size = override_bs or 0
            if not override_bs and firsts:
                self.batch_sizes: dict[int, int] = {}  # forget the sizes of earlier requests
                schedule = self._batch_scheduler
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        for batch in Collator.get_chunks(firsts, n=size, fn=schedule):
            for request, logits in zip(batch, self._continuation_logits(batch), strict=True):
                scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
                greedy = scores.argmax(dim=-1)
                for index in sharing[_forward_inputs(request)]:
                    text, _, continuation = requests[index]
                    target = torch.tensor(continuation, device=scores.device)
                    total = scores.gather(1, target.unsqueeze(1)).sum()
                    results[index] = float(total), bool((greedy == target).all())
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, results[index])
                    bar.update(1)
        bar.close()
        return results

    def _continuation_logits(self, batch: Sequence[_Request]) -> list[Tensor]:
        """Return the logits that predict each continuation, each (its tokens, vocabulary)."""
        rows, lengths = [], []
        for _, context, continuation in batch:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a request must have a context and 1 … {self.max_length} tokens to score; got "
                    f"{len(context)} and {len(continuation)} tokens"
                )
            tokens = context + continuation
            if len(tokens) > self.max_length + 1:
                logger.warning(
                    "context and continuation have %d + %d tokens and max_length is %d; the "
                    "context is cut from the left",
                    len(context),
                    len(continuation),
                    self.max_length,
                )
            rows.append(torch.tensor(tokens[-(self.max_length + 1) : -1], dtype=torch.long))
            lengths.append(len(rows[-1]) - len(continuation) + 1)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ends = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < ends.unsqueeze(1)
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            logits = self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.long().to(self.device),
                prompt_lengths=torch.tensor(lengths, device=self.device),
            ).logits
        return [
            row[length - 1 : end]
            for row, length, end in zip(logits, lengths, ends.tolist(), strict=True)
        ]


def _forward_inputs(request: _Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that a forward reads for a request, all but the last, which is only
    predicted."""
    _, context, continuation = request
    return tuple(context), tuple(continuation[:-1])
