"""The model card of a published adapter: ``README.md`` with what the hub reads, the configuration
as a table, and lines of Python that load it.

A card that somebody wrote or edited is theirs and stays as it is. One that this module wrote says
so in its last line, with a checksum of the lines above, and is rewritten with the adapter for as
long as that is true.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import ModelCardData
from torch import nn

from reft.adapter.parameter_counts import count_parameters
from reft.config import ReftConfig
from reft.io.atomic_write import write_whole
from reft.io.hub_status import is_hub_name

if TYPE_CHECKING:
    from reft.model.reft_model import ReftModel

CARD_FILE = "README.md"

#: PEFT's task name -> the hub's.
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}

_MARK = re.compile(r"<!-- written by reft, sha256 ([0-9a-f]{64}), .*-->\n\Z")


def write_card(folder: str | os.PathLike[str], model: ReftModel, name: str, source: str) -> None:
    """Write the card of an adapter, unless the one that is there is somebody's own.

    Args:
        folder: of the adapter.
        model: it is on.
        name: of the adapter.
        source: where the card says that the adapter is: a name on the hub, or "." for its folder.
    """
    target = Path(folder) / CARD_FILE
    if target.exists() and not is_ours(target):
        return
    write_whole(target, _signed(_card(model, name, source)))


def is_ours(path: Path) -> bool:
    """Whether a card is as :func:`write_card` wrote it, to the letter."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _checksum(text[: mark.start()])


def _signed(text: str) -> str:
    note = "rewritten with the adapter unless somebody has edited it"
    return f"{text}<!-- written by reft, sha256 {_checksum(text)}, {note} -->\n"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _card(model: ReftModel, name: str, source: str) -> str:
    base, config = model.get_base_model(), model.configs[name]
    registry = model._registry
    heads = registry.heads.modules_of(base, name)
    own = count_parameters(nn.ModuleList([registry.adapter(name), *heads.values()]))[1]
    total = count_parameters(base)[1]
    origin = config.base_model_name_or_path
    rows = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("base_model_name_or_path", "format_version")
    }
    table = "\n".join(f"| `{key}` | {_code(ascii(value))} |" for key, value in rows.items())
    saved = f", those of {', '.join(map(_code, heads))} included" if heads else ""
    kind = type(base).__name__
    what = f"{_code(origin)} ({_code(kind)})" if origin else _code(kind)
    return f"""---
{_metadata(config, base).to_yaml()}
---

# ReFT adapter

A [representation finetuning](https://arxiv.org/abs/2404.03592) adapter of {what}, for the \
Python package `reft`. The model's own weights are untouched: its hidden vectors are edited at \
chosen tokens.

{own:,d} trained parameters{saved}: {100 * own / total:.4f} % of the model's {total:,d}.

```python
{_snippet(base, config, bool(heads), source)}
```

| field of `ReftConfig` | value |
|---|---|
{table}

"""


def _metadata(config: ReftConfig, base: nn.Module) -> ModelCardData:
    """What the hub reads. It refuses a base model that is not on the hub."""
    pipeline = _PIPELINES.get(config.task_type or "")
    can_generate = getattr(base, "can_generate", None)
    if pipeline is None and can_generate is not None and can_generate():
        pipeline = "text-generation"
    origin = config.base_model_name_or_path
    base_model: dict[str, Any] = {}
    if origin is not None and is_hub_name(origin):
        base_model = {"base_model": origin, "base_model_relation": "adapter"}
    return ModelCardData(
        library_name="reft",
        pipeline_tag=pipeline,
        tags=["reft", "representation-finetuning", config.intervention],
        **base_model,
    )


def _snippet(base: nn.Module, config: ReftConfig, heads: bool, source: str) -> str:
    """Lines that load the base and the adapter and run them once."""
    kind, options = type(base).__name__, ""
    can_generate = getattr(base, "can_generate", None)
    generates = can_generate is not None and can_generate()
    if not hasattr(transformers, kind):  # the code is in the model's own repository
        kind = "AutoModelForCausalLM" if generates else "AutoModel"
        options = ", trust_remote_code=True"
    labels = getattr(getattr(base, "config", None), "num_labels", None)
    if heads and "Classification" in kind:
        options += f", num_labels={labels}"
    first, second = sorted(("AutoTokenizer", kind))
    origin = config.base_model_name_or_path or "the model's folder or name on the hub"
    where = "  # where this card is" if source == "." else ""
    if generates:
        run = """\
inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""
    else:
        run = """\
inputs = tokenizer("Hello", return_tensors="pt")
print(model(**inputs))"""
    return f"""\
from transformers import {first}, {second}

from reft import ReftModel

name = {origin!a}
tokenizer = AutoTokenizer.from_pretrained(name)
base = {kind}.from_pretrained(name{options})
model = ReftModel.from_pretrained(base, {source!a}){where}
{run}"""


def _code(text: str) -> str:
    """A code span, which no character of the text can leave."""
    if not (text.isascii() and text.isprintable()):
        text = ascii(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{ticks}{space}{text}{space}{ticks}"
