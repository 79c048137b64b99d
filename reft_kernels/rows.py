"""Row plans: which rows an edit touches, and which parameters edit each of them.

The operator sees ``hidden`` of any leading shape as N rows of D. A :class:`RowPlan` lists n of
them, group by group: rows ``offsets[k] : offsets[k + 1]`` are edited with the parameters of group
k. This one index expresses tied positions, untied prefix and suffix weights, and several adapters
in one batch.

A plan may also have ``slots``, for a table of many adapters of which a batch uses a few. Group k is
then edited with entry ``slots[k]`` of the table.

``-1`` means "no row here". With it, short prompts have the shape of long ones, and nothing asks the
device how many rows there are: no host synchronisation, static shapes, graphs can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

IntArray = Tensor | Sequence[int]
_INT_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

#: Largest number of rows in one batched product: they stay in a processor's cache.
MAX_RUN_ROWS = 1024


class Place:
    """The rows of one group for gather and scatter, always m of them, with −1 replaced.

    A −1 borrows the group's largest row and later writes the values of that row again. A group
    without any row borrows row 0 and writes it back unchanged.

    Attributes:
        rows: int64 (m,), all valid; borrowed rows are repeated.
    """

    __slots__ = ("_anchored", "_live", "_source", "rows")

    def __init__(self, rows: Tensor, complete: bool) -> None:
        self.rows = rows
        self._live: Tensor | None = None
        if complete or rows.shape[0] == 0:
            return
        anchor = rows.argmax()
        live = rows >= 0
        index = torch.arange(rows.shape[0], device=rows.device)
        self._live, self._anchored = live.unsqueeze(1), live.any()
        self._source = torch.where(live, index, anchor)
        self.rows = rows[self._source].clamp(min=0)

    def read(self, source: Tensor) -> Tensor:
        """Return ``source[rows]`` for source (N, D), 0 where there is no row: the values of a row
        that is not edited may be NaN."""
        return self.cleared(source.index_select(0, self.rows))

    def write(self, target: Tensor, values: Tensor) -> None:
        """Do ``target[rows] = values`` for target (N, D) and values (m, D); −1 writes nothing."""
        if self._live is not None:
            borrowed = values.index_select(0, self._source)
            values = torch.where(self._anchored, borrowed, target.index_select(0, self.rows))
        target.index_copy_(0, self.rows, values)

    def cleared(self, values: Tensor) -> Tensor:
        """Return values (m, …) with 0 where there is no row, so that sums over rows ignore them."""
        return values if self._live is None else values.masked_fill(~self._live, 0)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Rows to edit, group-major. Build it with :meth:`from_rows` or :meth:`from_padded`.

    Attributes:
        rows: int64 (n,), each row at most once, −1 for none; contiguous, on the device of
            ``hidden``.
        offsets: g + 1 host integers; group k owns ``rows[offsets[k] : offsets[k + 1]]``.
        max_row: the largest row, if the host can read it without asking a device; else None.
        complete: whether the host knows that no entry is −1.
        slots: int64 (g,) on the device of ``rows``: the entry of the parameters that each group
            uses. −1 leaves the group's rows unchanged. None: group k uses entry k. For inference
            only, without gradients.
        scales: float32 (g,) on the device of ``rows``: factor of each group's edit; None for 1.
            Only with ``slots``.
    """

    rows: Tensor
    offsets: tuple[int, ...]
    max_row: int | None = field(default=None, kw_only=True)
    complete: bool = field(default=False, kw_only=True)
    slots: Tensor | None = field(default=None, kw_only=True)
    scales: Tensor | None = field(default=None, kw_only=True)
    #: Number of rows of the largest group, which a launch grid has to cover.
    largest_group: int = field(init=False, repr=False)
    # Shared by every layer. Lists, since Dynamo cannot trace functools.cached_property.
    _device_offsets: list[Tensor | None] = field(default_factory=list, init=False, repr=False)
    _places: list[Place] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = [b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        object.__setattr__(self, "largest_group", max(sizes) if sizes else 0)
        if self.slots is None:  # `using` copies those of its plan
            _ = self.device_offsets  # make them before a captured or compiled call needs them

    @property
    def num_rows(self) -> int:
        """n, the number of entries of ``rows``, −1 included."""
        return self.offsets[-1]

    @property
    def num_groups(self) -> int:
        """g, the number of parameter sets that the plan addresses."""
        return len(self.offsets) - 1

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def device_offsets(self) -> Tensor | None:
        """``offsets`` as int64 (g + 1,) on the device of ``rows``. None if all groups have
        ``largest_group`` rows: then a kernel computes them."""
        if not self._device_offsets:
            size = self.largest_group
            equal = all(offset == k * size for k, offset in enumerate(self.offsets))
            offsets = None if equal else _tensor_of(self.offsets, self.device)
            self._device_offsets[:] = [offsets]  # in one step: threads may share a plan
        return self._device_offsets[0]

    @property
    def places(self) -> list[Place]:
        """The :class:`Place` of each group."""
        if not self._places:
            bounds = zip(self.offsets, self.offsets[1:], strict=False)
            self._places[:] = [Place(self.rows[a:b], self.complete) for a, b in bounds]
        return self._places

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first, last + 1) of consecutive groups of one size with at most :data:`MAX_RUN_ROWS`
        rows in total: the groups of one batched product. Empty groups belong to no run."""
        runs: list[tuple[int, int]] = []
        for k, (start, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            size = end - start
            if not size:
                continue
            if runs and runs[-1][1] == k:
                first = runs[-1][0]
                fits = end - self.offsets[first] <= MAX_RUN_ROWS
                if fits and start - self.offsets[k - 1] == size:
                    runs[-1] = (first, k + 1)
                    continue
            runs.append((k, k + 1))
        return runs

    @property
    def run_places(self) -> list[Place]:
        """The :class:`Place` of each of :attr:`runs`; rows of groups without an entry are −1."""
        assert self.slots is not None
        if not self._places:
            places = []
            for first, last in self.runs:
                a, b = self.offsets[first], self.offsets[last]
                rows = self.rows[a:b].view(last - first, -1)
                rows = torch.where(self.slots[first:last].unsqueeze(1) < 0, -1, rows)
                places.append(Place(rows.reshape(-1), False))
            self._places[:] = places
        return self._places

    def to(self, device: torch.device | str) -> RowPlan:
        """Return this plan with its rows on ``device``."""
        if self.rows.device == torch.device(device):
            return self
        plan = RowPlan(
            self.rows.to(device),
            self.offsets,
            max_row=self.max_row,
            complete=self.complete,
            slots=None if self.slots is None else self.slots.to(device),
            scales=None if self.scales is None else self.scales.to(device),
        )
        _ = plan.device_offsets
        return plan

    def using(self, slots: Tensor, scales: Tensor | None = None) -> RowPlan:
        """Return a plan that edits the same rows with entries of a table.

        Args:
            slots: int64 (g,), on the device of ``rows``; −1 leaves the group unchanged.
            scales: float32 (g,), factor of each group's edit, or None for 1.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device.
        """
        for name, value, dtype in (
            ("slots", slots, torch.int64),
            ("scales", scales, torch.float32),
        ):
            if value is None:
                continue
            if value.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
            if tuple(value.shape) != (self.num_groups,):
                raise ValueError(
                    f"{name} must have one entry per group, {self.num_groups} in total, "
                    f"got shape {tuple(value.shape)}"
                )
            if value.device != self.device:
                raise ValueError(
                    f"{name} must be on the rows' device {self.device}, got {value.device}"
                )
        plan = replace(self, slots=slots.contiguous(), scales=scales)
        plan._device_offsets.extend(self._device_offsets)
        return plan

    @classmethod
    def from_rows(
        cls, rows: IntArray, groups: IntArray | None = None, num_groups: int = 1
    ) -> RowPlan:
        """Make a plan from flat row numbers.

        Args:
            rows: int (n,), a tensor or list. Row i of ``hidden.reshape(-1, D)``; −1 for none.
            groups: int (n,), the group of each row, or None for group 0. Rows are sorted by group,
                stably. The host reads them: a CUDA tensor costs one synchronisation here, and none
                later.
            num_groups: g, at least 1.

        Raises:
            TypeError: rows or groups are not integers.
            ValueError: wrong shape, a row below −1, a duplicate row, a group outside 0 … g − 1.
                Rows on a device other than the CPU are not checked.
        """
        row_tensor = _int_vector("rows", rows)
        n = row_tensor.shape[0]
        order, offsets = _sort_by_group(groups, n, num_groups)
        max_row, complete = _inspect(row_tensor)
        if order is not None:
            row_tensor = row_tensor[order.to(row_tensor.device)]
        return cls(row_tensor.contiguous(), offsets, max_row=max_row, complete=complete)

    @classmethod
    def from_padded(
        cls, positions: Tensor, seq_len: int, groups: IntArray | None = None, num_groups: int = 1
    ) -> RowPlan:
        """Make a plan from positions in each sequence of a batch, on the device of the positions.

        Args:
            positions: int (B, P); position p of sequence b is row ``b * seq_len + p``; −1 for none.
                Only on the CPU are they checked to be unique in each sequence and below
                ``seq_len``.
            seq_len: S, the number of rows of each sequence in ``hidden`` (B, S, D).
            groups: broadcasts to (B, P): (P,) gives each column its group, (B, 1) each sequence.
            num_groups: g, at least 1.

        Raises:
            TypeError, ValueError: see :meth:`from_rows`; also a position ≥ ``seq_len`` on the CPU.
        """
        if not isinstance(positions, Tensor) or positions.dtype not in _INT_TYPES:
            raise TypeError(
                f"positions must be an integer tensor (B, P), got {_describe(positions)}"
            )
        if positions.ndim != 2:
            raise ValueError(f"positions must be (B, P), got shape {tuple(positions.shape)}")
        if seq_len < 0:
            raise ValueError(f"seq_len must be at least 0, got {seq_len}")
        positions = positions.long()
        batch, count = positions.shape
        if _visible(positions) and positions.numel() and int(positions.max()) >= seq_len:
            raise ValueError(
                f"positions must be below seq_len = {seq_len} (or −1), got {int(positions.max())}"
            )
        starts = torch.arange(batch, device=positions.device).unsqueeze(1) * seq_len
        rows = torch.where(positions < 0, positions, positions + starts).reshape(-1)
        if groups is not None:
            groups = torch.as_tensor(groups, device="cpu")
            try:
                groups = groups.expand(batch, count).reshape(-1)
            except RuntimeError:
                raise ValueError(
                    f"groups must broadcast to the shape of positions {(batch, count)}: "
                    f"{(count,)} by column or {(batch, 1)} by sequence; got {tuple(groups.shape)}"
                ) from None
        return cls.from_rows(rows, groups, num_groups)


class LaunchRows(NamedTuple):
    """The part of a :class:`RowPlan` that the kernels read, under the same names.

    A traced graph passes these to the operators of ``custom_ops``.
    """

    rows: Tensor
    device_offsets: Tensor | None
    num_groups: int
    largest_group: int
    slots: Tensor | None = None
    scales: Tensor | None = None


def _tensor_of(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy host integers into an int64 tensor on ``device``, without waiting for the device.

    While a graph is traced or captured, the numbers become part of it. A copy from the host would
    be repeated in every call of a compiled function, and is forbidden in a capture.
    """
    cuda = device.type == "cuda"
    if torch.compiler.is_compiling() or (cuda and torch.cuda.is_current_stream_capturing()):
        return torch.stack(
            [torch.full((), offset, dtype=torch.int64, device=device) for offset in offsets]
        )
    tensor = torch.tensor(offsets, dtype=torch.int64, pin_memory=cuda)
    return tensor.to(device, non_blocking=cuda)


def _int_vector(name: str, values: IntArray) -> Tensor:
    if not isinstance(values, Tensor):
        if not all(isinstance(value, int) for value in values):
            raise TypeError(f"{name} must be integers, got {list(values)!r}")
        values = torch.tensor(values, dtype=torch.int64)
    if values.dtype not in _INT_TYPES:
        raise TypeError(f"{name} must have an integer dtype, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(values.shape)}")
    return values.long()


def _sort_by_group(
    groups: IntArray | None, n: int, num_groups: int
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Return the stable order that makes rows group-major (None if they are), and the offsets."""
    if not isinstance(num_groups, int) or num_groups < 1:
        raise ValueError(f"num_groups must be an integer of at least 1, got {num_groups!r}")
    if groups is None:
        return None, (0, n) + (n,) * (num_groups - 1)
    group_tensor = _int_vector("groups", groups).cpu()
    if group_tensor.shape[0] != n:
        raise ValueError(
            f"groups must have one entry per row: {n} rows, {group_tensor.shape[0]} groups"
        )
    # A list or a CPU tensor: no device waits here.
    values = group_tensor.tolist()
    for value in values:
        if not 0 <= value < num_groups:
            raise ValueError(f"groups must lie in 0 … {num_groups - 1}, got {value}")
    sizes = [0] * num_groups
    for value in values:
        sizes[value] += 1
    offsets = (0, *accumulate(sizes))
    if values == sorted(values):
        return None, offsets
    return torch.argsort(group_tensor, stable=True), offsets


def _visible(tensor: Tensor) -> bool:
    """Whether the host can read values without waiting for a device or breaking a traced graph."""
    return (
        tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor
    )


def _inspect(rows: Tensor) -> tuple[int | None, bool]:
    """Check rows that the host can read; return (largest row, whether no entry is −1)."""
    if not _visible(rows):
        return None, False
    if rows.numel() == 0:
        return -1, True
    if int(rows.min()) < -1:
        raise ValueError(f"rows must be −1 (none) or at least 0, got {int(rows.min())}")
    used = rows[rows >= 0]
    unique, counts = torch.unique(used, return_counts=True)
    if unique.shape[0] != used.shape[0]:
        raise ValueError(
            f"rows must not repeat, got row {int(unique[counts.argmax()])} twice or more"
        )
    return int(rows.max()), used.shape[0] == rows.shape[0]


def _describe(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
