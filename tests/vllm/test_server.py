"""vLLM's OpenAI-compatible server over HTTP, with adapters."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from tiny_decoders import environment, prompts

NAMES = ["ends", "untied"]


@pytest.fixture(scope="module")
def server(bases, folder, tmp_path_factory) -> Iterator[openai.OpenAI]:
    root = tmp_path_factory.mktemp("server")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reft = {"folder": str(folder), "cache": str(root / "cache")}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(bases["llama"]),
        "--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1",
        "--dtype", "float32", "--block-size", "32", "--max-model-len", "256",
        "--max-num-batched-tokens", "128", "--max-num-seqs", "16", "--enforce-eager",
        "--hf-overrides", json.dumps({"architectures": ["ReftLlamaForCausalLM"]}),
        "--additional-config", json.dumps({"reft": reft}),
    ]  # fmt: skip
    log = root / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"), stdout=out, stderr=out
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-6000:]
            with contextlib.suppress(openai.APIConnectionError):
                client.models.list()
                break
            time.sleep(0.5)
        yield client
        assert process.poll() is None, log.read_text()[-6000:]
    finally:
        process.terminate()
        process.wait(30)


def words(ids) -> str:
    return " ".join(f"t{at}" for at in ids)


def complete(client, ids, name=None, count=6, **more) -> list[int]:
    xargs = {**({} if name is None else {"reft": name}), **more}
    extra = {"ignore_eos": True, **({"vllm_xargs": xargs} if xargs else {})}
    done = client.completions.create(
        model="tiny", prompt=ids, max_tokens=count, temperature=0, extra_body=extra
    )
    return [int(word[1:]) for word in done.choices[0].text.split()]


def spoken(tokens) -> list[int]:
    """Tokens that have a text."""
    return [token for token in tokens if token > 3]


def test_two_adapters_and_the_base(server, folder, references):
    (ids,) = prompts([50], seed=20)
    reference = references()
    seen = set()
    for name in (*NAMES, None, "__base__"):
        adapter = None if name == "__base__" else name
        expected = spoken(reference.tokens(ids, adapter, 6, folder))
        assert complete(server, ids, name) == expected
        assert complete(server, words(ids), name) == expected, "as text"
        seen.add(tuple(expected))
    assert len(seen) == 3
    half = spoken(reference.tokens(ids, "ends", 6, folder, 0.5))
    assert complete(server, ids, "ends", reft_scale=0.5) == half


def test_streamed(server, folder, references):
    (ids,) = prompts([70], seed=21)
    stream = server.completions.create(
        model="tiny", prompt=ids, max_tokens=6, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": {"reft": "ends"}},
    )  # fmt: skip
    text = "".join(part.choices[0].text for part in stream if part.choices)
    expected = spoken(references().tokens(ids, "ends", 6, folder))
    assert [int(word[1:]) for word in text.split()] == expected


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"reft": "nobody"}, "there is no adapter 'nobody'"),
        ({"reft": "../adapters/ends"}, "a folder's plain name"),
        ({"reft": 7}, "must be an adapter's name"),
        ({"reft": "ends", "reft_scale": "big"}, "must be a finite number"),
        ({"reft_scale": 2.0}, "needs an adapter's name"),
        ({"reft": "ends", "reft_scale": 1e20}, "must lie within ±4"),
        ({"reft": "x" * 300}, "a folder's plain name"),
        ({"reft": "ends", "beams": True}, "beam search cannot be edited"),
    ],
)
def test_a_bad_request_is_the_clients_error(server, folder, references, xargs, words):
    (ids,) = prompts([20], seed=22)
    body = {"use_beam_search": True} if "beams" in xargs else {}
    xargs = {key: value for key, value in xargs.items() if key != "beams"}
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        server.completions.create(
            model="tiny", prompt=ids, max_tokens=2, extra_body={"vllm_xargs": xargs, **body}
        )
    assert refused.value.status_code == 400
    assert complete(server, ids, "ends") == spoken(references().tokens(ids, "ends", 6, folder))


def test_an_adapter_that_comes_while_serving(server, folder, references, tmp_path):
    (ids,) = prompts([30], seed=23)
    with pytest.raises(openai.BadRequestError, match="no adapter 'late'"):
        complete(server, ids, "late")
    late = folder / "late"
    shutil.copytree(folder / "prompt", late)
    try:
        expected = spoken(references().tokens(ids, "prompt", 6, folder))
        assert complete(server, ids, "late") == expected
    finally:
        shutil.rmtree(late)
    with pytest.raises(openai.BadRequestError, match="no adapter 'late'"):
        complete(server, ids, "late")


def test_five_hundred_requests_of_four_clients(server, folder, references):
    """Every answer right, bad requests among them, nothing crashes."""
    choose = random.Random(0)
    pool = prompts([choose.randint(4, 120) for _ in range(24)], seed=24, shared=40)
    who = [None, *NAMES, "prompt", "last"]
    reference = references()
    work = [(choose.choice(pool), choose.choice(who)) for _ in range(500)]
    expected = [spoken(reference.tokens(ids, name, 6, folder)) for ids, name in work]

    def ask(at: int) -> list[int] | str:
        ids, name = work[at]
        if at % 25 == 24:
            try:
                complete(server, ids, "nobody")
            except openai.BadRequestError:
                return "refused"
        return complete(server, ids, name)

    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(ask, range(500)))
    wrong = [at for at in range(500) if at % 25 != 24 and answers[at] != expected[at]]
    assert not wrong
    assert [answers[at] for at in range(24, 500, 25)] == ["refused"] * 20
