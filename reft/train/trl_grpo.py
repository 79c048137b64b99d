"""TRL's ``GRPOTrainer`` for a wrapped model, in its own module because importing it loads much more
than TRL's other trainers."""

from __future__ import annotations

import copy
from typing import Any

from reft.absent import lacks_trl

try:
    from trl import GRPOConfig, GRPOTrainer
except (ImportError, RuntimeError) as error:  # TRL raises RuntimeError for its own missing imports
    raise lacks_trl(error) from error

from reft.model.reft_model import ReftModel
from reft.train.reference_model import ReferenceModel
from reft.train.trl_base import TrlReferenceTrainer, check_reference, check_trl_arguments

#: Options of GRPO that generate with something else than this model.
_OTHER_GENERATORS = ("use_vllm", "use_transformers_continuous_batching")
#: Options of GRPO that make a dialogue of several turns one completion.
_DIALOGUES = ("tools", "environment_factory", "rollout_func")


class ReftGRPOTrainer(TrlReferenceTrainer, GRPOTrainer):
    """:class:`trl.GRPOTrainer` for a :class:`reft.ReftModel`, with the same arguments.

    It generates with :meth:`reft.ReftModel.generate`. With ``beta`` above 0 the reference is the
    model with its present adapter, and checkpoints hold that adapter.

    Raises:
        TypeError: the model is not a ReftModel.
        ValueError: a ``peft_config``; ``sync_ref_model``; PEFT's layers in the base together with a
            reference; completions that are generated elsewhere (``use_vllm``,
            ``use_transformers_continuous_batching``) or hold several turns (``tools``,
            ``environment_factory``, ``rollout_func``).
    """

    def __init__(
        self, model: ReftModel, reward_funcs: Any = None, args: Any = None, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        check_trl_arguments(name, model, args, kwargs)
        for option in _OTHER_GENERATORS:
            if getattr(args, option, False):
                raise ValueError(
                    f"{option} must be False: {name} generates with ReftModel.generate, which "
                    "edits prompts as the loss does"
                )
        for option in _DIALOGUES:
            if kwargs.get(option):
                raise ValueError(
                    f"{option} must be None: a completion of several turns is generated from "
                    "several prompts, and the loss edits only the first of them"
                )
        args = GRPOConfig("grpo") if args is None else copy.copy(args)
        # With a beta above 0 TRL would load a second base model as reference.
        beta, args.beta = args.beta, 0.0
        if beta:
            check_reference(model, args)
            self._reference = ReferenceModel(model)
        super().__init__(model, reward_funcs=reward_funcs, args=args, **kwargs)
        self.beta = args.beta = beta
        if self._reference is not None:
            self.ref_model = self._reference  # type: ignore[assignment]

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_dropout():
            return super()._prepare_inputs(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        model, base = self._wrapper, self._wrapper.get_base_model()

        def generate(*inputs: Any, **options: Any) -> Any:
            del base.generate  # the wrapper's generate calls the method of the base
            try:
                return model.generate(*inputs, **options)
            finally:
                base.generate = generate  # type: ignore[assignment]

        base.generate = generate  # type: ignore[assignment]
        try:
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            del base.generate
