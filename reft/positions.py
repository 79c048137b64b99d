"""Token positions that an adapter edits: their grammar, and their columns in a padded batch.

    f7+l7   the first seven and the last seven tokens of the prompt
    f3, l1  first or last tokens only
    prompt  every token of the prompt
    prompt+g4   every token of the prompt and the first four generated tokens
    all     every token of the prompt and every generated token
    image   the image tokens of the prompt
    given   the tokens that each call names in its argument ``edit_positions``

The paper and pyreft differ in two conventions, which only this module implements:

- *short prompts*: in a prompt of n tokens, ``pyreft`` edits the first min(F, ⌊n/2⌋) and the last
  min(L, ⌊n/2⌋) tokens, even if only one side is edited; ``paper`` edits min(F, ⌊n/2⌋) and
  min(L, ⌈n/2⌉).
- *prompt end*: with ``second_to_last`` the prompt ends one token early, as in four of pyreft's
  datasets, so that ``l1`` is the token before the last token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reft.safe_read import shown

#: The label of a token that is not a target: tokens before the first other label are the prompt.
IGNORED = -100

SHORT_PROMPTS = ("pyreft", "paper")
PROMPT_ENDS = ("last", "second_to_last")
UNTIED_BY = ("side", "position")

#: Accepted position strings in words, for error messages.
ALLOWED = (
    '"f<n>+l<n>", "f<n>" or "l<n>" with n from 1 to 999999 ("f7+l7", "f3", "l1"), "prompt", '
    '"prompt+g<n>" (and n generated tokens), "all", "image" or "given"'
)

# A forward allocates a column for each position, so that the numbers are limited.
_ENDS = re.compile(r"(?:f([1-9]\d{0,5}))?(\+)?(?:l([1-9]\d{0,5}))?", re.ASCII)
_GENERATED = re.compile(r"prompt\+g([1-9]\d{0,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Positions:
    """A parsed position string.

    Attributes:
        kind: "ends" for the first and last tokens of the prompt, "prompt" for the whole prompt,
            "all" for generated tokens too, "image" for image tokens of the prompt, "given" for the
            positions that each call gives.
        first: number of edited tokens at the start of the prompt; 0 unless kind is "ends".
        last: number of edited tokens at the end of the prompt; 0 unless kind is "ends".
        generated: number of edited tokens after the prompt; 0 unless kind is "prompt".
    """

    kind: Literal["ends", "prompt", "all", "image", "given"]
    first: int = 0
    last: int = 0
    generated: int = 0

    def num_groups(self, tied: bool, untied_by: str = "side") -> int:
        """Return the number of parameter sets of a layer.

        It is 1 if tied, the number of positions if untied by position, and 2 if untied by side with
        both first and last tokens.
        """
        if tied or self.kind != "ends":
            return 1
        if untied_by == "position":
            return self.first + self.last
        return 2 if self.first and self.last else 1

    def columns(self, tied: bool, untied_by: str = "side") -> list[int]:
        """Return the group of each column of :func:`padded_positions`, first tokens before last.

        Raises:
            ValueError: the kind is not "ends"; then every column is of group 0.
        """
        if self.kind != "ends":
            raise ValueError(f'only positions of kind "ends" have fixed columns, got "{self.kind}"')
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
        ValueError: the text does not follow the grammar of this module.
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
    chunk_start: int | Tensor = 0,
    seq_len: int,
    short_prompts: str = "pyreft",
    prompt_end: str = "last",
) -> Tensor:
    """Compute the edited columns of a padded batch on the device of ``start``.

    Prompts must have no gaps. The chunk is the part of the padded batch that a forward computes,
    columns ``chunk_start`` to ``chunk_start + seq_len``. A prompt may be computed in several
    chunks, and each edited column lies in exactly one of them. With n = ``length`` (minus
    1 for "second_to_last") and n_f, n_l as in the docstring of the module, the edited columns are

        ends:   start + j  for j < n_f,   start + n − L + k  for L − n_l ≤ k < L
        prompt: start + j  for j < n + generated      all: every column from start

    No value is read on the host, and every shape depends on ``spec`` and ``seq_len`` only.

    Args:
        spec: the positions to edit.
        start: int (B,), the column of the first attended token of each sequence.
        length: int (B,), the number of prompt tokens of each sequence.
        chunk_start: first column of the chunk, an int or 0-dim tensor: the length of the cache.
        seq_len: S, the number of columns in the chunk.
        short_prompts: "pyreft" or "paper".
        prompt_end: "last" or "second_to_last"; ignored for kind "all".

    Returns:
        int64 (B, P), columns relative to ``chunk_start``, −1 for no edit, each at most once in a
        sequence. P = first + last for kind "ends": columns for first tokens, then for last tokens;
        the last column is the last token of the prompt, whatever its length. Else P = S.

    Raises:
        ValueError: start or length is not a vector, their sizes differ, seq_len is negative, an
            option is unknown, or the kind is "image" or "given", which depend on more than lengths.
    """
    if start.ndim != 1 or start.shape != length.shape:
        raise ValueError(
            "start and length must both be (batch,), got shapes "
            f"{tuple(start.shape)} and {tuple(length.shape)}"
        )
    if seq_len < 0:
        raise ValueError(f"seq_len must be at least 0, got {seq_len}")
    if short_prompts not in SHORT_PROMPTS:
        raise ValueError(f"short_prompts must be one of {SHORT_PROMPTS}, got {short_prompts!r}")
    if prompt_end not in PROMPT_ENDS:
        raise ValueError(f"prompt_end must be one of {PROMPT_ENDS}, got {prompt_end!r}")

    if spec.kind in ("image", "given"):
        raise ValueError(f'positions "{spec.kind}" cannot be computed from the lengths of prompts')

    begin = start.long().unsqueeze(1)
    length = length.long().unsqueeze(1)
    if spec.kind == "ends":
        number, edited = end_numbers(spec, length, short_prompts, prompt_end)
        column = begin + number - chunk_start
        edited &= (column >= 0) & (column < seq_len)
    else:
        column = torch.arange(seq_len, device=start.device).expand(start.shape[0], seq_len)
        edited = covered(spec, column + chunk_start - begin, length, prompt_end)
    return torch.where(edited, column, -1)


def end_numbers(
    spec: Positions, length: Tensor, short_prompts: str = "pyreft", prompt_end: str = "last"
) -> tuple[Tensor, Tensor]:
    """Return the first and last tokens of prompts, for positions of kind "ends".

    Args:
        spec: first = F and last = L.
        length: int64 (B, 1), the number of tokens of each prompt.
        short_prompts, prompt_end: see :func:`padded_positions`.

    Returns:
        int64 (B, F + L), indices of tokens in their prompt; and bool (B, F + L), whether the token
        is edited. The index of a token that is not edited has no meaning.
    """
    # An empty prompt that ends one token early has n = −1: nothing is edited.
    n = length - 1 if prompt_end == "second_to_last" else length
    half = n // 2
    longer = half if short_prompts == "pyreft" else n - half
    n_first, n_last = half.clamp(max=spec.first), longer.clamp(max=spec.last)
    j = torch.arange(spec.first, device=length.device)
    k = torch.arange(spec.last, device=length.device)
    edited = torch.cat([j < n_first, k >= spec.last - n_last], dim=1)
    return torch.cat([j.expand(length.shape[0], -1), n - spec.last + k], dim=1), edited


def covered(spec: Positions, number: Tensor, length: Tensor, prompt_end: str = "last") -> Tensor:
    """Return which tokens positions of kind "prompt" or "all" edit.

    Args:
        spec: positions of one of these kinds.
        number: int, any shape, the index of each token in its sequence; negative in the padding.
        length: int, broadcastable to ``number``, the number of tokens of its prompt.
        prompt_end: see :func:`padded_positions`.

    Returns:
        bool, the shape of ``number``.
    """
    edited = number >= 0
    if spec.kind == "all":
        return edited
    end = length - 1 if prompt_end == "second_to_last" else length
    inside = number < end
    if spec.generated:
        inside |= (number >= length) & (number < length + spec.generated)
    return edited & inside
