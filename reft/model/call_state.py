"""The state of the calls in progress, one for each thread, so that several may call one model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reft.model.forward_plan import ForwardPlan
from reft.model.generation import Generation

#: Arguments of a forward that this library adds to the base model's.
OPTIONS = ("prompt_lengths", "adapter_names", "adapter_scales", "edit_positions", "subspaces")


@dataclass(frozen=True, eq=False)
class ForwardOptions:
    """Arguments of a forward of the model that its stack of blocks does not get.

    Attributes:
        prompt_lengths: int (B,), prompt tokens of each sequence.
        adapter_names: one name per sequence.
        adapter_scales: one factor for all sequences, or one per sequence.
        edit_positions: see :func:`reft.model.edit_positions.given_columns`; or a function of
            (input_ids, attention_mask) that returns such a value.
        subspaces: see :mod:`reft.subspaces`; one name, or one entry per sequence.
        labels: the base model's own argument.
    """

    prompt_lengths: Tensor | Sequence[int] | None = None
    adapter_names: Sequence[str] | None = None
    adapter_scales: Any = None
    edit_positions: Any = None
    subspaces: Any = None
    labels: Tensor | None = None


class CallState:
    """The forward that a thread runs.

    Attributes:
        options: arguments of the forward; None outside a forward of the model.
        plan: the forward's plan.
        restored: ``plan`` belongs to an earlier forward, a part of which runs again in backward.
        generation: the ``generate`` that the forward belongs to.
        disabled: depth of nested ``disable_adapter`` contexts in this thread.
        watched: collects the plans of forwards that edit, while a caller wants them.
    """

    def __init__(self) -> None:
        self.options: ForwardOptions | None = None
        self.plan: ForwardPlan | None = None
        self.restored = False
        self.generation: Generation | None = None
        self.disabled = 0
        self.watched: list[ForwardPlan] | None = None


class ThreadCallState(threading.local):
    """One :class:`CallState` per thread. A copy starts with no call in progress.

    Attributes:
        current: the state of the calling thread. It is an object of its own because Dynamo does
            not follow changes of a ``threading.local``'s attributes.
    """

    def __init__(self) -> None:
        self.current = CallState()

    def __reduce__(self) -> tuple[type[ThreadCallState], tuple[()]]:
        return ThreadCallState, ()


class ActiveThreads:
    """The threads that run a forward of one model or generate with it. A copy starts empty.

    Attributes:
        threads: identifiers of threads inside a forward.
        generations: the generations in progress.
    """

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.generations: list[Generation] = []

    def others(self) -> bool:
        """Whether another living thread is active."""
        alive = {thread.ident for thread in threading.enumerate()}
        active = {
            *self.threads.copy(),
            *(generation.thread for generation in self.generations.copy()),
        }
        return bool(active & alive - {threading.get_ident()})

    def check_alone(self, action: str) -> None:
        """Refuse an action that would change the model during another thread's forward.

        Args:
            action: what the caller wants to do, as the subject of the message.

        Raises:
            RuntimeError: another thread is active.
        """
        if self.others():
            raise RuntimeError(
                f"{action} would change the model while another thread calls it; wait until that "
                "call ends, or give each thread its own model (copy.deepcopy)"
            )

    def __reduce__(self) -> tuple[type[ActiveThreads], tuple[()]]:
        return ActiveThreads, ()
