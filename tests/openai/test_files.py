"""/v1/files over the app: uploads, lists, contents, and what is refused."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import FileObject

from tests.conftest import MakeApp, connect
from tests.openai.assertions import assert_error_shape
from tests.openai.test_clients import assert_no_extra_fields

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
async def client(make_app: MakeApp, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(make_app(user_data_dir=folder)) as client:
        yield client


@pytest.fixture
async def api(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://test/v1", http_client=client, max_retries=0
    )


async def upload(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    file = fields.pop("file", ("a.txt", b"content"))
    return await client.post(
        "/v1/files", data={"purpose": "user_data", **fields}, files={"file": file}
    )


async def test_openai_client(api: openai.AsyncOpenAI) -> None:
    content = bytes(range(256))
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    file = await api.files.create(
        file=("ünï.bin", content), purpose="user_data", expires_after=expiry
    )
    assert (file.filename, file.bytes, file.purpose) == ("ünï.bin", 256, "user_data")
    assert file.expires_at == file.created_at + 3600
    assert_no_extra_fields(file)
    assert await api.files.retrieve(file.id) == file
    assert (await api.files.wait_for_processing(file.id)).status == "processed"
    answer = await api.files.content(file.id)
    assert answer.content == content
    others = [await api.files.create(file=b"x", purpose="batch") for _ in range(4)]
    assert [f.id async for f in api.files.list(limit=2)] == [
        *[other.id for other in reversed(others)],
        file.id,
    ]
    assert [f.id async for f in api.files.list(purpose="user_data")] == [file.id]
    assert [f.id async for f in api.files.list(order="asc", limit=3)][0] == file.id
    gone = await api.files.delete(file.id)
    assert (gone.id, gone.deleted, gone.object) == (file.id, True, "file")
    with pytest.raises(openai.NotFoundError):
        await api.files.retrieve(file.id)


async def test_all_can_be_deleted_while_they_are_listed(api: openai.AsyncOpenAI) -> None:
    for _ in range(5):
        await api.files.create(file=b"x", purpose="vision")
    async for file in api.files.list(limit=2):
        await api.files.delete(file.id)
    assert (await api.files.list()).data == []


async def test_the_shape_of_a_page(client: httpx.AsyncClient) -> None:
    empty = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert (await client.get("/v1/files")).json() == empty
    ids = [(await upload(client)).json()["id"] for _ in range(3)]
    page = (await client.get("/v1/files", params={"limit": 2})).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[2], ids[1], True)
    FileObject.model_validate(page["data"][0], strict=True)


async def test_whatever_it_is_it_comes_as_a_download(client: httpx.AsyncClient) -> None:
    file = ('x"; filename="y.html', b"<script>alert(1)</script>", "text/html")
    file_id = (await upload(client, file=file)).json()["id"]
    answer = await client.get(f"/v1/files/{file_id}/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment; filename*=utf-8''x%")
    assert answer.content == file[1]


async def test_names_and_contents_are_data(client: httpx.AsyncClient, folder: Path) -> None:
    for name in ("../../../etc/passwd", "a" * 2000, " "):
        answer = await upload(client, file=(name, b""))
        assert answer.status_code == 200, answer.text
        assert answer.json()["filename"] == name[:512]
        assert answer.json()["bytes"] == 0
    assert {path.name for path in folder.parent.iterdir()} == {"kept"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fun"}, "purpose"),
        ({"purpose": "batch_output"}, "purpose"),
        ({"expires_after[anchor]": "now"}, "expires_after[anchor]"),
        ({"expires_after[seconds]": "3599"}, "expires_after[seconds]"),
        ({"expires_after[seconds]": "2592001"}, "expires_after[seconds]"),
        ({"expires_after[seconds]": "soon"}, "expires_after[seconds]"),
    ],
)
async def test_fields_that_make_no_sense(
    fields: dict[str, str], param: str, client: httpx.AsyncClient, folder: Path
) -> None:
    assert_error_shape(await upload(client, **fields), 400, param=param)
    assert not folder.exists()


async def test_fields_that_are_missing(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/files", files={"file": b"x"})
    assert_error_shape(answer, 400, param="purpose")
    fields = {"purpose": (None, "batch"), "file": (None, "a text, no file")}
    assert_error_shape(await client.post("/v1/files", files=fields), 400, param="file")
    assert_error_shape(await client.post("/v1/files", json={"purpose": "batch"}), 400)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"limit": "all"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "file-1' OR 1"}, "after"),
        ({"purpose": "fun"}, "purpose"),
    ],
)
async def test_lists_that_make_no_sense(
    query: dict[str, Any], param: str, client: httpx.AsyncClient
) -> None:
    assert_error_shape(await client.get("/v1/files", params=query), 400, param=param)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_what_is_not_there(method: str, client: httpx.AsyncClient, folder: Path) -> None:
    for path in ("file-1", "..%2Fstorage.sqlite3", f"file-{'0' * 32}"):
        answer = await client.request(method, f"/v1/files/{path}")
        assert answer.status_code == 404
    answer = await client.get("/v1/files/file-1/content")
    message = assert_error_shape(answer, 404, param="file_id")
    assert message == "There is no file 'file-1'."
    assert not folder.exists()


async def test_a_content_that_somebody_has_taken_away(
    client: httpx.AsyncClient, folder: Path
) -> None:
    file_id = (await upload(client)).json()["id"]
    (folder / "files" / file_id).unlink()
    answer = await client.get(f"/v1/files/{file_id}/content")
    assert_error_shape(answer, 404, param="file_id")
    assert (await client.delete(f"/v1/files/{file_id}")).status_code == 200


async def test_the_quota(make_app: MakeApp, folder: Path) -> None:
    app = make_app(user_data_dir=folder, storage_quota=1 / 1024)
    async with connect(app) as client:
        big = ("a", b"x" * 2**20)
        file_id = (await upload(client, file=big)).json()["id"]
        answer = await upload(client, file=("b", b"x"))
        message = assert_error_shape(answer, 413, param="file", code="storage_quota_exceeded")
        assert re.search("0 are left.*storage_quota", message)
        await client.delete(f"/v1/files/{file_id}")
        assert (await upload(client, file=big)).status_code == 200


async def test_a_file_larger_than_a_request_may_be(make_app: MakeApp, folder: Path) -> None:
    async with connect(make_app(user_data_dir=folder, max_request_size=1)) as client:
        answer = await upload(client, file=("a", b"x" * 2**20))
        assert_error_shape(answer, 413, code="request_too_large")
    assert not folder.exists()


async def test_without_a_folder(make_app: MakeApp, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    async with connect(make_app(user_data_dir=tmp_path / "taken")) as client:
        for answer in (await upload(client), await client.get("/v1/files")):
            message = assert_error_shape(answer, 503, code="not_configured")
            assert "--user-data-dir" in message


async def test_keys_are_asked_for(make_app: MakeApp, folder: Path) -> None:
    paths = ("/v1/files", "/v1/files/file-1", "/v1/files/file-1/content", "/v1/batches")
    paths += ("/v1/batches/batch_1", "/v1/fine_tuning/jobs", "/v1/fine-tunes/ft-1/events")
    async with connect(make_app(user_data_dir=folder, api_key="sk-1")) as client:
        for path in paths:
            assert_error_shape(await client.get(path), 401, code="invalid_api_key")
        assert_error_shape(await upload(client), 401, code="invalid_api_key")
    assert not folder.exists()


async def test_fine_tuning_says_that_there_is_none(api: openai.AsyncOpenAI) -> None:
    async def refused(call: Any) -> str:
        with pytest.raises(openai.BadRequestError) as caught:
            await call
        assert caught.value.code == "not_supported"
        return caught.value.message

    jobs = api.fine_tuning.jobs
    assert "--model" in await refused(jobs.create(model="tiny", training_file="file-1"))
    await refused(jobs.list())
    await refused(jobs.retrieve("ftjob-1"))
    await refused(jobs.cancel("ftjob-1"))
    await refused(jobs.list_events("ftjob-1"))


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_nor_is_there_the_older_kind(method: str, client: httpx.AsyncClient) -> None:
    for path in ("/v1/fine-tunes", "/v1/fine-tunes/ft-1", "/v1/fine-tunes/ft-1/cancel"):
        answer = await client.request(method, path)
        assert "trains no models" in assert_error_shape(answer, 400, code="not_supported")
