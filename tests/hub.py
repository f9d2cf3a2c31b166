"""A server that speaks as much of the Hugging Face hub's API as a download needs."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

COMMIT = "a" * 40


@dataclass
class Hub:
    """`repos`: {name: {path: content}}; files that are not text are what the hub calls LFS."""

    repos: dict[str, dict[str, bytes]]
    cut_after: deque[int] = field(default_factory=deque)
    """So many bytes of the next large files arrive, then the connection breaks."""
    ranges: list[str] = field(default_factory=list)
    """What was asked for of large files."""
    tokens: list[str] = field(default_factory=list)
    damages: bool = False
    """Send large files with other bytes than it has."""
    holds: threading.Event | None = None
    """What large files wait for, after their first half."""
    is_held: threading.Event = field(default_factory=threading.Event)

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/api/models/{org}/{name}/revision/{branch}", self._tell),
                Route("/api/models/{org}/{name}/tree/{commit}", self._list),
                Route("/{org}/{name}/resolve/{commit}/{path:path}", self._send),
            ]
        )

    async def _tell(self, request: Request) -> Response:
        self.tokens.append(request.headers.get("authorization", ""))
        repo = "{org}/{name}".format(**request.path_params)
        if repo == "org/gated":
            return _refuse(403, "GatedRepo")
        if repo not in self.repos:
            return _refuse(404, "RepoNotFound")
        if request.path_params["branch"] not in ("main", "other"):
            return _refuse(404, "RevisionNotFound")
        siblings = [_describe(path, content) for path, content in self.repos[repo].items()]
        return JSONResponse({"id": repo, "sha": COMMIT, "siblings": siblings})

    async def _list(self, request: Request) -> Response:
        files = self.repos["{org}/{name}".format(**request.path_params)]
        return JSONResponse(
            [
                {"type": "file", "oid": "b" * 40, "size": len(content), "path": path}
                for path, content in files.items()
            ]
        )

    async def _send(self, request: Request) -> Response:
        params = request.path_params
        path = params["path"]
        content = self.repos["{org}/{name}".format(**params)][path]
        headers = {
            "x-repo-commit": COMMIT,
            "etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "accept-ranges": "bytes",
        }
        if request.method == "HEAD":
            return Response(headers={**headers, "content-length": str(len(content))})
        if _is_text(path):
            return Response(content, headers=headers)
        asked = request.headers.get("range", "")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        if self.damages:
            content = bytes(len(content))
        rest = content[start:]
        if start:
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["content-length"] = str(len(rest))
        status = 206 if start else 200
        if self.holds is not None:
            return StreamingResponse(self._hold(rest, self.holds), status, headers)
        if self.cut_after:
            return StreamingResponse(_break(rest[: self.cut_after.popleft()]), status, headers)
        return Response(rest, status, headers)

    async def _hold(self, content: bytes, event: threading.Event) -> Any:
        half = len(content) // 2
        yield content[:half]
        self.is_held.set()
        await asyncio.to_thread(event.wait, 60)
        yield content[half:]


async def _break(content: bytes) -> Any:
    yield content
    raise ConnectionAbortedError("as a network does")


def _refuse(status: int, code: str) -> Response:
    return JSONResponse({"error": code}, status, {"x-error-code": code})


def _is_text(path: str) -> bool:
    return path.endswith((".json", ".txt", ".md", ".py", ".jinja"))


def _describe(path: str, content: bytes) -> dict[str, Any]:
    described: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": "b" * 40}
    if not _is_text(path):
        digest = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 1}
    return described
