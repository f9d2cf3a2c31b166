"""The model that a request uses, as a dependency of its route: it stays until the answer is sent.

The exit of a dependency comes after a response's last byte, and after a client that leaves.
"""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, Request

from extensions.openai.auth import has_key
from modules.context import Context
from modules.models import ModelLease


def depend_on_lease(context: Context) -> Any:
    """The default of a route's argument `lease: ModelLease`."""

    async def open_lease(request: Request) -> AsyncIterator[ModelLease]:
        is_admin = has_key(request, context.settings.admin_key)
        with context.models.lease(tells_all=is_admin) as lease:
            yield lease

    return Depends(open_lease)
