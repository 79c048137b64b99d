"""One rank under each engine in turn, since most of the time goes into starting processes.

Run by torchrun; see test_ranks.py. Results go into the folder given as argument: one file for each
engine, scene and rank.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load_fsdp_model, save_fsdp_model
from sharding import forget, native_trainer, shard, units, units_of_bare_base
from three_steps import CASES, Case, Gradients, InOrder, batch, make_trainer, trained
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from wire import Wire

from reft.adapter.parameters import AdapterParameters

#: Cases of a base that is sharded during loading.
NATIVE = ("plain", "checkpointing", "clipping")

#: Runs of six steps with a checkpoint halfway.
_SIX = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "seed": 5}
LONG = {"long": Case(_SIX), "long lora": Case(_SIX, lora=True)}


class Rank:
    """One of the processes."""

    def __init__(self, folder: Path) -> None:
        from accelerate import PartialState

        state = PartialState(cpu=True)
        self.folder, self.rank, self.ranks = folder, state.process_index, state.num_processes

    def trainer(self, engine: str, scene: str, case: Case, **settings: Any) -> InOrder:
        """Build a trainer of the engine; every rank draws another initialisation."""
        forget()
        folder = self.folder / "runs" / engine / scene
        if engine == "native":
            return native_trainer(
                case, self.folder / "base", folder, rank=self.rank, ranks=self.ranks
            )
        trainer = make_trainer(case, folder, rank=self.rank, ranks=self.ranks)
        return shard(trainer, **settings) if engine == "fsdp2" else trainer

    def store(self, engine: str, scene: str, **facts: Any) -> None:
        torch.save(facts, self.folder / f"{engine}.{scene}.{self.rank}.pt")

    # ------------------------------------------------------------ scenes

    def cases(self, engine: str, names: Any) -> None:
        """Train three steps of every case."""
        for name in names:
            trainer = self.trainer(engine, name, CASES[name])
            try:
                result = trained(trainer)
            except ValueError as error:
                self.store(engine, name, unsupported=str(error))
                continue
            self.store(
                engine, name, units=units(trainer.model), kind=type(trainer.model_wrapped).__name__,
                **result,
            )  # fmt: skip

    def resumed(self, engine: str, name: str) -> None:
        """Train six steps, then the last three again from this engine's checkpoint and from the
        checkpoint of one process."""
        case, runs = LONG[name], self.folder / "runs"
        self.store(engine, name, **trained(self.trainer(engine, name, case)))
        for scene, first in (("again", engine), ("from one", "one")):
            trainer = self.trainer(engine, f"{name} {scene}", case)
            checkpoint = runs / first / name / "checkpoint-3"
            result = trained(trainer, resume_from_checkpoint=str(checkpoint))
            self.store(engine, f"{name} {scene}", **result)

    def saved(self, engine: str) -> None:
        """Save the trained adapter, and generate by greedy and beam search."""
        trainer = self.trainer(engine, "saved", CASES["plain"])
        trained(trainer)
        trainer.save_adapter(self.folder / f"{engine}-adapter")
        trainer.save_model(str(self.folder / f"{engine}-model"))
        model = trainer.model.eval()
        inputs = batch(3)
        with torch.no_grad():
            texts = [
                model.generate(**inputs, max_new_tokens=6, num_beams=beams, do_sample=False)
                for beams in (1, 2)
            ]
        self.store(engine, "saved", texts=texts)

    def wire(self, engine: str) -> None:
        """Count the bytes sent in one step: those of two steps minus those of one."""
        sent = []
        for steps in (1, 2):
            trainer = self.trainer(engine, "wire", Case({"max_steps": steps}))
            trainer.remove_callback(Gradients)
            with Wire() as wire:
                trainer.train()
            sent.append(wire.bytes)
        self.store(engine, "wire", bytes=sent[1] - sent[0])

    def without_prompts(self, engine: str) -> None:
        """Train on examples without a prompt: all of them, or those of one rank."""
        for scene, chosen in (("all", range(12)), ("one rank's", (2, 3)), ("the first", range(4))):
            trainer = self.trainer(engine, f"answers {scene}", CASES["plain"])
            for number in chosen:
                row = trainer.train_dataset[number]
                row["labels"] = list(row["input_ids"])
            try:
                trainer.train()
                self.store(engine, f"answers {scene}", steps=trainer.steps_trained, error="")
            except ValueError as error:
                self.store(
                    engine, f"answers {scene}", steps=trainer.state.global_step, error=str(error)
                )

    def trains_sharded(self) -> bool:
        """Return whether this transformers' Trainer accepts a sharded base; store its
        error if not."""
        trainer = self.trainer("native", "refused", CASES["plain"])
        if hasattr(trainer, "is_distributed_loading_by_transformers"):
            return True
        try:
            trainer.train()
        except ValueError as error:
            for scene in (*NATIVE, "saved"):
                self.store("native", scene, unsupported=str(error))
        return False

    def mixed(self) -> None:
        """Train a bfloat16 base under a bfloat16 policy, and record the adapter's tensors in a
        forward."""
        policy = MixedPrecisionPolicy(*[torch.bfloat16] * 3)
        trainer = self.trainer("fsdp2", "mixed", CASES["plain"], mixed_precision_policy=policy)
        [adapter] = [
            module for module in trainer.model.modules() if isinstance(module, AdapterParameters)
        ]
        first = {name: tensor.clone() for name, tensor in adapter.training_state().items()}
        seen: list[Any] = []
        adapter.register_forward_hook(
            lambda module, _, form: seen.append((module.weight.dtype, form[0].encode.clone()))
        )
        result = trained(trainer)
        self.store("fsdp2", "mixed", first=first, dtype=seen[0][0], encode=seen[0][1], **result)

    def state(self, setting: dict[str, Any]) -> None:
        """Compare logits after another adapter is overwritten from a sharded checkpoint and from a
        full state dict."""
        trainer = self.trainer("fsdp2", "state", CASES["plain"], **setting)
        trained(trainer)
        model, inputs = trainer.model_wrapped.eval(), batch(3)
        plugin = trainer.accelerator.state.fsdp_plugin
        everything = StateDictOptions(full_state_dict=True, cpu_offload=True)
        from_one = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        whole = get_model_state_dict(model, options=everything)  # rank 0 has it
        saved_state = {name: tensor.clone() for name, tensor in whole.items()}
        folder = str(self.folder / "fsdp2-state")
        save_fsdp_model(plugin, trainer.accelerator, model, folder)
        ways = {
            "parts": lambda: load_fsdp_model(plugin, trainer.accelerator, model, folder),
            "whole": lambda: set_model_state_dict(model, saved_state, options=from_one),
        }
        differences = {}
        with torch.no_grad():
            expected = model(**inputs).logits.clone()
            [adapter] = [
                module for module in model.modules() if isinstance(module, AdapterParameters)
            ]
            for name, bring_back in ways.items():
                for value in (adapter.base, *adapter.parameters()):
                    value.add_(0.3)
                away = float((model(**inputs).logits - expected).abs().max())
                for (
                    unit
                ) in model.modules():  # torch misreads modules that a forward has left gathered
                    if isinstance(unit, FSDPModule):
                        unit.reshard()
                bring_back()
                differences[name] = away, float((model(**inputs).logits - expected).abs().max())
        self.store("fsdp2", "state", found=differences, keys=[*saved_state])

    def best(self) -> None:
        """Load the best of two checkpoints into shards at the end of training."""
        case = Case(
            {
                "max_steps": 4, "save_strategy": "steps", "eval_strategy": "steps",
                "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True,
                "learning_rate": 0.5, "lr_scheduler_type": "constant",
            }
        )  # fmt: skip
        trainer = self.trainer("fsdp2", "best", case)
        result = trained(trainer)
        self.store("fsdp2", "best", best=str(trainer.state.best_model_checkpoint), **result)


def main(folder: Path) -> None:
    rank = Rank(folder)
    rank.cases("ddp", CASES)
    rank.resumed("ddp", "long")
    rank.saved("ddp")
    rank.wire("ddp")
    rank.without_prompts("ddp")
    if rank.trains_sharded():
        rank.cases("native", NATIVE)
        rank.saved("native")
    rank.cases("fsdp2", CASES)
    rank.resumed("fsdp2", "long")
    try:
        rank.resumed("fsdp2", "long lora")
    except ImportError as error:  # PEFT and the oldest transformers do not fit together
        for scene in ("", " again", " from one"):
            rank.store("fsdp2", f"long lora{scene}", unsupported=str(error))
    rank.saved("fsdp2")
    rank.wire("fsdp2")
    rank.without_prompts("fsdp2")

    for setting in ("cpu_ram_efficient_loading", "activation_checkpointing"):
        trainer = rank.trainer("fsdp2", setting, CASES["plain"], **{setting: True})
        rank.store("fsdp2", setting, **trained(trainer))

    try:
        rank.mixed()
    except ValueError as error:
        rank.store("fsdp2", "mixed", unsupported=str(error))
    rank.state({"cpu_ram_efficient_loading": True})
    rank.best()
    counted = rank.trainer("fsdp2", "units", CASES["plain"])
    rank.store("fsdp2", "units", bare=units_of_bare_base(counted))


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # every training collects garbage: exclude the imported modules
    main(Path(sys.argv[1]))
    gc.unfreeze()  # frozen objects would leave threads of the process group running at exit
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
