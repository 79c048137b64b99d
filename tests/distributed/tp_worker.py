"""One process of tensor parallelism, and the same training in one process.

Run by torchrun; see test_tensor_parallel.py. Results go into the folder given as argument: one file
for each scene and rank.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from three_steps import CASES as TRAINER_CASES
from three_steps import collate, features, make_trainer, trained
from tiny_models import LAYERS, llama
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig

from reft import ReftConfig, ReftModel, get_reft_model

STEPS = 3

#: Whether transformers' Trainer recognises a base that from_pretrained has split.
KNOWS_SPLIT = hasattr(PreTrainedModel, "is_distributed_loading_by_transformers")

#: name -> configuration of the adapter, and how it is trained; by default in float64, where
#: another order of sums makes no visible difference.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"dtype": "float32"},
    "checkpointing": {"checkpointing": False},
    "reentrant": {"checkpointing": True},
    "clipping": {"clip": 0.05},
    "accumulation": {"pieces": 2},
    "attention": {"config": {"component": "attention_output"}},
    "mlp": {"config": {"component": "mlp_output"}},
    "projection": {"config": {"component": "module:self_attn.o_proj"}},
    "untied": {"config": {"layers": [1, 2], "tied": False, "intervention": "direft"}},
    "head": {"config": {"modules_to_save": ("score",)}},
}

#: Components whose output is split between the processes.
SLICES = (
    "module:self_attn.q_proj",
    "module:self_attn.v_proj",
    "module:mlp.up_proj",
    "module:mlp.act_fn",
)


#: Cases of three_steps on a 4-bit base, and with the Trainer under tensor parallelism.
QUANTIZED = ("plain", "checkpointing")
TRAINER = ("plain", "accumulation")


def adapted(base: nn.Module, case: dict[str, Any], rank: int = 0) -> ReftModel:
    """Wrap the base with a new adapter; every rank draws another initialisation."""
    settings: dict[str, Any] = {"rank": 4, "positions": "f2+l2", "layers": list(range(LAYERS))}
    settings["dtype"] = case.get("dtype", "float64")
    config = ReftConfig(**{**settings, **case.get("config", {})})
    return get_reft_model(base, config, generator=torch.Generator().manual_seed(100 + rank))


def steps(model: ReftModel, case: dict[str, Any]) -> dict[str, Any]:
    """Train three steps of AdamW; return losses, gradients of the first step, and weights."""
    if "checkpointing" in case:
        reentrant = {"use_reentrant": case["checkpointing"]}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
    model.train()
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    pieces, classes = case.get("pieces", 1), "modules_to_save" in case.get("config", {})
    rows, losses, gradients = features(4 * STEPS), [], {}
    for step in range(STEPS):
        four = rows[4 * step : 4 * step + 4]
        for piece in range(pieces):
            inputs = collate(four[piece * 4 // pieces : (piece + 1) * 4 // pieces])
            if classes:
                inputs["labels"] = inputs["input_ids"][:, 0] % 3
            loss = model(**inputs).loss / pieces
            loss.backward()
            losses.append(loss.detach())
        if "clip" in case:
            torch.nn.utils.clip_grad_norm_(trained.values(), case["clip"])
        if not step:
            gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return {"losses": torch.stack(losses), "gradients": gradients, "weights": weights}


def texts(model: ReftModel) -> list[Tensor]:
    """Generate by greedy and beam search from left-padded prompts of several lengths."""
    inputs = {
        name: value.flip(1) for name, value in collate(features(3)).items() if name != "labels"
    }
    how = {"max_new_tokens": 6, "do_sample": False}
    return [model.eval().generate(**inputs, num_beams=beams, **how) for beams in (1, 2)]


def bases(folder: Path) -> None:
    """Write the base, as a language model and as a classifier."""
    llama().save_pretrained(folder / "language")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "wide")
    torch.manual_seed(0)
    classes = LlamaConfig.from_pretrained(folder / "language", num_labels=3)
    AutoModelForSequenceClassification.from_config(classes).save_pretrained(folder / "classes")


def quantized(folder: Path, name: str, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train three steps with the Trainer on a 4-bit base, under data parallelism."""
    base = AutoModelForCausalLM.from_pretrained(
        folder / "wide",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    run = folder / "runs" / f"{name}-{ranks}"
    trainer = make_trainer(TRAINER_CASES[name], run, rank=rank, ranks=ranks, base=base)
    return {**trained(trainer), "kind": type(trainer.model_wrapped).__name__}


def with_trainer(folder: Path, name: str, rank: int = 0, **split: Any) -> dict[str, Any]:
    """Train three steps with the Trainer; under tensor parallelism every rank gets the
    whole batch."""
    base = load(folder, {"dtype": "float32"}, **split)
    run = folder / "runs" / f"{name}-trainer"
    return trained(make_trainer(TRAINER_CASES[name], run, rank=rank, base=base))


def load(folder: Path, case: dict[str, Any], **how: Any) -> nn.Module:
    how["dtype"] = getattr(torch, case.get("dtype", "float64"))
    if "modules_to_save" in case.get("config", {}):
        return AutoModelForSequenceClassification.from_pretrained(folder / "classes", **how).eval()
    return AutoModelForCausalLM.from_pretrained(folder / "language", **how).eval()


class Refusals(dict[str, str]):
    """Error messages of calls that must fail, by name."""

    def __call__(self, name: str, call: Callable[..., Any], base: nn.Module, *args: Any) -> None:
        before = [*base.named_modules()]
        try:
            call(*args)
        except (ValueError, RuntimeError) as error:
            self[name] = str(error)
        assert [*base.named_modules()] == before, name


def refusals(folder: Path) -> Refusals:
    """Collect the errors of every entry point and of every way of splitting a base."""
    refused, sliced, plain = Refusals(), folder / "sliced", ReftConfig(rank=2)

    def split(**how: Any) -> nn.Module:
        return load(folder, {}, distributed_config=DistributedConfig(**how))

    def wrap(base: nn.Module, **settings: Any) -> None:
        get_reft_model(base, ReftConfig(rank=2, **settings))

    base, head = split(tp_size=2), {"modules_to_save": ("lm_head",)}
    for component in SLICES:
        refused(component, lambda path: wrap(base, component=path), base, component)
    refused("head", lambda: wrap(base, **head), base)
    refused("from_pretrained", ReftModel.from_pretrained, base, base, sliced)
    model = get_reft_model(base, plain)
    config = ReftConfig(rank=2, component=SLICES[0])
    refused("add_adapter", model.add_adapter, base, "b", config)
    refused("load_adapter", model.load_adapter, base, sliced, "b")
    refused("pool", model.pool.add, base, "b", sliced)

    sharded, pipeline = split(fsdp_size=2), split(pp_size=2)
    refused("sharded head", lambda: wrap(sharded, **head), sharded)
    refused("pipeline", lambda: wrap(pipeline), pipeline)
    sequence = split(tp_size=2, enable_sequence_parallel=True)
    refused("sequence", lambda: wrap(sequence), sequence)

    mesh = init_device_mesh("cpu", (2,))
    foreign = split_by_torch(load(folder, {}), mesh)
    refused("foreign", lambda: wrap(foreign, component="module:mlp.up_proj"), foreign)
    if KNOWS_SPLIT:
        trainer = make_trainer(TRAINER_CASES["plain"], folder / "runs" / "foreign", base=foreign)
        refused("foreign trainer", trainer.train, foreign)
    model = get_reft_model(llama(), plain)
    ids = torch.full((2, 8), 5)
    with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
        refused("context", model, model.base_model, ids)
    return refused


def split_by_torch(base: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the MLPs with torch, without a plan of transformers."""
    for block in base.model.layers:
        styles = {"up_proj": ColwiseParallel, "gate_proj": ColwiseParallel}
        plan = {f"mlp.{name}": style() for name, style in styles.items()}
        parallelize_module(block, mesh, {**plan, "mlp.down_proj": RowwiseParallel()})
    return base


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, split = dist.get_rank(), {"distributed_config": DistributedConfig(tp_size=2)}

    def store(scene: str, **facts: Any) -> None:
        torch.save(facts, folder / f"{scene}.{rank}.pt")

    for name, case in CASES.items():
        model = adapted(load(folder, case, **split), case, rank)
        model.broadcast_adapters()
        store(name, **steps(model, case))
        if name == "plain":
            store("texts", texts=texts(model))
            if not rank:
                model.save_pretrained(folder / "saved")
    dist.barrier()

    base = load(folder, {}, **split)
    again = ReftModel.from_pretrained(base, folder / "saved")
    store("loaded", texts=texts(again))
    again.unload()
    with torch.no_grad():
        store("base", logits=base(**collate(features(4))).logits)
    foreign = split_by_torch(load(folder, {}), init_device_mesh("cpu", (2,)))
    store("foreign", **steps(adapted(foreign, CASES["mlp"]), CASES["mlp"]))
    store("refusals", **refusals(folder))
    if KNOWS_SPLIT:
        # accelerate allows this on GPUs only.
        ParallelismConfig._validate_accelerator = lambda *_: None
        for name in TRAINER:
            store(f"trainer-{name}", **with_trainer(folder, name, rank, **split))
    for name in QUANTIZED:
        store(f"quantized-{name}", **quantized(folder, name, rank, ranks=2))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # every training collects garbage: exclude the imported modules
    main(Path(sys.argv[1]))
    gc.unfreeze()  # frozen objects would leave threads of the process group running at exit
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
