"""Calls in progress: what belongs to one is kept for each thread, so that several may call one
model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from reft.model.forward_plan import ForwardPlan
    from reft.model.generation import Generation

#: This library's own arguments of a forward.
OPTIONS = ("prompt_lengths", "adapter_names", "adapter_scales", "edit_positions", "subspaces")


@dataclass(frozen=True, eq=False)
class Options:
    """What a forward of the model was given that its blocks' stack does not see.

    Attributes:
        prompt_lengths: int (B,).
        adapter_names: one a sequence.
        adapter_scales: one number for all or one a sequence.
        edit_positions: see :func:`reft.model.edit_positions.given_columns`; or a function of
            (input_ids, attention_mask) that returns such.
        subspaces: see :mod:`reft.subspaces`; one name, or one entry a sequence.
        labels: those of the base's own arguments.
    """

    prompt_lengths: Tensor | Sequence[int] | None = None
    adapter_names: Sequence[str] | None = None
    adapter_scales: Any = None
    edit_positions: Any = None
    subspaces: Any = None
    labels: Tensor | None = None


class Call:
    """The forward that a thread is in.

    Attributes:
        options: what it was given.
        current: its plan.
        restored: ``current`` is that of an earlier forward, a part of which is run again.
        generation: the generate() that it belongs to.
        disabled: how often the thread has switched adapters off.
        watched: gets the plan of each forward that edits, while somebody asks for them.
    """

    def __init__(self) -> None:
        self.options: Options | None = None
        self.current: ForwardPlan | None = None
        self.restored = False
        self.generation: Generation | None = None
        self.disabled = 0
        self.watched: list[ForwardPlan] | None = None


class Calls(threading.local):
    """One :class:`Call` a thread. A copy has nothing in progress.

    Attributes:
        mine: that of the asking thread. What changes lies one step below the thread's own
            attributes, whose changes Dynamo does not follow.
    """

    def __init__(self) -> None:
        self.mine = Call()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()


class Running:
    """Which threads are in a forward of one model, or generate with it. A copy has none."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.generations: list[Generation] = []

    def elsewhere(self) -> bool:
        """Whether another thread is in one. A thread that ended in the middle of one is not."""
        alive = {thread.ident for thread in threading.enumerate()}
        found = {*self.threads.copy(), *(one.thread for one in self.generations.copy())}
        return bool(found & alive - {threading.get_ident()})

    def check(self, what: str) -> None:
        """Refuse what a forward in progress would be mixed up by.

        Raises:
            RuntimeError: there is one in another thread.
        """
        if self.elsewhere():
            raise RuntimeError(
                f"{what} while another thread calls this model would change its call in the "
                "middle; wait until that is over, or give each thread a model of its own "
                "(copy.deepcopy)"
            )

    def __reduce__(self) -> tuple[type[Running], tuple[()]]:
        return Running, ()
