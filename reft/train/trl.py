"""TRL's ``SFTTrainer`` and ``DPOTrainer`` for a wrapped model.

TRL puts a fused language-model head into the ``forward`` of the model that it is given. So it is
given the transformers model inside the wrapper, on which the edits are, and the labels that it
hands to that forward tell where prompts end.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

try:
    from trl import DPOTrainer, SFTTrainer
except (ImportError, RuntimeError) as error:  # TRL makes a RuntimeError of what it lacks itself
    text = "these trainers need TRL: pip install 'reft[trl]'"
    if getattr(error, "name", None) != "trl":
        text += f" (what is there cannot be imported: {str(error).splitlines()[-1]})"
    raise ImportError(text) from error

from reft.model import peft_base
from reft.model.attachment import SUBMODULE
from reft.model.reft_model import ReftModel
from reft.train.adapter_trainer import AdapterTrainer, require_reft_model


class _OnBase(AdapterTrainer):
    """What TRL's trainers need: the base for TRL, the wrapper for what is written to disk."""

    def __init__(self, model: ReftModel, *args: Any, **kwargs: Any) -> None:
        require_reft_model(model, type(self).__name__)
        self._wrapper = model
        super().__init__(model.get_base_model(), *args, **kwargs)

    def _reft_model(self) -> ReftModel:
        return self._wrapper


class ReftSFTTrainer(_OnBase, SFTTrainer):
    """:class:`trl.SFTTrainer` for a :class:`reft.ReftModel`, with the same arguments.

    Prompts end where the labels begin: with prompts and completions, or with TRL's assistant masks.
    On plain text, which is all labels, no token is a prompt, and ends of it edit nothing.

    Raises:
        TypeError: the model is not a ReftModel.
    """


class ReftDPOTrainer(_OnBase, DPOTrainer):
    """:class:`trl.DPOTrainer` for a :class:`reft.ReftModel`, with the same arguments but
    ``ref_model``: the reference is the same model with its adapter switched off.

    Raises:
        TypeError: the model is not a ReftModel, or a ``ref_model`` is given.
        ValueError: PEFT trains layers in the base, which the reference would have too.
    """

    def __init__(self, model: ReftModel, args: Any = None, **kwargs: Any) -> None:
        if kwargs.pop("ref_model", None) is not None:
            raise TypeError(
                "ref_model must be None: the reference is the model with its adapter switched off"
            )
        require_reft_model(model, type(self).__name__)
        if peft_base.has_layers(model.get_base_model()):
            raise ValueError(
                "model must have no layers of PEFT in its base: the reference, the model without "
                "edits, would keep them while they are trained. Merge them into the base first"
            )
        super().__init__(model, ref_model=Reference(model), args=args, **kwargs)


class Reference(nn.Module):
    """A model with its adapter switched off, as a module without parameters of its own."""

    def __init__(self, model: ReftModel) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: who moves or prepares the reference leaves the
        # model alone.
        self._model = (model,)

    @property
    def config(self) -> Any:
        """The base's."""
        return self._model[0].config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward. Whatever is put around :attr:`forward` is in the base's already."""
        (model,) = self._model
        with model.disable_adapter():
            return model.get_base_model()(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same."""
        return self(*args, **kwargs)

    def state_dict(self, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The base's, without adapters: by it TRL tells one reference from another."""
        (model,) = self._model
        with model.disable_adapter():
            state = model.get_base_model().state_dict()
        return {name: one for name, one in state.items() if not name.startswith(f"{SUBMODULE}.")}
