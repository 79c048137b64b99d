"""What of a :class:`reft.ReftModel` goes to disk and to the hub, and comes from there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack, cast

from torch import Tensor, nn

from reft.model import save_load as storage
from reft.model.hub import push_to_hub
from reft.model.keywords import Loading, Saving

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel


class OnDisk:
    """The part of a :class:`reft.ReftModel` that saves and loads."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        adapter_name: str | None = None,
        training_state: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        **keywords: Unpack[Saving],
    ) -> None:
        """Write an adapter: its configuration, R, W, b and its heads. Without ``training_state``
        also a model card, ``README.md``, unless there is one that somebody wrote or edited.

        Args:
            save_directory: made if missing.
            adapter_name: None for the active one.
            training_state: also what :meth:`restore` needs to go on bit for bit.
            state_dict: this model's (or the base model's) whole state, where an engine that shards
                parameters has gathered it; None to read the parameters.
            keywords: PEFT's and transformers'. ``is_main_process=False`` writes nothing;
                ``selected_adapters``, a list, writes these, all but "default" into folders of
                their names. What has no effect is passed over, see :mod:`reft.model.keywords`.

        Raises:
            OSError, RuntimeError, TypeError, ValueError: it cannot be written, a ``state_dict``
                without all of the adapter, a keyword that is not known or would not be obeyed.
        """
        storage.save(
            _wrapper(self), save_directory, adapter_name, training_state, state_dict, **keywords
        )

    push_to_hub = push_to_hub

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **keywords: Unpack[Loading],
    ) -> ReftModel:
        """Attach an adapter that was saved, in eval mode and frozen unless ``is_trainable``.

        Args:
            path: its folder; a string that names none may be a name on the hub.
            keywords: PEFT's: ``subfolder``, here or on the hub; ``revision``, ``token``,
                ``cache_dir``, ``force_download``, ``local_files_only`` of the hub. Those without
                effect are passed over, see :mod:`reft.model.keywords`.

        Raises:
            OSError, TypeError, ValueError: nothing was changed.
        """
        kind = cast("type[ReftModel]", cls)
        return storage.load_model(kind, base_model, path, adapter_name, is_trainable, **keywords)

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        **keywords: Unpack[Loading],
    ) -> None:
        """Add an adapter that was saved, from where :meth:`from_pretrained` takes one; not active
        unless there is no other.

        Raises:
            OSError, ValueError: nothing was changed.
        """
        storage.load_adapter(_wrapper(self), path, adapter_name, is_trainable, **keywords)

    def restore(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Set an adapter, None for the active one, to what was saved with ``training_state=True``.

        Raises:
            OSError: no such adapter on disk.
            ValueError: another configuration, or it was saved without its training state. Nothing
                was changed.
        """
        storage.restore(_wrapper(self), path, adapter_name)


def _wrapper(part: OnDisk) -> ReftModel:
    """The model of which this is a part."""
    return cast("ReftModel", part)
