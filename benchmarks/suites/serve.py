"""Suite "serve": one batch that mixes K adapters, beside the base, LoRA and pyreft.

pyreft takes one request at a time. vLLM has no row, since it has to be timed on a GPU.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.allocations import operations
from benchmarks.cases import LLAMA_1B, ModelCase, llama
from benchmarks.gate import LOSS_TOLERANCE
from benchmarks.op_overhead import Profile, added_seconds, profiled
from benchmarks.peers import Absent, Peer
from benchmarks.result_rows import Gate, Row
from benchmarks.suites import Options, Suite, blank_row, first_line
from benchmarks.suites.generate import set_eval
from benchmarks.suites.models import Twins
from benchmarks.timing import Clock, Run, interleave, paired_ratio, quantiles
from reft import ReftConfig, ReftModel

#: Numbers of different adapters in the batch, which share the sequences evenly. 0 is "__base__"
#: alone: it repeats the work of the base and shows the noise.
ADAPTERS = (0, 1, 8, 64, 256, 512)
#: Largest number of LoRA adapters by device; PEFT takes longer to add each further adapter.
LORA_MOST = {"cpu": 256, "cuda": 64}
#: Tokens decoded in a timed run.
TOKENS = 4
#: Rounds under the profiler.
PROFILES = 3
BASE = "base"

#: Maps (token ids, adapter names, cache) to the output of a forward.
_Forward = Callable[[Tensor, Sequence[str] | None, Any], Any]
#: Peer and number of adapters.
_Key = tuple[str, int]


def cases(size: str) -> list[ModelCase]:
    """A batch, and the positions and ranks of its adapters."""
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 8, 16, vocabulary=64, positions="f3+l3", rank=2)]
    if size == "gpu":
        # A pool of 512 adapters of rank 64 would take 8 GiB, and as much time as all other suites.
        base = LLAMA_1B.but(batch=64, sequence=64)
    else:
        base = llama("Llama 256x4", 256, 4, 512, 32)
    return [
        base.but(positions=positions, rank=rank)
        for positions in ("f7+l7", "prompt")
        for rank in (4, 16, 64)
    ]


def adapter_counts(case: ModelCase, numbers: Sequence[int] = ADAPTERS) -> list[int]:
    """The numbers of adapters that do not exceed the batch."""
    return [number for number in numbers if number <= case.batch]


def adapter_names(case: ModelCase, adapters: int) -> list[str]:
    """A name per sequence; neighbouring sequences have different adapters."""
    if not adapters:
        return ["__base__"] * case.batch
    return [f"user{number % adapters}" for number in range(case.batch)]


def write_adapters(case: ModelCase, folder: Path, count: int) -> None:
    """Write folders with random adapters of this library."""
    from reft.adapter.parameters import AdapterParameters
    from reft.io.adapter_files import write_adapter

    config = ReftConfig(rank=case.rank, positions=case.positions)
    random = torch.Generator().manual_seed(0)
    for number in range(count):
        adapter = AdapterParameters(
            config, tuple(range(case.layers)), case.hidden, generator=random
        )
        with torch.no_grad():
            adapter.bias.normal_(std=0.1, generator=random)
        write_adapter(folder / f"user{number}", config, adapter.export_state_dict())


def run(case: ModelCase, options: Options) -> Iterator[Row]:
    """Yield the rows of every peer and number of adapters.

    "prefill" and "decode" (a step of the whole batch) are seconds with ratios to the base.
    "…_over_one" is the ratio to the same peer with one adapter. "…_operations" counts operators
    beyond the base's; "…_op_overhead" is their time, on a CPU. "memory" and "host_memory" are bytes
    per adapter on the device and on the host.
    """
    peers = {peer.name: peer for peer in options.peers}
    batch = _Batch(case, options)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_adapters(case, Path(folder), max(adapter_counts(case)))
        served = None
        if "ours" in peers:
            served = _served_model(batch, Path(folder))
            yield from _add_ours(batch, peers["ours"], served, Path(folder))
        if "LoRA" in peers and beside_lora(case):
            yield from _add_lora(batch, peers["LoRA"])
        if "pyreft" in peers:
            yield from _add_pyreft(batch, peers["pyreft"])
        yield from _operation_rows(batch)
        yield from _overhead_rows(batch)
        yield from _timed_rows(batch)
        if served is not None:
            yield from _memory_rows(batch, served)


class _Batch:
    """The batch of a case, and the forwards, timed runs and blank rows of its participants."""

    def __init__(self, case: ModelCase, options: Options) -> None:
        self.case, self.options = case, options
        self.clock, self.twins = Clock(options.device), Twins(case, options.device)
        random = torch.Generator().manual_seed(1)
        size = (case.batch, case.sequence)
        ids = torch.randint(3, case.vocabulary, size, generator=random)
        self.prompts = ids.to(options.device)
        self.runs: dict[_Key, Run] = {}
        self.blanks: dict[_Key, Row] = {}
        self.forwards: dict[_Key, _Forward] = {}

    def blank(self, peer: Peer, adapters: int) -> Row:
        """A row of a peer with a number of adapters, without a number yet."""
        blank = blank_row("serve", self.case, "", "s", peer, self.options)
        shape = {**blank.shape, "adapters": adapters}
        return dataclasses.replace(blank, case=f"{self.case}-k{adapters}", shape=shape)

    def add(self, key: _Key, forward: _Forward, blank: Row) -> None:
        """Time a forward in the rounds to come."""
        names = adapter_names(self.case, key[1])
        self.runs[key] = partial(_timed, self.clock, forward, self.prompts, names)
        self.blanks[key] = blank


def _served_model(batch: _Batch, folder: Path) -> ReftModel:
    """A model with all adapters in its pool."""
    most = max(adapter_counts(batch.case))
    model = ReftModel(batch.twins.fresh().eval())
    model.pool.capacity = most
    for number in range(most):
        model.pool.add(f"user{number}", folder / f"user{number}")
    return model


def _add_ours(batch: _Batch, peer: Peer, served: ReftModel, folder: Path) -> Iterator[Row]:
    """Add the base and this library; yield rows without a number if the gate fails."""
    gate = check(batch, served, folder)
    forwards: dict[_Key, _Forward] = {(BASE, 0): partial(_plain, batch.twins.fresh().eval())}
    for adapters in adapter_counts(batch.case):
        forwards["ours", adapters] = partial(_adapted, served)
    for (name, adapters), forward in forwards.items():
        blank = dataclasses.replace(batch.blank(peer, adapters), peer=name)
        if not gate.passed:
            yield dataclasses.replace(
                blank, metric="prefill", gate=gate, absent="the gate did not pass"
            )
            continue
        batch.forwards[name, adapters] = forward
        batch.add(
            (name, adapters),
            forward,
            dataclasses.replace(blank, gate=None if name == BASE else gate),
        )


def _add_lora(batch: _Batch, peer: Peer) -> Iterator[Row]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        yield dataclasses.replace(
            batch.blank(peer, 1), metric="prefill", absent=f"PEFT is missing: {error}"
        )
        return
    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(batch.twins.fresh(), settings, "user0")
    most = LORA_MOST[batch.options.device.type]
    counts = [count for count in adapter_counts(batch.case) if count]
    for number in range(1, max(count for count in counts if count <= most)):
        model.add_adapter(f"user{number}", settings)
    model.eval()
    for adapters in counts:
        blank = batch.blank(peer, adapters)
        if adapters <= most:
            batch.add((peer.name, adapters), partial(_adapted, model), blank)
            continue
        reason = (
            f"more than {most} adapters were left out: PEFT takes longer to add each further "
            "adapter"
        )
        yield dataclasses.replace(blank, metric="prefill", absent=reason)


def _add_pyreft(batch: _Batch, peer: Peer) -> Iterator[Row]:
    """Add a batch of one request; its time is multiplied by the number of sequences."""
    case, clock, prompts = batch.case, batch.clock, batch.prompts
    note = "one request at a time: the time of a request and its first token, times their number"
    blank = dataclasses.replace(batch.blank(peer, 1), note=note)
    assert peer.wrap is not None
    try:
        wrapped = peer.wrap(batch.twins.fresh(), case.but(batch=1))
        generate = wrapped.generate
        if generate is None:
            raise Absent("it cannot generate")
        set_eval(wrapped)
        generate(prompts[:1], 1)
    except (Absent, RuntimeError, AttributeError, TypeError, ValueError) as error:
        yield dataclasses.replace(blank, metric="prefill", absent=first_line(error))
        return

    def timed() -> Mapping[str, float]:
        with torch.no_grad():
            seconds = clock(request=lambda: generate(prompts[:1], 1))["request"]
        return {"prefill": seconds * case.batch}

    batch.runs[peer.name, 1], batch.blanks[peer.name, 1] = timed, blank


def beside_lora(case: ModelCase) -> bool:
    """Whether LoRA is timed in a case; its positions and rank do not depend on the case."""
    return case.rank <= 4 and case.positions != "prompt"


def check(batch: _Batch, served: ReftModel, folder: Path) -> Gate:
    """Compare logits of the mixed batch with those of each adapter alone."""
    case, prompts = batch.case, batch.prompts
    most = max(adapter_counts(case))
    sequences = [0, case.batch // 2, case.batch - 1]
    # The logits of a batch are the largest tensors here; only those of three sequences are kept.
    mixed = served(prompts, adapter_names=adapter_names(case, most)).logits[sequences]
    plain = served(prompts, adapter_names=adapter_names(case, 0)).logits[sequences]
    allowed, worst = 10 * LOSS_TOLERANCE[mixed.dtype], 0.0
    for number, logits, base in zip(sequences, mixed.double(), plain.double(), strict=True):
        path = folder / f"user{number % most}"
        alone = ReftModel.from_pretrained(batch.twins.fresh(), path).eval()
        expected = alone(prompts[number : number + 1]).logits[0].double()
        if torch.equal(base, expected):
            return Gate(False, "the edit does not change the logits, so the check compared nothing")
        worst = max(worst, float((logits - expected).norm() / expected.norm()))
    return Gate(worst <= allowed, f"logits off by {worst:.1e}, allowed {allowed:.0e}")


def _operation_rows(batch: _Batch) -> Iterator[Row]:
    """Rows "prefill_operations" and "decode_operations": operators beyond the base's."""
    counts: dict[_Key, dict[str, int]] = {}
    for key, forward in batch.forwards.items():
        names, caches = adapter_names(batch.case, key[1]), list[Any]()
        prefill = operations(partial(_prefill, forward, batch.prompts, names, caches))
        decode = operations(partial(forward, batch.prompts[:, :1], names, caches[-1]))
        counts[key] = {"prefill_operations": prefill, "decode_operations": decode}
    for key, numbers in counts.items():
        if key[0] != BASE and (BASE, 0) in counts:
            for metric, number in numbers.items():
                added = float(number - counts[BASE, 0][metric])
                blank = batch.blanks[key]
                yield dataclasses.replace(blank, metric=metric, unit="count", value=added)


def _overhead_rows(batch: _Batch) -> Iterator[Row]:
    """Rows "prefill_op_overhead" and "decode_op_overhead", on a CPU.

    They are the time of the base plus that of the operators and the Python that the base does not
    run. Whole forwards on a shared CPU differ by more than adapters cost.
    """
    base, ours = batch.runs.get((BASE, 0)), [key for key in batch.runs if key[0] == "ours"]
    if batch.options.device.type == "cuda" or base is None or not ours:
        return
    added: dict[_Key, dict[str, list[float]]] = {key: {"prefill": [], "decode": []} for key in ours}
    whole: dict[str, list[float]] = {"prefill": [], "decode": []}
    profiled(lambda: None)  # start the profiler
    for _ in range(PROFILES):
        profiles = {
            key: _profiles(forward, batch.prompts, adapter_names(batch.case, key[1]))
            for key, forward in batch.forwards.items()
        }
        for metric, seconds in base().items():
            whole[metric].append(seconds)
        for key in ours:
            for metric, steps in profiles[key].items():
                pairs = zip(steps, profiles[BASE, 0][metric], strict=True)
                added[key][metric] += [added_seconds(step, base_step) for step, base_step in pairs]
    for key in ours:
        for metric, overheads in added[key].items():
            base_seconds = quantiles(whole[metric]).median
            times = [base_seconds + overhead for overhead in overheads]
            yield dataclasses.replace(
                batch.blanks[key], metric=f"{metric}_op_overhead", baseline=BASE
            ).timed(quantiles(times), quantiles([time / base_seconds for time in times]))


def _profiles(
    forward: _Forward, prompts: Tensor, names: Sequence[str] | None
) -> dict[str, list[Profile]]:
    """Profiles of a prefill and of the decoding steps after it."""
    caches: list[Any] = []
    prefill = profiled(partial(_prefill, forward, prompts, names, caches))
    step = partial(forward, prompts[:, :1], names, caches[-1])
    return {"prefill": [prefill], "decode": [profiled(step) for _ in range(TOKENS)]}


def _timed_rows(batch: _Batch) -> Iterator[Row]:
    """Rows "prefill", "decode" and their ratios to one adapter."""
    runs = {f"{peer} {number}": run for (peer, number), run in batch.runs.items()}
    samples = interleave(runs, dataclasses.replace(batch.options.effort, warmup=1))
    for (peer, number), blank in batch.blanks.items():
        for metric, seconds in samples[f"{peer} {number}"].items():
            base = samples.get(f"{BASE} 0", {}).get(metric)
            row = dataclasses.replace(blank, metric=metric, baseline=BASE)
            yield row.with_rounds(seconds, base)
            single = samples.get(f"{peer} 1", {}).get(metric)
            if single is not None and number > 1:
                yield dataclasses.replace(blank, metric=f"{metric}_over_one", unit="").timed(
                    paired_ratio(seconds, single)
                )


def _memory_rows(batch: _Batch, served: ReftModel) -> Iterator[Row]:
    most = max(adapter_counts(batch.case))
    if ("ours", most) not in batch.blanks:
        return
    blank = dataclasses.replace(batch.blanks["ours", most], unit="bytes", gate=None)
    on_device, on_host = served.pool.resident_nbytes / most, served.pool.nbytes / most
    yield dataclasses.replace(blank, metric="memory", value=on_device)
    yield dataclasses.replace(blank, metric="host_memory", value=on_host)


def _plain(model: nn.Module, ids: Tensor, names: Sequence[str] | None, cache: Any) -> Any:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _adapted(model: Any, ids: Tensor, names: Sequence[str] | None, cache: Any) -> Any:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, adapter_names=names)


def _prefill(
    forward: _Forward, prompts: Tensor, names: Sequence[str] | None, caches: list[Any]
) -> None:
    """Run a prefill and append its cache to ``caches``."""
    caches.append(forward(prompts, names, None).past_key_values)


def _timed(
    clock: Clock, forward: _Forward, prompts: Tensor, names: Sequence[str] | None
) -> Mapping[str, float]:
    """Seconds of the prefill of the whole batch, and of a decoding step."""
    caches: list[Any] = []

    def decode() -> None:
        for _ in range(TOKENS):
            forward(prompts[:, :1], names, caches[-1])

    with torch.no_grad():
        times = clock(prefill=partial(_prefill, forward, prompts, names, caches), decode=decode)
    return {"prefill": times["prefill"], "decode": times["decode"] / TOKENS}


SUITE = Suite("serve", "a batch that mixes adapters, over the base alone", cases, run)
