"""JsonRequest: a request whose body is JSON, whatever its content type says."""

import json
from typing import Any

from fastapi import Request
from pydantic_core import from_json
from starlette.datastructures import Headers


class JsonRequest(Request):
    """`curl -d` without a header declares a form; the body is JSON all the same."""

    @property
    def headers(self) -> Headers:
        if not hasattr(self, "_headers"):
            raw = [pair for pair in self.scope["headers"] if pair[0].lower() != b"content-type"]
            self._headers = Headers(raw=[*raw, (b"content-type", b"application/json")])
        return self._headers

    async def json(self) -> Any:
        """Strict: no NaN, no half of a surrogate pair, no endless nesting, UTF-8 only.

        Raises json.JSONDecodeError, which FastAPI turns into a validation error.
        """
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None
