"""Serving: one batch in which K adapters are mixed, whatever K is; beside the base alone, LoRA in
mixed batches, and pyreft, which takes one request after another. vLLM has no row: it would be timed
on a GPU."""

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
from benchmarks.gate import LOSS
from benchmarks.op_overhead import Profile, added, profiled
from benchmarks.peers import Absent, Peer
from benchmarks.result_rows import Gate, Row
from benchmarks.suites import Options, Suite, row
from benchmarks.suites.generate import set_eval
from benchmarks.suites.models import Twins
from benchmarks.timing import Clock, Run, interleave, paired_ratio, quantiles
from reft import ReftConfig, ReftModel

#: Distinct adapters in the batch, each in as many sequences as any other; 0 for "__base__" alone,
#: which is the base's work and so shows the noise.
ADAPTERS = (0, 1, 8, 64, 256, 512)
#: The most adapters of LoRA by device: PEFT adds each in a time that grows with those before it.
LORA_MOST = {"cpu": 256, "cuda": 64}
#: Tokens decoded in a timed run.
TOKENS = 4
#: Rounds under the profiler.
PROFILES = 3
BASE = "base"

#: (prompts, adapter names) -> nothing: prefill, and decoding on its cache.
_Forward = Callable[[Tensor, Sequence[str] | None, Any], Any]


def cases(size: str) -> list[ModelCase]:
    """One batch, the positions and ranks of its adapters."""
    if size == "ci":
        return [llama("Llama 64x2", 64, 2, 8, 16, vocabulary=64, positions="f3+l3", rank=2)]
    if size == "gpu":
        # A pool of 512 adapters of rank 64 would take 8 GiB, and as much time as all the rest.
        base = LLAMA_1B.but(batch=64, sequence=64)
    else:
        base = llama("Llama 256x4", 256, 4, 512, 32)
    return [
        base.but(positions=positions, rank=rank)
        for positions in ("f7+l7", "prompt")
        for rank in (4, 16, 64)
    ]


def counts(case: ModelCase, of: Sequence[int]) -> list[int]:
    """The numbers of adapters that a batch has room for."""
    return [one for one in of if one <= case.batch]


def names(case: ModelCase, adapters: int) -> list[str]:
    """One name a sequence, adapters in turns: neighbours have different ones."""
    if not adapters:
        return ["__base__"] * case.batch
    return [f"user{number % adapters}" for number in range(case.batch)]


def write_adapters(case: ModelCase, folder: Path, count: int) -> None:
    """Folders with random adapters of this library."""
    from reft.model.checkpoint import write_adapter
    from reft.nn.bank import Bank

    config = ReftConfig(rank=case.rank, positions=case.positions)
    random = torch.Generator().manual_seed(0)
    for number in range(count):
        bank = Bank(config, tuple(range(case.layers)), case.hidden, generator=random)
        with torch.no_grad():
            bank.bias.normal_(std=0.1, generator=random)
        write_adapter(folder / f"user{number}", config, bank.published_state())


def run(case: ModelCase, options: Options) -> Iterator[Row]:
    """Rows "prefill" and "decode" (a step of the whole batch) in seconds over the base's,
    "prefill_over_one" and "decode_over_one", the ratio to the same peer with one adapter;
    "prefill_operations" and "decode_operations", operators beyond the base's; "memory" and
    "host_memory", bytes an adapter takes on the device and on the host."""
    device = options.device
    clock, twins = Clock(device), Twins(case, device)
    random = torch.Generator().manual_seed(1)
    size = (case.batch, case.sequence)
    prompts = torch.randint(3, case.vocabulary, size, generator=random).to(device)
    runs: dict[tuple[str, int], Run] = {}
    kept: dict[tuple[str, int], Row] = {}
    forwards: dict[tuple[str, int], _Forward] = {}
    peers = {peer.name: peer for peer in options.peers}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        most = max(counts(case, ADAPTERS))
        write_adapters(case, Path(folder), most)
        if "ours" in peers:
            served = ReftModel(twins.one().eval())
            served.pool.capacity = most
            for number in range(most):
                served.pool.add(f"user{number}", Path(folder) / f"user{number}")
            gate = check(case, served, twins, Path(folder), prompts)
            called: list[tuple[str, int, _Forward]] = [
                (BASE, 0, partial(_plain, twins.one().eval())),
                *(("ours", one, partial(_adapted, served)) for one in counts(case, ADAPTERS)),
            ]
            for name, adapters, call in called:
                blank = dataclasses.replace(_row(case, adapters, peers["ours"], options), peer=name)
                if not gate.passed:
                    yield dataclasses.replace(
                        blank, metric="prefill", gate=gate, absent="the gate did not pass"
                    )
                    continue
                key = (name, adapters)
                forwards[key] = call
                runs[key] = partial(_timed, clock, call, prompts, names(case, adapters))
                kept[key] = dataclasses.replace(blank, gate=None if name == BASE else gate)
        if "LoRA" in peers and beside_lora(case):
            yield from _lora(case, twins, peers["LoRA"], options, clock, prompts, runs, kept)
        if "pyreft" in peers:
            yield from _pyreft(case, twins, peers["pyreft"], options, clock, prompts, runs, kept)
        yield from _more_operations(case, kept, forwards, prompts)
        yield from _counted(case, runs, kept, forwards, prompts, options)
        by_text = {f"{peer} {number}": call for (peer, number), call in runs.items()}
        samples = interleave(by_text, dataclasses.replace(options.effort, warmup=1))
        for (peer, number), blank in kept.items():
            own = samples[f"{peer} {number}"]
            for metric, seconds in own.items():
                base = samples.get(f"{BASE} 0", {}).get(metric)
                yield dataclasses.replace(blank, metric=metric, baseline=BASE).timed(
                    quantiles(seconds), None if base is None else paired_ratio(seconds, base)
                )
                one = samples.get(f"{peer} 1", {}).get(metric)
                if one is not None and number > 1:
                    yield dataclasses.replace(blank, metric=f"{metric}_over_one", unit="").timed(
                        paired_ratio(seconds, one)
                    )
        if ("ours", most) in kept:
            blank = dataclasses.replace(kept["ours", most], unit="bytes", gate=None)
            on_device, on_host = served.pool.resident_nbytes / most, served.pool.nbytes / most
            yield dataclasses.replace(blank, metric="memory", value=on_device)
            yield dataclasses.replace(blank, metric="host_memory", value=on_host)


def _more_operations(
    case: ModelCase,
    kept: Mapping[tuple[str, int], Row],
    forwards: Mapping[tuple[str, int], _Forward],
    prompts: Tensor,
) -> Iterator[Row]:
    """Rows "prefill_operations" and "decode_operations": what is dispatched beyond the base's."""
    found: dict[tuple[str, int], dict[str, int]] = {}
    with torch.no_grad():
        for key, call in forwards.items():
            chosen, caches = names(case, key[1]), list[Any]()
            first = partial(_keep_cache, call, prompts, chosen, caches)
            prefill = operations(first)
            decode = operations(partial(call, prompts[:, :1], chosen, caches[-1]))
            found[key] = {"prefill_operations": prefill, "decode_operations": decode}
    for key, own in found.items():
        if key[0] != BASE and (BASE, 0) in found:
            for metric, count in own.items():
                more = float(count - found[BASE, 0][metric])
                yield dataclasses.replace(kept[key], metric=metric, unit="count", value=more)


def _keep_cache(
    call: _Forward, prompts: Tensor, chosen: Sequence[str] | None, caches: list[Any]
) -> None:
    caches.append(call(prompts, chosen, None).past_key_values)


def _counted(
    case: ModelCase,
    runs: Mapping[tuple[str, int], Run],
    kept: Mapping[tuple[str, int], Row],
    forwards: Mapping[tuple[str, int], _Forward],
    prompts: Tensor,
    options: Options,
) -> Iterator[Row]:
    """Rows "prefill_counted" and "decode_counted": the base's time and that of the operators and
    the Python that it does not run, on a CPU, where whole forwards differ by more than adapters."""
    base, ours = runs.get((BASE, 0)), [key for key in runs if key[0] == "ours"]
    if options.device.type == "cuda" or base is None or not ours:
        return
    found: dict[tuple[str, int], dict[str, list[float]]] = {
        key: {"prefill": [], "decode": []} for key in ours
    }
    whole: dict[str, list[float]] = {"prefill": [], "decode": []}
    profiled(lambda: None)  # the profiler's own start
    with torch.no_grad():
        for _ in range(PROFILES):
            profiles = {
                key: _profiles(call, prompts, names(case, key[1])) for key, call in forwards.items()
            }
            for metric, seconds in base().items():
                whole[metric].append(seconds)
            for key in ours:
                for metric, own in profiles[key].items():
                    pairs = zip(own, profiles[BASE, 0][metric], strict=True)
                    found[key][metric] += [added(one, floor) for one, floor in pairs]
    for key in ours:
        for metric, more in found[key].items():
            floor = quantiles(whole[metric]).median
            times = [floor + one for one in more]
            blank = dataclasses.replace(kept[key], metric=f"{metric}_counted", baseline=BASE)
            yield blank.timed(quantiles(times), quantiles([one / floor for one in times]))


def _profiles(
    call: _Forward, prompts: Tensor, chosen: Sequence[str] | None
) -> dict[str, list[Profile]]:
    """A prefill, and the steps of decoding behind it."""
    caches: list[Any] = []
    first = profiled(partial(_keep_cache, call, prompts, chosen, caches))
    step = partial(call, prompts[:, :1], chosen, caches[-1])
    return {"prefill": [first], "decode": [profiled(step) for _ in range(TOKENS)]}


def beside_lora(case: ModelCase) -> bool:
    """LoRA has neither the positions nor the rank of a case: it runs beside one of them."""
    return case.rank <= 4 and case.positions != "prompt"


def check(case: ModelCase, served: ReftModel, twins: Twins, folder: Path, prompts: Tensor) -> Gate:
    """Whether sequences of the mixed batch have the logits of their adapter alone."""
    most = max(counts(case, ADAPTERS))
    numbers = [0, case.batch // 2, case.batch - 1]
    # The logits of a batch are the largest tensors here: those of three sequences are kept.
    mixed = served(prompts, adapter_names=names(case, most)).logits[numbers]
    plain = served(prompts, adapter_names=names(case, 0)).logits[numbers]
    allowed, worst = 10 * LOSS[mixed.dtype], 0.0
    for number, found, base in zip(numbers, mixed.double(), plain.double(), strict=True):
        alone = ReftModel.from_pretrained(twins.one(), folder / f"user{number % most}").eval()
        wanted = alone(prompts[number : number + 1]).logits[0].double()
        if torch.equal(base, wanted):
            return Gate(False, "the edit does not reach the logits: nothing was compared")
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return Gate(worst <= allowed, f"logits off by {worst:.1e}, allowed {allowed:.0e}")


def _row(case: ModelCase, adapters: int, peer: Peer, options: Options) -> Row:
    blank = row("serve", case, "", "s", peer, options)
    shape = {**blank.shape, "adapters": adapters}
    return dataclasses.replace(blank, case=f"{case}-k{adapters}", shape=shape)


def _plain(model: nn.Module, ids: Tensor, chosen: Sequence[str] | None, past: Any) -> Any:
    return model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)


def _adapted(model: Any, ids: Tensor, chosen: Sequence[str] | None, past: Any) -> Any:
    return model(ids, past_key_values=past, use_cache=True, logits_to_keep=1, adapter_names=chosen)


def _timed(
    clock: Clock, call: _Forward, prompts: Tensor, chosen: Sequence[str] | None
) -> Mapping[str, float]:
    """Prefill of the whole batch, and a decoding step of it."""
    cache: list[Any] = []

    def prefill() -> None:
        cache.append(call(prompts, chosen, None).past_key_values)

    def decode() -> None:
        for _ in range(TOKENS):
            call(prompts[:, :1], chosen, cache[-1])

    with torch.no_grad():
        times = clock(prefill=prefill, decode=decode)
    return {"prefill": times["prefill"], "decode": times["decode"] / TOKENS}


def _lora(
    case: ModelCase,
    twins: Twins,
    peer: Peer,
    options: Options,
    clock: Clock,
    prompts: Tensor,
    runs: dict[tuple[str, int], Run],
    kept: dict[tuple[str, int], Row],
) -> Iterator[Row]:
    blank = _row(case, 1, peer, options)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        yield dataclasses.replace(blank, metric="prefill", absent=f"PEFT is missing: {error}")
        return
    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(twins.one(), settings, "user0")
    most = LORA_MOST[options.device.type]
    several = [one for one in counts(case, ADAPTERS) if one]
    for number in range(1, max(one for one in several if one <= most)):
        model.add_adapter(f"user{number}", settings)
    model.eval()
    for adapters in several:
        if adapters > most:
            says = (
                f"more than {most} adapters were left out: PEFT adds each in a time that grows "
                "with those before it"
            )
            yield dataclasses.replace(
                _row(case, adapters, peer, options), metric="prefill", absent=says
            )
            continue
        key = (peer.name, adapters)
        runs[key] = partial(_timed, clock, partial(_adapted, model), prompts, names(case, adapters))
        kept[key] = _row(case, adapters, peer, options)


def _pyreft(
    case: ModelCase,
    twins: Twins,
    peer: Peer,
    options: Options,
    clock: Clock,
    prompts: Tensor,
    runs: dict[tuple[str, int], Run],
    kept: dict[tuple[str, int], Row],
) -> Iterator[Row]:
    """A batch of one, the time of which is taken as often as there are sequences."""
    note = "one request after another: the time of one, a token of generate, times their number"
    blank = dataclasses.replace(_row(case, 1, peer, options), note=note)
    assert peer.wrap is not None
    try:
        wrapped = peer.wrap(twins.one(), case.but(batch=1))
        generate = wrapped.generate
        if generate is None:
            raise Absent("it cannot generate")
        set_eval(wrapped)
        generate(prompts[:1], 1)
    except (Absent, RuntimeError, AttributeError, TypeError, ValueError) as error:
        says = str(error).splitlines()[0][:300]
        yield dataclasses.replace(blank, metric="prefill", absent=says)
        return

    def timed() -> Mapping[str, float]:
        with torch.no_grad():
            seconds = clock(one=lambda: generate(prompts[:1], 1))["one"]
        return {"prefill": seconds * case.batch}

    runs[peer.name, 1], kept[peer.name, 1] = timed, blank


SUITE = Suite("serve", "a batch that mixes adapters, over the base alone", cases, run)
