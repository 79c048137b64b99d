"""Which tokens of a sequence an adapter edits: the grammar, and the places in a padded batch.

    f7+l7   the first seven and the last seven tokens of the prompt
    f3, l1  one side only
    prompt  every token of the prompt
    prompt+g4   and the first four generated tokens
    all     every token of the prompt and every generated token
    image   the image tokens of the prompt
    given   those that each call names in its argument ``edit_positions``

Two conventions that differ between the paper and pyreft live here, and only here:

- *short prompts*: of a prompt of n tokens, ``pyreft`` edits min(F, ⌊n/2⌋) first and min(L, ⌊n/2⌋)
  last ones, also when only one side is asked for; ``paper`` min(F, ⌊n/2⌋) and min(L, ⌈n/2⌉).
- *prompt end*: with ``second_to_last`` the prompt is taken to stop one token early, as in four of
  pyreft's own datasets, so that ``l1`` is the token before the last one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reft.safe_read import shown

SHORT_PROMPTS = ("pyreft", "paper")
PROMPT_ENDS = ("last", "second_to_last")
UNTIED_BY = ("side", "position")

#: What :func:`parse_positions` accepts, in words, for every message about it.
ALLOWED = (
    '"f<n>+l<n>", "f<n>" or "l<n>" with n from 1 to 999999 ("f7+l7", "f3", "l1"), "prompt", '
    '"prompt+g<n>" (and n generated tokens), "all", "image" or "given"'
)

# A forward makes one column a token that is named: a longer number is no number of tokens.
_ENDS = re.compile(r"(?:f([1-9]\d{0,5}))?(\+)?(?:l([1-9]\d{0,5}))?", re.ASCII)
_GENERATED = re.compile(r"prompt\+g([1-9]\d{0,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Positions:
    """A parsed position string.

    Attributes:
        kind: "ends" for the first and last tokens of the prompt, "prompt" for all of it, "all" for
            generated tokens too, "image" for its image tokens, "given" for what each call says.
        first: tokens edited at the start of the prompt; 0 unless kind is "ends".
        last: tokens edited at its end; 0 unless kind is "ends".
        generated: tokens edited after the prompt; 0 unless kind is "prompt".
    """

    kind: Literal["ends", "prompt", "all", "image", "given"]
    first: int = 0
    last: int = 0
    generated: int = 0

    def num_groups(self, tied: bool, untied_by: str = "side") -> int:
        """Parameter sets a layer needs: 1 if tied; else one for each position, or 2 for prefix and
        suffix where there are both."""
        if tied or self.kind != "ends":
            return 1
        if untied_by == "position":
            return self.first + self.last
        return 2 if self.first and self.last else 1

    def columns(self, tied: bool, untied_by: str = "side") -> list[int]:
        """The group of each column of :func:`padded_positions`, prefix then suffix; kind "ends".

        Raises:
            ValueError: of another kind, whose columns are the window's and all of group 0.
        """
        if self.kind != "ends":
            raise ValueError(
                f'only positions of kind "ends" have columns of their own, got "{self.kind}"'
            )
        if not tied and untied_by == "position":
            return list(range(self.first + self.last))
        return [0] * self.first + [self.num_groups(tied) - 1] * self.last

    def __str__(self) -> str:
        if self.kind != "ends":
            return f"{self.kind}+g{self.generated}" if self.generated else self.kind
        return "+".join(
            f"{side}{count}" for side, count in (("f", self.first), ("l", self.last)) if count
        )


def parse_positions(text: str) -> Positions:
    """Parse a position string such as ``"f7+l7"``.

    Raises:
        ValueError: anything but the grammar of this module, with what is allowed.
    """
    if not isinstance(text, str):
        raise ValueError(f"positions must be {ALLOWED}, got {shown(text)}")
    if text in ("prompt", "all", "image", "given"):
        return Positions(text)  # type: ignore[arg-type]
    if generated := _GENERATED.fullmatch(text):
        return Positions("prompt", generated=int(generated[1]))
    match = _ENDS.fullmatch(text)
    first, plus, last = match.groups() if match else (None, None, None)
    if not (first or last) or bool(plus) != bool(first and last):
        raise ValueError(f"positions must be {ALLOWED}, got {shown(text)}")
    return Positions("ends", int(first or 0), int(last or 0))


def padded_positions(
    spec: Positions,
    start: Tensor,
    length: Tensor,
    *,
    window_start: int | Tensor = 0,
    window: int,
    short_prompts: str = "pyreft",
    prompt_end: str = "last",
) -> Tensor:
    """The places to edit in each sequence of a padded batch whose prompts have no gaps, computed on
    the device of ``start``.

    The window is the part of the padded batch that this forward sees: columns ``window_start`` to
    ``window_start + window``. A prompt that arrives in chunks is several windows of one prompt, and
    each place falls into exactly one of them. With n = ``length`` (less 1 for "second_to_last") and
    n_f, n_l as the module's docstring says, the columns of the padded batch that are edited are

        ends:   start + j  for j < n_f,   start + n − L + k  for L − n_l ≤ k < L
        prompt: start + j  for j < n + generated      all: everything from start on

    No value is read on the host and every shape depends on ``spec`` and ``window`` alone.

    Args:
        spec: what to edit.
        start: int (B,), the column of each sequence's first attended token.
        length: int (B,), the number of its prompt tokens.
        window_start: first column of the window: the length of the cache. A 0-dim tensor will do.
        window: S, the number of columns in the window.
        short_prompts: "pyreft" or "paper".
        prompt_end: "last" or "second_to_last"; no meaning for kind "all".

    Returns:
        int64 (B, P), places relative to ``window_start``, each at most once in a sequence, −1 where
        there is none. P = first + last for kind "ends" (prefix, then suffix columns, of which the
        last is the prompt's last token, however short that is), else P = S.

    Raises:
        ValueError: start or length is not a vector or their sizes differ, window is negative, an
            option has no such value, or the kind is "image" or "given", which no length tells.
    """
    if start.ndim != 1 or start.shape != length.shape:
        raise ValueError(
            "start and length must both be (batch,), got shapes "
            f"{tuple(start.shape)} and {tuple(length.shape)}"
        )
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
    if short_prompts not in SHORT_PROMPTS:
        raise ValueError(f"short_prompts must be one of {SHORT_PROMPTS}, got {short_prompts!r}")
    if prompt_end not in PROMPT_ENDS:
        raise ValueError(f"prompt_end must be one of {PROMPT_ENDS}, got {prompt_end!r}")

    if spec.kind in ("image", "given"):
        raise ValueError(f'positions "{spec.kind}" are not told by the length of a prompt')

    begin = start.long().unsqueeze(1)
    length = length.long().unsqueeze(1)
    if spec.kind == "ends":
        number, wanted = end_numbers(spec, length, short_prompts, prompt_end)
        place = begin + number - window_start
        wanted &= (place >= 0) & (place < window)
    else:
        place = torch.arange(window, device=start.device).expand(start.shape[0], window)
        wanted = covered(spec, place + window_start - begin, length, prompt_end)
    return torch.where(wanted, place, -1)


def end_numbers(
    spec: Positions, length: Tensor, short_prompts: str = "pyreft", prompt_end: str = "last"
) -> tuple[Tensor, Tensor]:
    """Which tokens of a prompt are its first and last ones, for positions of kind "ends".

    Args:
        spec: first = F and last = L.
        length: int64 (B, 1), tokens of each prompt.
        short_prompts, prompt_end: as in :func:`padded_positions`.

    Returns:
        int64 (B, F + L), numbers of tokens of the prompt, from 0; and bool (B, F + L), whether the
        token is edited: where it is not, the number means nothing.
    """
    # Of an empty prompt that stops one token early, −1 tokens: no place either way.
    n = length - 1 if prompt_end == "second_to_last" else length
    half = n // 2
    longer = half if short_prompts == "pyreft" else n - half
    n_first, n_last = half.clamp(max=spec.first), longer.clamp(max=spec.last)
    j = torch.arange(spec.first, device=length.device)
    k = torch.arange(spec.last, device=length.device)
    wanted = torch.cat([j < n_first, k >= spec.last - n_last], dim=1)
    return torch.cat([j.expand(length.shape[0], -1), n - spec.last + k], dim=1), wanted


def covered(spec: Positions, number: Tensor, length: Tensor, prompt_end: str = "last") -> Tensor:
    """Whether tokens are edited by positions of kind "prompt" or "all".

    Args:
        spec: of one of these kinds.
        number: int, any shape: which token of its sequence each is, from 0; negative before it.
        length: int, broadcastable to ``number``: tokens of its prompt.
        prompt_end: as in :func:`padded_positions`.

    Returns:
        bool, the shape of ``number``.
    """
    wanted = number >= 0
    if spec.kind == "all":
        return wanted
    end = length - 1 if prompt_end == "second_to_last" else length
    inside = number < end
    if spec.generated:
        inside |= (number >= length) & (number < length + spec.generated)
    return wanted & inside
