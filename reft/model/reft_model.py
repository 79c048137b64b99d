"""``ReftModel``: a transformers model with ReFT adapters, used like a ``PeftModel``.

A forward runs through five files: this one, ``hooks`` (the call's options and its plan),
``planner`` (which adapters edit which rows with which weights), ``edit_hook`` (the edit after a
block) and ``reft_kernels.functional`` (the operator).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Unpack

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn

from reft.adapter.parameter_counts import count_parameters, print_parameters
from reft.adapter.pool import AdapterPool
from reft.adapter.state_dict import unshare_memory
from reft.adapter.untrained import mark_untrained
from reft.config import ReftConfig
from reft.foreign_names import WRAPPING, refusing_foreign_keywords
from reft.io.adapter_files import read_adapter
from reft.model import activation_checkpointing, peft_compat, save_load
from reft.model.adapters import PoolHost, attach, build, detach, detach_all, with_both_ends
from reft.model.arguments import check_base, check_config, check_mode
from reft.model.base_methods import put_on_base
from reft.model.batch import one_name
from reft.model.blocks import find_blocks
from reft.model.cached_edits import reuse_cache
from reft.model.continuous_batching import ContinuousBatching
from reft.model.distributed import broadcast_adapters
from reft.model.end_tokens import stop_at_ends
from reft.model.generate_arguments import capture
from reft.model.guidance import guided
from reft.model.hooks import Forget, ForgetPlan, MakePlan, TakeOptions, extended_signature
from reft.model.hub import local_folder, push_adapter
from reft.model.keywords import Loading, Saving, check_saving, names_to_save, place_of
from reft.model.origins import origin_of
from reft.model.pipelines import announce
from reft.model.prompts import image_token
from reft.model.registry import SUBMODULE, AdapterRegistry
from reft.model.trl_guard import RefusesTrl

logger = logging.getLogger(__name__)


@refusing_foreign_keywords(WRAPPING)
def get_reft_model(
    base_model: nn.Module,
    config: ReftConfig,
    adapter_name: str = "default",
    *,
    generator: torch.Generator | None = None,
) -> ReftModel:
    """Freeze a model and attach a new, active and trainable adapter to it.

    Args:
        base_model: a transformers model, or one in PEFT's wrapper. It is changed in place until
            :meth:`ReftModel.unload`. PEFT's own adapters in it, such as LoRA, stay trainable.
        config: the configuration of the adapter.
        adapter_name: its name.
        generator: the source of randomness for the initialisation. None uses the global one, and
            ``ReftTrainer`` then initialises the adapter again from its seed.

    Raises:
        TypeError, ValueError: the model, configuration or name does not fit. Nothing was changed.
    """
    check_base(base_model)
    check_config(config, adapter_name)
    model = ReftModel(base_model, config.block_path)
    try:
        model.add_adapter(adapter_name, config, generator=generator)
        model.set_adapter(adapter_name)
    except BaseException:
        model.unload()
        raise
    return model


class ReftModel(ContinuousBatching, RefusesTrl, nn.Module):
    """A base model and its adapters. Use :func:`get_reft_model` or :meth:`from_pretrained`.

    Its forward takes the base model's arguments and five more keywords:

    - ``prompt_lengths``: int (B,), prompt tokens of each sequence;
    - ``adapter_names``: one per sequence, "__base__" for none;
    - ``adapter_scales``: a factor of the edits, one for all or one per sequence;
    - ``edit_positions``: the tokens to edit instead of the configuration's, see
      :func:`reft.model.edit_positions.given_columns`;
    - ``subspaces``: named parts of the edit, see :mod:`reft.subspaces`.

    Other attributes are looked up in the base model.

    Attributes:
        base_model: the model; its submodule ``reft`` holds the adapters.
    """

    base_model: nn.Module
    peft_config = peft_compat.Config()

    def __init__(self, base_model: nn.Module, block_path: str | None = None) -> None:
        super().__init__()
        check_base(base_model, block_path)
        if isinstance(base_model, ReftModel) or hasattr(base_model, SUBMODULE):
            raise ValueError(
                f"base_model must not have adapters (an attribute {SUBMODULE!r}) yet, got "
                f"{type(base_model).__name__} with one; use add_adapter, or unload() first"
            )
        inner = peft_compat.transformers_model(base_model)
        blocks = find_blocks(inner, block_path)
        can_generate = getattr(inner, "can_generate", None)
        self.base_model = base_model
        self._frozen = peft_compat.freeze(inner)
        generates = can_generate is not None and can_generate()
        registry = AdapterRegistry(
            blocks,
            causal=generates and blocks.side != "encoder",
            image_token=image_token(base_model),
        )
        registry.pool = AdapterPool(PoolHost(registry, origin_of(inner)))
        inner.add_module(SUBMODULE, registry)
        self._handles = [
            *peft_compat.register(
                peft_compat.outer(base_model),
                lambda module: TakeOptions(registry, module, module is base_model),
                Forget(registry),
            ),
            *peft_compat.register(
                peft_compat.callers(base_model, blocks.stack),
                lambda module: MakePlan(registry, blocks.stack),
                ForgetPlan(registry),
            ),
            *put_on_base(self),
        ]
        self.register_state_dict_post_hook(unshare_memory)  # type: ignore[no-untyped-call]
        announce(type(self).__name__)
        registry.train(base_model.training)
        self.training = base_model.training
        # On the instance: each base has its own signature, and Trainer reads it.
        forward = functools.partial(ReftModel.forward, self)
        forward.__signature__ = extended_signature(base_model)  # type: ignore[attr-defined]
        self.forward = forward  # type: ignore[method-assign]

    # ---------------------------------------------------------------- calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base model's forward with the edits of the adapters."""
        return self.base_model(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        prompt_lengths: Tensor | Sequence[int] | None = None,
        adapter_names: Sequence[str] | None = None,
        adapter_scales: Any = None,
        edit_positions: Any = None,
        subspaces: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model's ``generate`` with edits in the prompt.

        The prompt is the input, or its first ``prompt_lengths`` tokens. It is edited while it is
        read, in one forward or in chunks. A decoding step edits nothing, unless positions are "all"
        or "prompt+g<n>". Generation also stops at the end tokens that adapters were trained with.

        Args:
            prompt_lengths: int (B,), before beam search repeats sequences.
            adapter_names: one per sequence, before beams; "__base__" for none. The adapters are
                looked up now: replacing one later does not affect this generation.
            adapter_scales: a factor of the edits, one for all or one per sequence.
            edit_positions: tokens of the prompt to edit instead of the configuration's, see
                :func:`reft.model.edit_positions.given_columns`; or a function of
                (input_ids, attention_mask) that returns them.
            subspaces: a name of the adapter's ``subspaces``; or for each sequence a name, several
                names, or None for the whole edit.

        Raises:
            TypeError, ValueError: an argument does not fit the prompt or the adapters.
        """
        base, registry = self.base_model, self._registry
        generation = capture(
            registry, base, args, kwargs,
            prompt_lengths=prompt_lengths, adapter_names=adapter_names,
            adapter_scales=adapter_scales, edit_positions=edit_positions, subspaces=subspaces,
        )  # fmt: skip
        reuse_cache(registry, generation, kwargs)
        args, kwargs = stop_at_ends(registry, base, generation, args, kwargs)
        with (
            registry.generating(generation),
            guided(base, registry, generation, args, kwargs, edit_positions) as kwargs,
        ):
            return base.generate(*args, **kwargs)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable activation checkpointing, without gradients for blocks below the first edit."""
        activation_checkpointing.enable(
            self.base_model, "gradient_checkpointing_enable", args, kwargs
        )

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Do the same under the name that transformers 5.24 prefers."""
        activation_checkpointing.enable(
            self.base_model, "activation_checkpointing_enable", args, kwargs
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return peft_compat.attribute(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """Return the transformers model without PEFT's wrapper. Adapters stay attached until
        :meth:`unload`."""
        return peft_compat.transformers_model(self.base_model)

    @property
    def _registry(self) -> AdapterRegistry:
        registry = self.get_base_model()._modules.get(SUBMODULE)
        if not isinstance(registry, AdapterRegistry):
            raise RuntimeError("this ReftModel has no adapters: it was unloaded")
        return registry

    # ---------------------------------------------------------------- adapters

    @property
    def configs(self) -> dict[str, ReftConfig]:
        """The configuration of each adapter by name."""
        registry = self._registry
        return {name: registry.adapter(name).config for name in registry.adapters}

    @property
    def pool(self) -> AdapterPool:
        """Adapters for inference: thousands in host memory, a bounded number on the device."""
        return self._registry.pool

    @property
    def active_adapter(self) -> str | None:
        """The adapter that forwards use; None if there is none."""
        return self._registry.active

    @property
    def active_adapters(self) -> list[str]:
        """:attr:`active_adapter` as a list."""
        return [] if self.active_adapter is None else [self.active_adapter]

    def add_adapter(
        self,
        adapter_name: str,
        config: ReftConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add a new adapter, frozen and not active; :meth:`set_adapter` activates it.

        A model that is compiled already does not use it: add adapters before compiling.

        Raises:
            TypeError: ``config`` is not a ReftConfig.
            ValueError: the name is taken or not allowed, or the configuration does not fit the
                model. Nothing was changed.
        """
        check_config(config, adapter_name)
        registry, base = self._registry, self.get_base_model()
        config = with_both_ends(registry, base, config)
        adapter, modules = build(registry, base, adapter_name, config, generator)
        attach(registry, base, adapter_name, adapter, modules)
        if generator is None:
            mark_untrained(adapter)  # a Trainer may initialise it again from its seed

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Activate an adapter. It becomes the only trainable one.

        Args:
            adapter_name: its name.
            inference_mode: leave it frozen.

        Raises:
            TypeError, ValueError: there is no such adapter, or several are named.
        """
        check_mode(inference_mode)
        registry, adapter_name = self._registry, one_name(adapter_name)
        registry.adapter(adapter_name)
        if not registry.disabled:
            registry.activate_modules(self.get_base_model(), adapter_name)
        registry.active = adapter_name
        for name in registry.adapters:
            trained = name == adapter_name and not inference_mode
            registry.adapter(name).requires_grad_(trained)
            for module in registry.modules_to_save.modules_of(self.get_base_model(), name).values():
                module.requires_grad_(trained)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the oldest of the others becomes active, frozen.

        Raises:
            ValueError: there is no such adapter.
        """
        registry, adapter_name = self._registry, one_name(adapter_name)
        registry.adapter(adapter_name)
        detach(registry, self.get_base_model(), adapter_name)
        if registry.active == adapter_name:
            registry.active = None
            for other in registry.adapters:
                logger.warning("adapter %r was active; now %r is", adapter_name, other)
                self.set_adapter(other, inference_mode=True)
                break

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model computes exactly what its base does, ``modules_to_save`` included.

        The context may be nested. Like ``torch.no_grad``, it holds for the thread that enters it.
        """
        with self._registry.disabling(self.get_base_model()):
            yield

    def unload(self) -> nn.Module:
        """Detach all adapters and return the base model as it was, with its ``requires_grad``."""
        registry, inner = self._registry, self.get_base_model()
        registry.active_threads.check_alone("unload()")
        detach_all(registry, inner, self._handles)
        activation_checkpointing.forget_plans(self.base_model)
        for name, parameter in inner.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(True)
        return self.base_model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            NotImplementedError: always, with the reason.
        """
        raise NotImplementedError(
            "a ReFT adapter cannot be merged: it edits hidden vectors at chosen tokens, and no "
            "change of the weights, which act on every token alike, does the same. unload() gives "
            "the base back"
        )

    merge_adapter = merge_and_unload

    # ---------------------------------------------------------------- saving and loading

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        adapter_name: str | None = None,
        training_state: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        **keywords: Unpack[Saving],
    ) -> None:
        """Write an adapter: its configuration, R, W, b and ``modules_to_save``; PEFT's adapters in
        the base, if any; and a model card, ``README.md``.

        Args:
            save_directory: made if missing.
            adapter_name: None for the active one.
            training_state: write what :meth:`restore` needs to resume bit for bit, and no card. A
                card that somebody wrote or edited is never overwritten.
            state_dict: the full state dict of this model or of the base model, if an engine that
                shards parameters has gathered it; None to read the parameters.
            keywords: PEFT's and transformers'. ``is_main_process=False`` writes nothing;
                ``selected_adapters``, a list, writes these adapters, all but "default" into
                subfolders of their names. Keywords without effect are ignored, see
                :mod:`reft.model.keywords`.

        Raises:
            OSError, RuntimeError, TypeError, ValueError: the adapter cannot be written,
                ``state_dict`` lacks some of it, or a keyword is unknown or unsupported.
        """
        check_saving("save_pretrained", keywords)
        registry, selected = self._registry, keywords.get("selected_adapters")
        names = names_to_save(selected, adapter_name)
        save_load.save_adapters(
            registry,
            self.base_model,
            save_directory,
            [save_load.name_or_active(registry, name) for name in names],
            subfolders=selected is not None,
            training_state=training_state,
            state_dict=state_dict,
            is_main_process=keywords.get("is_main_process", True),
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter_name: str | None = None,
        commit_message: str = "Upload adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload an adapter to the hub: what :meth:`save_pretrained` writes, never the base model.

        A model card in the repository is kept unless this library wrote it.

        Args:
            repo_id: "name" or "namespace/name"; the repository is created if it does not exist.
            adapter_name: None for the active one.
            commit_message: message of the commit.
            commit_description: description of the commit.
            private: visibility of a new repository; None for the account's default.
            token: token of the hub; None or True for the one that is logged in.
            revision: branch to upload to, created if it does not exist; None for "main".
            create_pr: open a pull request instead.

        Returns:
            The commit, with its address and that of the pull request.

        Raises:
            ValueError: there is no such adapter. Nothing was uploaded.
            OSError: the hub refused, or cannot be reached.
        """
        name = save_load.name_or_active(self._registry, adapter_name)
        return push_adapter(
            self._registry, self.base_model, name, repo_id,
            private=private, token=token, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        base_model: nn.Module,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **keywords: Unpack[Loading],
    ) -> ReftModel:
        """Attach a saved adapter to a model, in eval mode and frozen unless ``is_trainable``.

        Args:
            base_model: a transformers model, or one in PEFT's wrapper; changed in place.
            path: the adapter's folder; a string that names no folder may be a name on the hub.
            adapter_name: the name that the adapter gets.
            is_trainable: leave the model in its mode and make the adapter trainable.
            keywords: PEFT's: ``subfolder``, locally or on the hub; ``revision``, ``token``,
                ``cache_dir``, ``force_download``, ``local_files_only`` for the hub. Keywords
                without effect are ignored, see :mod:`reft.model.keywords`.

        Raises:
            OSError, TypeError, ValueError: nothing was changed.
        """
        check_base(base_model)
        folder = local_folder(path, **place_of("from_pretrained", keywords))
        config, _ = read_adapter(folder)
        model = cls(base_model, config.block_path)
        try:
            model.load_adapter(folder, adapter_name, is_trainable)
        except BaseException:
            model.unload()
            raise
        return model if is_trainable else model.eval()

    def load_adapter(
        self,
        path: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        **keywords: Unpack[Loading],
    ) -> None:
        """Add a saved adapter; active only if there is no other. See :meth:`from_pretrained`.

        Raises:
            OSError, TypeError, ValueError: nothing was changed.
        """
        folder = local_folder(path, **place_of("load_adapter", keywords))
        save_load.load_adapter(self._registry, self.get_base_model(), folder, adapter_name)
        if self.active_adapter is None:
            self.set_adapter(adapter_name, inference_mode=not is_trainable)

    def restore(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Set an adapter, None for the active one, to what was saved with ``training_state=True``.

        Raises:
            OSError: there is no adapter in this folder.
            ValueError: it has another configuration, or was saved without its training state.
                Nothing was changed.
        """
        name = save_load.name_or_active(self._registry, adapter_name)
        save_load.restore_adapter(self._registry, self.get_base_model(), path, name)

    # ---------------------------------------------------------------- reports

    def broadcast_adapters(self, source: int = 0, group: Any = None) -> None:
        """Give every rank the adapters, and all other trainable parameters, of one rank.

        Every rank must call this, before an engine shards the model. If ranks initialised their
        adapters from different seeds, they would train different adapters, and FSDP2 would mix
        them; DDP broadcasts by itself. Values that are equal already are not written. Outside
        torch.distributed nothing happens.

        Args:
            source: the global rank whose values are sent.
            group: the ranks that take part; None for all.

        Raises:
            RuntimeError: the adapter is sharded already. Nothing was changed.
        """
        broadcast_adapters(self, source, group)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count (trainable parameters, all parameters), adapters included."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print :meth:`get_nb_trainable_parameters` in PEFT's format."""
        print_parameters(*self.get_nb_trainable_parameters())

    def orthonormality_error(self) -> float:
        """Compute max |R Rᵀ − I| over all adapters with an orthonormal R; 0.0 without any."""
        registry = self._registry
        errors = [registry.adapter(name).orthonormality_error() for name in registry.adapters]
        return max(errors, default=0.0)
