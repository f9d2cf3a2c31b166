"""/v1/fine-tunes and /v1/fine_tuning/jobs: an answer to who looks for them. Nothing is trained."""

from fastapi import APIRouter, Response

from modules.context import Context
from modules.errors import NotSupportedError

PATHS = ("/v1/fine-tunes", "/v1/fine_tuning/jobs")


def add_routes(router: APIRouter, context: Context) -> None:
    async def refuse() -> Response:
        """Always an error that says so: this server runs models, and trains none."""
        raise NotSupportedError(
            "This server trains no models. Fine-tune one with a program made for it, such as "
            "Hugging Face's TRL or PEFT, merge the result into a model folder, and serve that "
            "with --model."
        )

    for path in PATHS:
        for method in ("GET", "POST"):
            router.add_api_route(path, refuse, methods=[method], tags=["Fine-tuning"])
        below = f"{path}/{{rest:path}}"
        methods = ["GET", "POST", "DELETE"]
        router.add_api_route(below, refuse, methods=methods, include_in_schema=False)
