"""A pipeline of this machine: real diffusers code over random weights."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image, ImageChops

from modules import diffusers_pipeline
from modules.errors import InvalidRequestError, ModelLoadError, NotConfiguredError
from modules.image_backend import FinishedImage, ImageOptions, PartialImage, Size
from modules.images import Images
from modules.settings import Settings
from tests.conftest import AsgiCall, MakeApp, connect, wait_for
from tests.modules.tiny_pipeline import NUM_STEPS, SIDE, build_pipeline
from tests.openai.assertions import assert_error_shape

pytestmark = pytest.mark.anyio

OWN_SIZE = Size(SIDE, SIDE)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More of them cost more than they bring, with numbers so few."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def images(folder: Path) -> Iterator[Images]:
    images = Images(Settings(image_model=folder, cpu=True))
    yield images
    images.close()


def options(**changes: Any) -> ImageOptions:
    return ImageOptions(**{"prompt": "a red door", "seed": 1, "steps": NUM_STEPS, **changes})


async def collect(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


async def draw(images: Images, **changes: Any) -> list[bytes]:
    events = await collect(await images.generate(options(**changes)))
    assert all(isinstance(event, FinishedImage) for event in events)
    return [event.data for event in events]


def to_picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def to_file(picture: Image.Image) -> bytes:
    target = io.BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()


def start_file(size: tuple[int, int] = OWN_SIZE) -> bytes:
    return to_file(Image.linear_gradient("L").resize(size).convert("RGB"))


# Words


async def test_a_seed_gives_the_same_pictures(images: Images) -> None:
    """In any company: the second picture of seed 1 is the first of seed 2."""
    first, second = await draw(images, num_images=2)
    assert first != second
    assert await draw(images) == [first]
    assert await draw(images, seed=2) == [second]
    assert await draw(images, seed=None) != await draw(images, seed=None)


async def test_what_a_request_says_counts(images: Images) -> None:
    changes = (
        {},
        {"prompt": "a blue door"},
        {"negative_prompt": "dark"},
        {"guidance_scale": 1.5},
        {"steps": NUM_STEPS + 1},
        {"sampler_name": "Euler a"},
        {"sampler_name": "DPM++ 2M Karras"},
    )
    pictures = [(await draw(images, **change))[0] for change in changes]
    assert len(set(pictures)) == len(changes)
    assert (await draw(images))[0] == pictures[0]  # another sampler leaves nothing behind


async def test_sizes(images: Images) -> None:
    own, other = [(await draw(images, size=size))[0] for size in (None, Size(128, 72))]
    assert to_picture(own).size == OWN_SIZE
    assert to_picture(other).size == (128, 72)


async def test_steps_follow_the_effort(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watch(diffusers_pipeline._Watch):
        def __call__(self, pipeline: Any, step: int, timestep: Any, state: Any) -> Any:
            seen.append(step)
            return super().__call__(pipeline, step, timestep, state)

    monkeypatch.setattr(diffusers_pipeline, "_Watch", Watch)
    await draw(images, steps=None, effort=0.1)
    assert len(seen) == 5  # of the fifty that this pipeline takes by itself


async def test_pictures_on_the_way(images: Images) -> None:
    request = options(num_images=2, num_partial_images=3, steps=8)
    events = await collect(await images.generate(request))
    kinds = [type(event) for event in events]
    assert kinds == [PartialImage, FinishedImage, PartialImage, FinishedImage]
    partial = [to_picture(event.data) for event in events if isinstance(event, PartialImage)]
    assert [picture.size for picture in partial] == [OWN_SIZE] * 2
    plain = await draw(images, num_images=2, steps=8)
    assert [event.data for event in events if isinstance(event, FinishedImage)] == plain


# Pictures


async def test_an_edit_follows_the_picture(images: Images) -> None:
    """The less, the stronger it is."""
    start = start_file()
    edits = [
        await collect(await images.edit(options(), start, None, strength))
        for strength in (0.01, 0.5, 1.0)
    ]
    pictures = [to_picture(event.data) for [event] in edits]
    assert len({picture.tobytes() for picture in pictures}) == 3
    again = await collect(await images.edit(options(), start, None, 0.5))
    assert to_picture(again[0].data).tobytes() == pictures[1].tobytes()


async def test_a_mask_keeps_what_it_covers(images: Images) -> None:
    start = start_file()
    mask = Image.new("RGBA", OWN_SIZE, "black")
    mask.paste((0, 0, 0, 0), (0, 0, SIDE // 2, SIDE))
    [event] = await collect(await images.edit(options(), start, to_file(mask), None))
    changed = ImageChops.difference(to_picture(event.data), to_picture(start)).getbbox()
    assert changed is not None
    assert changed[2] <= SIDE // 2


async def test_variations(images: Images) -> None:
    request = options(prompt="", num_images=2)
    first, second = await collect(await images.vary(request, start_file((90, 40)), None))
    assert first.data != second.data
    assert to_picture(first.data).size == (88, 64)


# Over HTTP


async def test_openai_calls_all_three(make_app: MakeApp, folder: Path) -> None:
    app = make_app(image_model=folder, cpu=True, sd_webui_url="http://127.0.0.1:1")
    async with connect(app) as http_client:
        api = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http_client)
        extra = {"extra_body": {"steps": NUM_STEPS}}
        model = "gpt-image-2"
        generated = await api.images.generate(prompt="a door", model=model, **extra)
        edited = await api.images.edit(image=start_file(), prompt="a door", model=model, **extra)
        varied = await api.images.create_variation(image=start_file(), n=2, **extra)
        stream = await api.images.generate(
            prompt="a door", stream=True, partial_images=1, output_format="jpeg", **extra
        )
        kinds = [event.type async for event in stream]
    assert generated.size == edited.size == f"{SIDE}x{SIDE}"
    assert len(varied.data) == 2
    assert kinds == ["image_generation.partial_image", "image_generation.completed"]


async def test_who_leaves_ends_it_between_two_steps(
    make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches = []

    class Watch(diffusers_pipeline._Watch):
        def __call__(self, pipeline: Any, step: int, timestep: Any, state: Any) -> Any:
            watches.append(step)
            begun.set()
            return super().__call__(pipeline, step, timestep, state)

    monkeypatch.setattr(diffusers_pipeline, "_Watch", Watch)
    begun = threading.Event()
    app = make_app(image_model=folder, cpu=True)
    call = AsgiCall(app, "/v1/images/generations", {"prompt": "a door", "steps": 150, "n": 10})
    await wait_for(begun)
    call.disconnect()
    await call.wait()
    async with connect(app) as client:
        body = {"prompt": "a door", "steps": 1}
        assert (await client.post("/v1/images/generations", json=body)).status_code == 200
    assert len(watches) < 150


async def test_an_unknown_sampler(images: Images) -> None:
    with pytest.raises(InvalidRequestError, match="one of: DDIM, .*Euler a") as caught:
        await draw(images, sampler_name="Oiler")
    assert caught.value.param == "sampler_name"


# What cannot be done


@pytest.fixture(scope="module")
def lcm_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a kind that takes no mask and no negative prompt, and with a UNet that is not for it."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("pipeline") / "lcm")
    index = json.loads((copy / "model_index.json").read_text())
    index |= {
        "_class_name": "LatentConsistencyModelPipeline",
        "scheduler": ["diffusers", "LCMScheduler"],
    }
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"sampler_name": "Oiler"}, "sampler_name"),
        ({"sampler_name": "PLMS", "steps": 1}, "steps"),
    ],
)
async def test_streams_are_refused_before_they_begin(
    make_app: MakeApp, folder: Path, changes: dict[str, Any], param: str
) -> None:
    async with connect(make_app(image_model=folder, cpu=True)) as client:
        body = {"prompt": "a door", "stream": True, **changes}
        response = await client.post("/v1/images/generations", json=body)
        message = assert_error_shape(response, 400, param=param)
        assert "shapes" not in message
        data = {"prompt": "a door", "stream": "true", **changes}
        files = {"image": start_file()}
        response = await client.post("/v1/images/edits", data=data, files=files)
        assert_error_shape(response, 400, param=param)
        data.pop("stream")
        response = await client.post("/v1/images/variations", data=data, files=files)
        assert_error_shape(response, 400, param=param)


async def test_what_a_pipeline_does_not_take(make_app: MakeApp, lcm_folder: Path) -> None:
    async with connect(make_app(image_model=lcm_folder, cpu=True)) as client:
        body = {"prompt": "a door", "stream": True, "negative_prompt": "dark"}
        response = await client.post("/v1/images/generations", json=body)
        assert_error_shape(response, 400, param="negative_prompt")
        mask = to_file(Image.new("RGBA", OWN_SIZE))
        response = await client.post(
            "/v1/images/edits",
            data={"prompt": "a door", "stream": "true"},
            files={"image": start_file(), "mask": mask},
        )
        assert_error_shape(response, 400, param="mask")


async def test_a_pipeline_that_fails(make_app: MakeApp, lcm_folder: Path) -> None:
    async with connect(make_app(image_model=lcm_folder, cpu=True)) as client:
        body = {"prompt": "a door", "steps": 1}
        response = await client.post("/v1/images/generations", json=body)
    message = assert_error_shape(response, 503, code="backend_unavailable")
    assert message == "The image model cannot do what was asked for (TypeError)."


async def test_a_request_is_checked_while_another_one_is_at_work(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watch(diffusers_pipeline._Watch):
        def __call__(self, pipeline: Any, step: int, timestep: Any, state: Any) -> Any:
            begun.set()
            assert checked.wait(30)
            return super().__call__(pipeline, step, timestep, state)

    monkeypatch.setattr(diffusers_pipeline, "_Watch", Watch)
    begun, checked = threading.Event(), threading.Event()
    first = asyncio.create_task(draw(images))
    await wait_for(begun)
    with pytest.raises(InvalidRequestError):
        await images.generate(options(sampler_name="Oiler"))
    await images.vary(options(), start_file(), None)
    checked.set()
    assert len(await first) == 1


async def test_no_prompt_is_written_anywhere(
    images: Images, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers would warn of what is beyond the 77 tokens that CLIP reads, and quote it."""
    await draw(images, prompt="a " * 100 + "zebra", steps=1)
    out, err = capfd.readouterr()
    assert "zebra" not in out + err + caplog.text
    assert "it/s" not in err


# Folders that are none


async def test_a_folder_without_a_pipeline(make_app: MakeApp, tmp_path: Path) -> None:
    images = Images(Settings(image_model=tmp_path / "none", cpu=True))
    with pytest.raises(NotConfiguredError, match="model_index.json"):
        await images.generate(options())
    async with connect(make_app(image_model=tmp_path, cpu=True)) as client:
        body = {"prompt": "a door", "stream": True}
        response = await client.post("/v1/images/generations", json=body)
        assert_error_shape(response, 503, code="not_configured")


async def test_weights_have_to_be_safetensors(folder: Path, tmp_path: Path) -> None:
    """Others are programs, which loading would run."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    [weights] = (copy / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    images = Images(Settings(image_model=copy, cpu=True))
    with pytest.raises(ModelLoadError, match="safetensors"):
        await images.generate(options())


async def test_weights_in_half_precision(folder: Path, tmp_path: Path, images: Images) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for weights in copy.glob("*/*.safetensors"):
        weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    half = Images(Settings(image_model=copy, cpu=True))
    assert await draw(half) == await draw(images)


async def test_a_pipeline_of_another_kind(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDPMPipeline"}))
    images = Images(Settings(image_model=copy, cpu=True))
    with pytest.raises(ModelLoadError, match="DDPMPipeline"):
        await images.generate(options())


async def test_diffusers_is_not_installed(
    make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    async with connect(make_app(image_model=folder, cpu=True)) as client:
        response = await client.post("/v1/images/generations", json={"prompt": "a door"})
    message = assert_error_shape(response, 503, code="package_missing")
    assert "pip install diffusers" in message
