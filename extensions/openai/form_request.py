"""FormRequest: a request whose body is a form, with files that stay in memory."""

from typing import Any

from fastapi import HTTPException, Request
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser


class FormRequest(Request):
    """Fields are text, UploadFile, or lists of them."""

    async def form(self, **limits: Any) -> FormData:  # type: ignore[override]
        """`name[]`, as clients call the items of a list, is `name` here.

        Raises HTTPException 400 if the body is no such form.
        """
        if not hasattr(self, "_fields"):
            content_type = self.headers.get("content-type", "")
            if not content_type.lower().startswith("multipart/form-data"):
                message = "The body should be a form, sent as multipart/form-data (curl -F)."
                raise HTTPException(400, message)
            try:
                form = await _MemoryParser(self.headers, self.stream(), **limits).parse()
            except MultiPartException as error:
                raise HTTPException(400, f"The form cannot be read: {error.message}") from None
            self._fields = FormData(
                [(name.removesuffix("[]"), value) for name, value in form.multi_items()]
            )
        return self._fields


class _MemoryParser(MultiPartParser):
    # Starlette's own writes what is larger than a megabyte to the disk. How large a body may be is
    # middleware.BodyLimitMiddleware's business.
    spool_max_size = 2**62
