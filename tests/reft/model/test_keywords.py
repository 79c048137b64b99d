"""Keywords of PEFT and transformers for saving and loading: used, ignored or refused."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from saved_models import logits, wrapped
from tiny_models import llama

from reft import ReftModel

# ------------------------------------------------------------------------ keywords of saving

ACCEPTED = {
    "sentence-transformers": {"safe_serialization": True},
    "accelerate": {"is_main_process": True, "save_function": Accelerator(cpu=True).save},
    "transformers": {"max_shard_size": "5GB", "push_to_hub": False, "variant": None},
    "transformers' PEFT": {"save_peft_format": True, "save_original_format": True},
    "peft": {"selected_adapters": ["default"], "save_embedding_layers": "auto"},
}


@pytest.mark.parametrize("keywords", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.parametrize("door", ["wrapper", "base"])
def test_keywords_of_other_libraries_are_accepted(door, keywords, tmp_path):
    model = wrapped()
    saver = model if door == "wrapper" else model.get_base_model()
    saver.save_pretrained(tmp_path, **keywords)
    assert torch.equal(logits(ReftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"safe_serialization": False}, ValueError, "safe_serialization.*no pickle is written"),
        ({"push_to_hub": True}, ValueError, r"push_to_hub.*ReftModel\.push_to_hub\(repo_id\)"),
        ({"save_embedding_layers": True}, ValueError, "modules_to_save"),
        ({"variant": "fp16"}, ValueError, "variant of save_pretrained must be None, got 'fp16'"),
        ({"selected_adapters": "default"}, TypeError, "must be a list of names, got 'default'"),
        ({"selected_adapters": []}, ValueError, "must be a non-empty list"),
        ({"selected_adapters": ["other"]}, ValueError, "adapter_name must be one of"),
        ({"selected_adapters": ["default", "no"]}, ValueError, "adapter_name must be one of"),
        (
            {"selected_adapters": ["default"], "adapter_name": "default"},
            ValueError,
            "without adapter_name",
        ),
        ({"is_trainable": True}, TypeError, r"ReftModel\.save_pretrained\(\).*'is_trainable'"),
    ],
)
def test_unsupported_keywords_are_refused_before_anything_is_written(
    keywords, kind, message, tmp_path
):
    model = wrapped()
    for saver in (model, model.get_base_model()):
        with pytest.raises(kind, match=message):
            saver.save_pretrained(tmp_path / "new", **keywords)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------ keywords of loading


@pytest.mark.parametrize(
    "keywords",
    [
        {"low_cpu_mem_usage": True},
        {"torch_device": "cpu", "ephemeral_gpu_offload": False},
        {"autocast_adapter_dtype": False},
        {"subfolder": None, "revision": None, "token": None},
        {"subfolder": "", "cache_dir": "elsewhere", "local_files_only": True},
    ],
)
def test_pefts_keywords_of_loading_are_accepted(keywords, tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    again = ReftModel.from_pretrained(llama(), tmp_path, **keywords)
    again.load_adapter(tmp_path, "second", **keywords)
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("subfolder", ["a", "./a/b/"])
def test_an_adapter_in_a_subfolder(subfolder, tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path / subfolder)
    for path in (tmp_path, str(tmp_path)):
        again = ReftModel.from_pretrained(llama(), path, subfolder=subfolder)
        assert torch.equal(logits(again), logits(model))
    base = llama()
    with pytest.raises(FileNotFoundError, match=r"no such adapter directory.*nowhere"):
        ReftModel.from_pretrained(base, tmp_path, subfolder="nowhere")
    assert not hasattr(base, "reft")


def test_an_unknown_keyword_names_the_method(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    base = llama()
    with pytest.raises(TypeError, match=r"ReftModel\.from_pretrained\(\).*'is_trainble'"):
        ReftModel.from_pretrained(base, tmp_path, is_trainble=True)
    assert not hasattr(base, "reft")
    with pytest.raises(TypeError, match=r"ReftModel\.load_adapter\(\).*'adapter'"):
        model.load_adapter(tmp_path, "second", adapter="x")
    assert list(model.configs) == ["default"]
