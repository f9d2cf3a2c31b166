"""The benchmarks run to their end and report; what they measure decides nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.serve import model_without_end
from modules.settings import PROJECT_ROOT
from tests.conftest import Serve
from tests.fakes import VOCAB_SIZE, build_tokenizer

TIMEOUT = 240
TINY = {"hidden": 64, "intermediate": 96, "layers": 2, "heads": 4, "kv-heads": 2, "vocab": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "tiny"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT_ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


def report(path: Path, script: str, *arguments: object) -> dict[str, dict[str, list[float]]]:
    """The values by measure and column."""
    done = run(script, *arguments, "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    written: dict[str, Any] = json.loads(path.read_text())
    assert written["machine"]["torch"]
    for measure, values in written["results"].items():
        assert f"| {measure}" in done.stdout
        assert all(all(value >= 0 for value in rounds) for rounds in values.values()), measure
    results: dict[str, dict[str, list[float]]] = written["results"]
    return results


def test_engine(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 20)
    sizes = ("--streams", 1, 2, "--rounds", 2, "--tokens", 8, "--prompt-tokens", 40)
    dtypes = ("--dtypes", "float32", "bfloat16")
    values = report(
        tmp_path / "out.json", "engine.py", "--model", folder, "--text", text, *sizes, *dtypes
    )
    assert len(values["decode, 2 streams (tok/s)"]["bfloat16"]) == 2
    assert values["again / new (%)"]["float32"]
    assert values["resident once loaded (MB)"]["float32"]
    (perplexity,) = values["perplexity, 879 tokens"]["float32"]
    assert perplexity == pytest.approx(VOCAB_SIZE, rel=0.2)  # of weights that know nothing


def test_chat(folder: Path, tmp_path: Path) -> None:
    sizes = ("--turns", 30, "--room", 2000, "--rounds", 2)
    values = report(tmp_path / "out.json", "chat.py", "--model", folder, *sizes)
    for mode in ("instruct", "chat", "chat-instruct"):
        assert values["the rest (ms)"][mode]
        assert 0 < min(values["messages left out"][mode]) < 62


def test_two_models(folder: Path, tmp_path: Path) -> None:
    sizes = ("--rounds", 1, "--tokens", 12)
    values = report(tmp_path / "out.json", "two_models.py", "--models", folder, folder, *sizes)
    for name in ("first", "second"):
        assert values[f"{name} model (tok/s)"]["together"] > [0]
    assert values["sum of the shares (%)"]["alone"] == [100]


def test_sampler(folder: Path, tmp_path: Path) -> None:
    sizes = ("--streams", 2, "--rounds", 1, "--tokens", 4, "--prompt-tokens", 20)
    values = report(tmp_path / "out.json", "sampler.py", "--model", folder, *sizes)
    assert values["common chain (ms per step)"]["sampler"]
    assert values["common chain (% of the step)"]["sampler"]


def test_lora(folder: Path, tmp_path: Path) -> None:
    sizes = ("--streams", 2, "--rounds", 1, "--tokens", 4, "--prompt-tokens", 20, "--rank", 4)
    flags = ("--model", folder, "--dtype", "float32")
    values = report(tmp_path / "out.json", "lora.py", *flags, *sizes)
    assert set(values["decode, 2 streams (tok/s)"]) == {"mixed", "base", "adapted"}
    assert values["read 2 prompts of 20 (tok/s)"]["mixed"]


def test_serve_with_a_server_that_it_starts(folder: Path, tmp_path: Path) -> None:
    flags = ("--start-ours", "--model", folder, "--in-process", "--ours-flags=--cpu")
    sizes = ("--streams", 1, 2, "--rounds", 1, "--tokens", 8)
    words = ("--prefix-words", 20, "--long-words", 50, "--long-streams", 2)
    values = report(tmp_path / "out.json", "serve.py", *flags, *sizes, *words)
    assert set(values["2 streams: tok/s"]) == {"ours", "in process"}
    assert values["reading 50 words: others' longest gap (ms)"]["ours"]
    assert values["read before / unknown (%)"]["ours"]
    assert values["resident at the end (MB)"]["ours"]


def test_embeddings(folder: Path, tmp_path: Path) -> None:
    sizes = ("--texts", 8, "--words", 1, 5, "--clients", 2, "--per-request", 1, 4)
    others = ("--model", folder, "--rounds", 1, "--streams", 1, "--tokens", 8)
    values = report(tmp_path / "out.json", "embeddings.py", *sizes, *others)
    assert set(values["2 clients, 4 per request: texts/s"]) == {"ours", "encode"}
    assert values["1 stream beside embeddings: longest gap (ms)"]["ours"]
    assert values["1 stream: pace that is kept (%)"]["ours"]


def test_serve_with_servers_that_run(app: FastAPI, serve: Serve, tmp_path: Path) -> None:
    with serve(app) as url:
        peer = f"other={url}/v1#any-name"
        scenarios = ("--scenarios", "streams", "prefix", "--prefix-words", 20)
        sizes = ("--streams", 2, "--rounds", 2)
        values = report(
            tmp_path / "out.json",
            "serve.py",
            "--url",
            f"{url}/v1",
            "--peer",
            peer,
            *scenarios,
            *sizes,
        )
    assert len(values["2 streams: tok/s"]["other"]) == 2


def test_serve_ends_with_a_word_where_a_server_does_not_start(tmp_path: Path) -> None:
    done = run("serve.py", "--start-ours", "--model", tmp_path / "nothing")
    assert done.returncode != 0
    assert "There is no file or folder" in done.stderr


def test_the_model_for_transformers_has_no_end(folder: Path) -> None:
    with model_without_end(folder) as copy:
        assert json.loads((copy / "config.json").read_text())["eos_token_id"] is None
        assert (copy / "model.safetensors").samefile(folder / "model.safetensors")
    assert (folder / "model.safetensors").exists()


def test_cuda_tried_out_on_the_cpu(tmp_path: Path) -> None:
    shape = [item for name, value in TINY.items() for item in (f"--{name}", value)]
    sizes = ("--streams", 1, 2, "--rounds", 1, "--tokens", 8, "--prompt-tokens", 8)
    card = ("--long-prompt", 32, "--copy-mib", 1, "--matmul-size", 64)
    values = report(tmp_path / "out.json", "cuda.py", "--device", "cpu", *shape, *sizes, *card)
    assert set(values["decode, 2 streams (tok/s)"]) == {"ours", "roofline"}
    assert values["prompts and replies, 2 streams (tok/s)"]["generate_batch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_cuda_without_a_card_says_so() -> None:
    done = run("cuda.py")
    assert done.returncode != 0
    assert done.stderr.strip() == "No CUDA card here: this measures nothing else."
