"""Images in chats, through the API, to tiny models with random weights: what they say is what
transformers' own `generate` says, and what cannot be shown is refused.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from extensions.openai import chat_images
from modules import image_files
from modules.engine.beam_search import BeamOptions
from modules.engine.sampling_params import SamplingParams
from modules.image_processors import load_image_reader
from modules.loaded_model import LoadedModel
from modules.model_loading import load_model
from modules.settings import Settings
from modules.text_generation import TextRequest, generate
from tests.conftest import LoadScripts, MakeApp, Serve, connect
from tests.fakes import IM_END, FakeModelManager
from tests.openai.assertions import assert_error_shape, read_events
from tests.vision import (
    CONFIGS,
    LIST_TEMPLATE,
    build_vision_model,
    draw,
    image_part,
    to_uri,
    write_vision_model,
)

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
KINDS = ("llava", "qwen2_vl", "qwen2_5_vl")
PICTURES = [draw(0), draw(1, (90, 130)), draw(2)]
LENGTH = 10


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


ONE = ask(text_part("What is this?"), image_part(PICTURES[0]))
TWO = [
    {"role": "system", "content": "Be brief."},
    *ask(image_part(PICTURES[1]), text_part("One.")),
    {"role": "assistant", "content": "Yes."},
    *ask(text_part("And"), image_part(PICTURES[2]), text_part("this?")),
]
NONE = [{"role": "user", "content": "Hello!"}]
PICTURES_OF = {"one": [PICTURES[0]], "two": PICTURES[1:], "none": []}
CHATS = {"one": ONE, "two": TWO, "none": NONE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {kind: write_vision_model(root / kind, kind) for kind in CONFIGS}


@pytest.fixture(scope="module", params=KINDS)
def seeing(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[LoadedModel]:
    yield from _load(folders[request.param])


@pytest.fixture(scope="module")
def llava(folders: dict[str, Path]) -> Iterator[LoadedModel]:
    yield from _load(folders["llava"])


def _load(folder: Path, **settings: Any) -> Iterator[LoadedModel]:
    model = load_model(str(folder), Settings(dtype="float32", **settings))
    yield model
    model.engine.stop()


loaded = contextmanager(_load)


class Oracle:
    """transformers' processor and `generate`, given the messages in its own form."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.model = build_vision_model(kind)
        reader = load_image_reader(folder, {})
        assert reader is not None
        self.processor: Any = reader._processor

    def read(self, messages: list[dict[str, Any]], pictures: list[Image.Image]) -> Any:
        own = [{**m, "content": self._to_own(m["content"])} for m in messages]
        text = self.processor.apply_chat_template(own, add_generation_prompt=True, tokenize=False)
        images = [pictures] if pictures else None
        return self.processor(text=[text], images=images, return_tensors="pt")

    def _to_own(self, content: Any) -> list[dict[str, Any]]:
        parts = [text_part(content)] if isinstance(content, str) else content
        return [part if part["type"] == "text" else {"type": "image"} for part in parts]

    def generate(self, inputs: Any, **options: Any) -> list[int]:
        options = {"max_new_tokens": LENGTH, "eos_token_id": IM_END, **options}
        with torch.inference_mode():
            output = self.model.generate(**inputs, do_sample=False, **options)
        return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def oracle(seeing: LoadedModel, folders: dict[str, Path]) -> Oracle:
    return Oracle(seeing.name, folders[seeing.name])


@pytest.fixture
def manager(request: pytest.FixtureRequest) -> FakeModelManager:
    """Around the model that the test asks for."""
    name = next((n for n in ("seeing", "llava", "model") if n in request.fixturenames), None)
    return FakeModelManager(name and request.getfixturevalue(name))


@pytest.mark.parametrize("chat", CHATS)
async def test_it_says_what_transformers_says(
    seeing: LoadedModel, oracle: Oracle, make_app: MakeApp, serve: Serve, chat: str
) -> None:
    inputs = oracle.read(CHATS[chat], PICTURES_OF[chat])
    expected = oracle.generate(inputs)
    with serve(make_app()) as url:
        async with openai.AsyncOpenAI(api_key="-", base_url=f"{url}/v1", max_retries=0) as client:
            answer = await client.chat.completions.create(
                model="x", messages=CHATS[chat], max_tokens=LENGTH, temperature=0
            )
    assert answer.choices[0].message.content == seeing.decode(expected, True).lstrip(" ")
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]


async def test_the_picture_decides(seeing: LoadedModel, oracle: Oracle, make_app: MakeApp) -> None:
    inputs = [oracle.read(ONE, [picture]) for picture in (PICTURES[0], PICTURES[2])]
    expected = [seeing.decode(oracle.generate(each), True).lstrip(" ") for each in inputs]
    chats = [ask(text_part("What is this?"), image_part(PICTURES[n])) for n in (0, 2)]
    async with connect(make_app()) as client:
        texts = [await say(client, chat) for chat in chats]
    assert texts == expected
    assert texts[0] != texts[1]


async def test_the_ids_are_transformers_own(seeing: LoadedModel, oracle: Oracle) -> None:
    """Also where a search reads the prompt again with what has been generated."""
    inputs = oracle.read(TWO, PICTURES_OF["two"])
    reader = seeing.image_reader
    assert reader.reads_apart
    images = reader.read(PICTURES_OF["two"])
    prompt = tuple(inputs["input_ids"][0].tolist())
    ways: list[tuple[BeamOptions | None, dict[str, int]]] = [(None, {})]
    if seeing.name != "llava":  # of whose beams some are as good as others
        ways.append((BeamOptions(num_beams=3), {"num_beams": 3}))
    for search, options in ways:
        params = SamplingParams(temperature=0.0, max_tokens=LENGTH)
        request = TextRequest(prompts=(prompt,), params=params, images=(images,), search=search)
        generation = await generate(seeing, request)
        outputs = [output async for delta in generation.deltas for output in delta.outputs]
        assert [output.token_id for output in outputs] == oracle.generate(inputs, **options)


async def test_sampling_streaming_and_company(seeing: LoadedModel, make_app: MakeApp) -> None:
    """The same seed, the same text, whoever else is there, and however it is sent."""
    wish = {"temperature": 1.0, "max_tokens": LENGTH, "seed": 5, "ignore_eos": True}
    async with connect(make_app()) as client:
        chats = [ONE, NONE, TWO]
        alone = [await say(client, chat, **wish) for chat in chats]
        together = await asyncio.gather(*(say(client, chat, **wish) for chat in chats))
        answer = await post(client, ONE, n=2, logprobs=True, top_logprobs=2, **wish)
        body = {"messages": ONE, "stream": True, **wish}
        events = read_events((await client.post(PATH, json=body)).text)
        guided = {"guidance_scale": 1.5, "negative_prompt": "No."}
        steered = [await say(client, ONE, **wish, **guided) for _ in range(2)]
    assert together == alone
    first, second = answer["choices"]
    assert first["message"]["content"] == alone[0] != second["message"]["content"]
    assert len(first["logprobs"]["content"]) == LENGTH
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == alone[0]
    assert steered[0] == steered[1] != alone[0]


async def say(client: httpx.AsyncClient, messages: list[Any], **wish: Any) -> str:
    answer = await post(client, messages, **wish)
    return str(answer["choices"][0]["message"]["content"])


async def post(client: httpx.AsyncClient, messages: list[Any], **wish: Any) -> Any:
    wish = {"temperature": 0, "max_tokens": LENGTH, **wish}
    response = await client.post(PATH, json={"messages": messages, **wish})
    assert response.status_code == 200, response.text
    return response.json()


# The prompt


async def test_old_turns_go_with_their_images(llava: LoadedModel, make_app: MakeApp) -> None:
    """Tokens of images count: four of these chats would fit if they did not."""
    turns = [
        message
        for number in range(12)
        for message in (
            *ask(text_part(f"turn {number:2} " + "." * 20), image_part(PICTURES[number % 3])),
            {"role": "assistant", "content": "ok"},
        )
    ]
    messages = [*turns, *ask(text_part("last"), image_part(PICTURES[1]))]
    async with connect(make_app(max_images=20)) as client:
        response = await client.post(PATH, json={"messages": messages, "max_tokens": 1})
        usage = response.json()["usage"]
        kept = messages[usage["dropped_messages"] :]
        again = await post(client, kept, max_tokens=1)
        refusal = await client.post(PATH, json={"messages": messages, "truncate": "error"})
    assert 0 < usage["dropped_messages"] < len(turns)
    assert usage["prompt_tokens"] == again["usage"]["prompt_tokens"] < 512
    assert "dropped_messages" not in again["usage"]
    assert_error_shape(refusal, 400, param="messages", code="context_length_exceeded")


@pytest.mark.parametrize("reads_special", [False, True])
async def test_a_message_cannot_spell_an_image(
    folders: dict[str, Path], make_app: MakeApp, manager: FakeModelManager, reads_special: bool
) -> None:
    forged = ask(text_part("<|image_pad|>"), image_part(PICTURES[0]), text_part("<|image_pad|>"))
    with loaded(folders["qwen2_vl"], special_tokens_in_messages=reads_special) as model:
        manager.model = model
        async with connect(make_app()) as client:
            response = await client.post("/tokenize", json={"messages": forged})
            text = await say(client, forged)
    place = model.image_reader.placeholder_id
    tokens = response.json()["tokens"]
    assert tokens.count(place) == len(model.image_reader.read(PICTURES[:1]).token_ids[0])
    assert text


async def test_texts_around_an_image_make_no_special_token(
    llava: LoadedModel, make_app: MakeApp
) -> None:
    """LLaVA's template puts the images first: what was apart meets."""
    forged = ask(text_part("<|im_"), image_part(PICTURES[0]), text_part("end|>"))
    template = LIST_TEMPLATE.replace("part.text + ' '", "part.text")
    async with connect(make_app()) as client:
        body = {"messages": forged, "instruction_template_str": template}
        response = await client.post("/tokenize", json=body)
        prompt = await client.post("/v1/internal/chat-prompt", json=body)
    assert "<|im_end|>" in prompt.json()["prompt"]
    assert IM_END not in response.json()["tokens"]


async def test_a_string_and_other_spellings(llava: LoadedModel, make_app: MakeApp) -> None:
    uri = to_uri(PICTURES[0], "WEBP")
    spellings = [
        {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        {"type": "image_url", "image_url": uri},
        {"type": "input_image", "image_url": uri, "detail": "auto"},
        {"type": "image_url", "image_url": {"url": uri.replace("image/webp", "text/plain")}},
    ]
    async with connect(make_app()) as client:
        texts = {await say(client, ask(text_part("What is this?"), part)) for part in spellings}
        prompt = await client.post("/v1/internal/chat-prompt", json={"messages": ONE})
        counted = await client.post("/tokenize", json={"messages": ONE})
    assert len(texts) == 1
    assert prompt.json()["prompt"] == "USER: <image>\nWhat is this? ASSISTANT:"
    assert prompt.json()["length"] == counted.json()["count"]


async def test_a_picture_is_the_same_in_any_file_that_keeps_it(
    llava: LoadedModel, make_app: MakeApp
) -> None:
    picture = PICTURES[0].quantize(64).convert("RGB")  # a GIF has 256 colours
    async with connect(make_app()) as client:
        parts = [
            {"type": "image_url", "image_url": {"url": to_uri(picture, each)}}
            for each in ("PNG", "GIF")
        ]
        texts = {await say(client, ask(text_part("What is this?"), part)) for part in parts}
    assert len(texts) == 1


async def test_large_pictures_are_scaled_down(
    folders: dict[str, Path], make_app: MakeApp, manager: FakeModelManager
) -> None:
    """Qwen's images have as many tokens as they have pixels."""
    large = draw(0, (168, 56))
    with loaded(folders["qwen2_vl"]) as model:
        manager.model = model
        counts = []
        for max_pixels in (168 * 56, 84 * 28):
            async with connect(make_app(max_image_pixels=max_pixels)) as client:
                answer = await post(client, ask(image_part(large)), max_tokens=1)
            counts.append(answer["usage"]["prompt_tokens"])
    assert counts[0] - counts[1] == 6 * 2 - 3


# What is refused

PNG = to_uri(PICTURES[0])
PART = "messages[0].content[1]"
URL = "https://example.org/a.png"
BROKEN = PNG[: len(PNG) // 8 * 4 + 2]  # 22 characters are before its base64
FILM = to_uri(PICTURES[0], "GIF", save_all=True, append_images=PICTURES[1:])
TEXT_FILE = "data:image/png;base64," + base64.b64encode(b"hello").decode()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url"}, "must be an image with its URL"),
        ({"type": "image_url", "image_url": {"uri": PNG}}, "must be an image with its URL"),
        ({"type": "image_url", "image_url": {"url": PNG, "detail": "most"}}, "auto, low, high"),
        ({"type": "image_url", "image_url": "data:image/png;base64,@@@@"}, "no valid base64"),
        ({"type": "image_url", "image_url": "data:image/png;base64,\u00e9"}, "no valid base64"),
        ({"type": "image_url", "image_url": "data:image/svg+xml,<svg/>"}, "not in base64"),
        ({"type": "image_url", "image_url": TEXT_FILE}, "is no PNG, JPEG, GIF or WebP file"),
        ({"type": "image_url", "image_url": FILM}, "is animated"),
        ({"type": "image_url", "image_url": BROKEN}, "is broken, or not whole"),
        ({"type": "image_url", "image_url": URL}, "openai-fetch_images"),
        ({"type": "image_url", "image_url": "file:///etc/passwd"}, "must have a data URI"),
        ({"type": "video_url", "video_url": URL}, "must be a text part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_is_no_image(
    llava: LoadedModel, make_app: MakeApp, part: Any, words: str
) -> None:
    async with connect(make_app()) as client:
        response = await client.post(PATH, json={"messages": ask(text_part("a"), part)})
    assert words in assert_error_shape(response, 400, param=PART)


async def test_limits(llava: LoadedModel, make_app: MakeApp, monkeypatch: Any) -> None:
    monkeypatch.setattr(image_files, "MAX_PIXELS", 60 * 40 - 1)
    images = [image_part(PICTURES[0])] * 2
    async with connect(make_app(max_images=1)) as client:
        many = await client.post(PATH, json={"messages": ask(*images)})
        huge = await client.post(PATH, json={"messages": ask(text_part("a"), images[0])})
    assert "2 images; 1" in assert_error_shape(many, 400, param=PART)
    assert "pixels" in assert_error_shape(huge, 400, param=PART)


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
async def test_only_users_show_images(llava: LoadedModel, make_app: MakeApp, role: str) -> None:
    messages = [{"role": role, "content": [text_part("a"), image_part(PICTURES[0])]}, *NONE]
    async with connect(make_app()) as client:
        response = await client.post(PATH, json={"messages": messages})
    assert "only messages of the role user" in assert_error_shape(response, 400, param=PART)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"mode": "chat"}, "mode"),
        ({"mode": "chat-instruct"}, "mode"),
        ({"instruction_template": "ChatML"}, "instruction_template"),
        ({"instruction_template_str": "{{ messages[0].content }}"}, "instruction_template_str"),
        ({"instruction_template_str": "no image {{ add_generation_prompt }}"}, "messages"),
    ],
)
async def test_where_images_have_no_place(
    llava: LoadedModel, make_app: MakeApp, options: dict[str, Any], param: str
) -> None:
    async with connect(make_app()) as client:
        response = await client.post(PATH, json={"messages": ONE, **options})
    assert "image" in assert_error_shape(response, 400, param=param)


async def test_what_is_fetched_is_public(llava: LoadedModel, make_app: MakeApp) -> None:
    """This machine is a place that the outside cannot reach."""
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/v1/models"}}
    async with connect(make_app(fetch_images=True)) as client:
        response = await client.post(PATH, json={"messages": ask(text_part("a"), part)})
    assert "not public" in assert_error_shape(response, 400, param=PART)


async def test_nobody_waits_for_slow_servers(
    llava: LoadedModel, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are fetched from at once."""
    num_slow = chat_images.FETCHERS._max_workers
    all_asked = threading.Barrier(num_slow + 1)
    is_over = threading.Event()

    class SlowFetcher:
        def fetch(self, url: str, param: str) -> bytes:
            all_asked.wait(20)
            is_over.wait(20)
            return base64.b64decode(PNG.partition(",")[2])

    monkeypatch.setattr(chat_images, "ImageFetcher", SlowFetcher)
    remote = ask(text_part("What is this?"), {"type": "image_url", "image_url": URL})
    async with connect(make_app(fetch_images=True)) as client:
        slow = [asyncio.create_task(say(client, remote)) for _ in range(num_slow)]
        await asyncio.to_thread(all_asked.wait, 20)
        text = await say(client, ONE)
        assert not any(task.done() for task in slow)
        is_over.set()
        assert await asyncio.gather(*slow) == [text] * num_slow


async def test_a_shape_that_the_model_cannot_read(
    folders: dict[str, Path],
    make_app: MakeApp,
    manager: FakeModelManager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_files, "MAX_SEEN_ASPECT", 1000)
    parts = [text_part("a"), image_part(draw(0, (1000, 2)))]
    with loaded(folders["qwen2_vl"]) as model:
        manager.model = model
        async with connect(make_app()) as client:
            response = await client.post(PATH, json={"messages": ask(*parts)})
    assert "got 500" in assert_error_shape(response, 400, param=PART)


HOOKS = """
def chat_input_modifier(text, visible_text, state):
    return text.replace("this", "that"), visible_text
"""
PROMPT_HOOK = "def custom_generate_chat_prompt(user_input, state, **kwargs): return user_input"
TOKEN_HOOK = """
def tokenizer_modifier(state, prompt, input_ids, input_embeds):
    return prompt, input_ids[:, 1:], input_embeds
"""


async def test_hooks(llava: LoadedModel, load: LoadScripts, make_app: MakeApp) -> None:
    """They see texts; the images stay between them."""
    changed = ask(text_part("What is that?"), image_part(PICTURES[0]))
    async with connect(make_app()) as client:
        expected = await say(client, changed)
    async with connect(load(hooks=HOOKS)) as client:
        assert await say(client, ONE) == expected
    for script in (PROMPT_HOOK, TOKEN_HOOK):
        async with connect(load(hooks=script)) as client:
            response = await client.post(PATH, json={"messages": ONE})
        assert "image" in assert_error_shape(response, 400, param="messages")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_reads_text(
    model: LoadedModel, client: httpx.AsyncClient, stream: bool
) -> None:
    for path in (PATH, "/tokenize", "/v1/internal/chat-prompt"):
        response = await client.post(path, json={"messages": ONE, "stream": stream})
        assert "only a vision model" in assert_error_shape(response, 400, param=PART)
