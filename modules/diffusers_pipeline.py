"""A backend for images: a diffusers pipeline in a folder of this machine, loaded at its first use.

It runs in a worker's thread, one picture after the other, each with random numbers of its own: the
same seed gives the same picture, whatever else a request asks for. It can be stopped between steps.
Requests are checked in another thread, where they need not wait for the pictures of others.
"""

from __future__ import annotations

import inspect
import io
import math
import secrets
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.errors import (
    BackendError,
    InvalidRequestError,
    ModelLoadError,
    NotConfiguredError,
)
from modules.image_backend import (
    EditRequest,
    FinishedImage,
    GenerationRequest,
    ImageEvent,
    ImageOptions,
    PartialImage,
    Request,
    Size,
    VariationRequest,
)
from modules.image_files import encode, load_pillow
from modules.optional_packages import import_package
from modules.worker import Outlet, Worker

if TYPE_CHECKING:
    from PIL import Image

# Of pipelines that do not tell.
DEFAULT_SIZE = Size(1024, 1024)
DEFAULT_STEPS = 30
MAX_SEED = 2**32
# What diffusers and torch raise of arguments that do not go together.
_FAULTS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
# Samplers as the web UI calls them → diffusers' scheduler, and what to change of its configuration.
SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "PLMS": ("PNDMScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}


class DiffusersPipeline:
    def __init__(self, folder: Path, is_on_cpu: bool) -> None:
        self._folder = folder
        self._worker = Worker("images", lambda: _Pipelines(folder, is_on_cpu))
        self._checks = Worker("image checks", lambda: None)
        self._pipelines: _Pipelines | None = None

    @property
    def loaded_name(self) -> str | None:
        """Of the folder, once it is in memory."""
        return self._folder.name if self._worker.resource else None

    async def prepare(self) -> Size:
        return (await self._get_pipelines()).size

    async def check(self, request: Request) -> None:
        pipelines = await self._get_pipelines()
        await self._checks.run(lambda _: pipelines.check(request))

    def generate(self, request: GenerationRequest) -> AsyncGenerator[ImageEvent, None]:
        return self._run(request)

    def edit(self, request: EditRequest) -> AsyncGenerator[ImageEvent, None]:
        return self._run(request)

    def vary(self, request: VariationRequest) -> AsyncGenerator[ImageEvent, None]:
        return self._run(request)

    def close(self) -> None:
        self._checks.close()
        self._worker.close()

    async def _get_pipelines(self) -> _Pipelines:
        if self._pipelines is None:
            self._pipelines = await self._worker.run(lambda pipelines: pipelines)
        return self._pipelines

    def _run(self, request: Request) -> AsyncGenerator[ImageEvent, None]:
        return self._worker.stream_from(lambda pipelines, outlet: pipelines.run(request, outlet))


class _Pipelines:
    """One set of weights, and the pipelines over them. Lives in the worker's thread; `check` may be
    called in another one.
    """

    def __init__(self, folder: Path, is_on_cpu: bool) -> None:
        load_pillow()
        self._diffusers: Any = import_package("diffusers", "Images", "diffusers")
        # Its warnings quote what of a prompt is too long.
        self._diffusers.utils.logging.set_verbosity_error()
        self._diffusers.utils.logging.disable_progress_bar()
        self._pipeline = self._load(folder, is_on_cpu)
        self._scheduler_config = self._pipeline.scheduler.config
        self._scheduler_class = type(self._pipeline.scheduler)
        self._samplers = self._find_samplers()
        self.size = _find_own_size(self._pipeline)

    def check(self, request: Request) -> None:
        """Raises InvalidRequestError. Nothing of a pipeline that is at work is changed."""
        pipeline = self._get_pipeline(request)
        _choose_fields(pipeline, request.options)
        scheduler = self._make_scheduler(request.options.sampler_name)
        _check_steps(scheduler, _choose_steps(pipeline, request))

    def run(self, request: Request, outlet: Outlet[ImageEvent]) -> None:
        """Raises InvalidRequestError and CapabilityError, and what `outlet` raises."""
        import torch

        pipeline = self._get_pipeline(request)
        options = request.options
        seed = secrets.randbelow(MAX_SEED) if options.seed is None else options.seed
        arguments = _to_arguments(pipeline, request)
        try:
            for index in range(options.num_images):
                pipeline.set_progress_bar_config(disable=True)
                pipeline.scheduler = self._make_scheduler(options.sampler_name)
                watch = _Watch(options, index, outlet)
                picture = pipeline(
                    **arguments,
                    **_take(pipeline, callback_on_step_end=watch),
                    generator=torch.Generator("cpu").manual_seed(seed + index),
                ).images[0]
                outlet.put(_finish(picture, request))
        except torch.OutOfMemoryError:
            raise BackendError("There is not enough memory for an image of that size.") from None
        except _FAULTS as error:
            kind = type(error).__name__
            raise BackendError(f"The image model cannot do what was asked for ({kind}).") from error

    def _load(self, folder: Path, is_on_cpu: bool) -> Any:
        import torch

        if not (folder / "model_index.json").is_file():
            raise NotConfiguredError(
                f"openai-image_model: there is no diffusers pipeline in {folder}; it would have a "
                "model_index.json."
            )
        is_on_card = torch.cuda.is_available() and not is_on_cpu
        try:
            pipeline = self._diffusers.AutoPipelineForText2Image.from_pretrained(
                folder,
                dtype=torch.bfloat16 if is_on_card else torch.float32,
                variant=_find_variant(folder),
                use_safetensors=True,
                local_files_only=True,
            )
            return pipeline.to("cuda" if is_on_card else "cpu")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
            first_line, *_ = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelLoadError(
                f"{folder} cannot be loaded as a diffusers pipeline: {first_line}"
            ) from error

    def _get_pipeline(self, request: Request) -> Any:
        match request:
            case GenerationRequest():
                return self._pipeline
            case EditRequest(mask=bytes()):
                kind, name = self._diffusers.AutoPipelineForInpainting, "mask"
            case _:
                kind, name = self._diffusers.AutoPipelineForImage2Image, "image"
        try:
            return kind.from_pipe(self._pipeline)
        except ValueError:
            raise InvalidRequestError(
                f"The image model, a {type(self._pipeline).__name__}, takes no {name}.", name
            ) from None

    def _make_scheduler(self, sampler_name: str | None) -> Any:
        """A new one each time: they remember steps."""
        if sampler_name is None:
            return self._scheduler_class.from_config(self._scheduler_config)
        if sampler_name not in self._samplers:
            names = f"one of: {', '.join(self._samplers)}" if self._samplers else "left out"
            raise InvalidRequestError(f"The sampler should be {names}.", "sampler_name")
        class_name, changes = SAMPLERS[sampler_name]
        scheduler_class = getattr(self._diffusers, class_name)
        try:
            return scheduler_class.from_config(self._scheduler_config, **changes)
        except _FAULTS as error:
            message = "The image model does not go together with this sampler."
            raise InvalidRequestError(message, "sampler_name") from error

    def _find_samplers(self) -> list[str]:
        known = (self._scheduler_class, *getattr(self._pipeline.scheduler, "compatibles", []))
        return [
            name
            for name, (class_name, _) in SAMPLERS.items()
            if getattr(self._diffusers, class_name) in known
        ]


class _Watch:
    """What a pipeline calls after each step of one picture."""

    def __init__(self, options: ImageOptions, index: int, outlet: Outlet[ImageEvent]) -> None:
        self._options = options
        self._index = index
        self._outlet = outlet

    def __call__(self, pipeline: Any, step: int, timestep: Any, state: Any) -> Any:
        self._outlet.check()
        if self._is_time(step, pipeline.num_timesteps) and "latents" in state:
            picture = _decode_latents(pipeline, state["latents"])
            if picture is not None:
                data = encode(picture, self._options.output)
                self._outlet.put(PartialImage(data, Size(*picture.size)))
        return state

    def _is_time(self, step: int, num_steps: int) -> bool:
        """Whether one of the partial pictures is due: they are spread evenly over all steps."""
        num_parts = self._options.num_partial_images + 1
        all_steps = num_steps * self._options.num_images
        done = num_steps * self._index + step + 1
        is_last = step + 1 == num_steps
        return not is_last and done * num_parts // all_steps > (done - 1) * num_parts // all_steps


def _to_arguments(pipeline: Any, request: Request) -> dict[str, Any]:
    """Raises InvalidRequestError."""
    return {
        "prompt": request.options.prompt,
        "num_inference_steps": _choose_steps(pipeline, request),
        **_choose_fields(pipeline, request.options),
        **_take(pipeline, width=request.size.width, height=request.size.height),
        **_take(pipeline, **_to_start(request)),
    }


def _choose_fields(pipeline: Any, options: ImageOptions) -> dict[str, Any]:
    """Raises InvalidRequestError for what was asked for and this pipeline does not know."""
    wishes = {
        "negative_prompt": options.negative_prompt or None,
        "guidance_scale": options.guidance_scale,
    }
    wishes = {name: value for name, value in wishes.items() if value is not None}
    taken = _take(pipeline, **wishes)
    for name in wishes:
        if name not in taken:
            wire_name = "cfg_scale" if name == "guidance_scale" else name
            message = f"The image model, a {type(pipeline).__name__}, does not take this field."
            raise InvalidRequestError(message, wire_name)
    return taken


def _check_steps(scheduler: Any, num_steps: int) -> None:
    """Raises InvalidRequestError. `scheduler` is of no use afterwards."""
    # Some want to know how large the picture is, by a number that only the pipeline works out.
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        scheduler.set_timesteps(num_steps, **shift)
    except _FAULTS as error:
        message = f"The sampler cannot work with {num_steps} steps."
        raise InvalidRequestError(message, "steps") from error


def _take(pipeline: Any, **arguments: Any) -> dict[str, Any]:
    """Those that the pipeline knows."""
    known = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in arguments.items() if name in known}


def _choose_steps(pipeline: Any, request: Request) -> int:
    options = request.options
    default = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    own = default if isinstance(default, int) else DEFAULT_STEPS
    steps = options.steps or max(1, round(own * options.effort))
    if isinstance(request, GenerationRequest):
        return steps
    # Only this share of them is taken, and one has to be.
    return max(steps, math.ceil(1 / request.strength))


def _to_start(request: Request) -> dict[str, Any]:
    match request:
        case EditRequest(mask=bytes(mask)):
            mask_image = {"mask_image": _open(mask)}
        case EditRequest() | VariationRequest():
            mask_image = {}
        case _:
            return {}
    return {"image": _open(request.image), "strength": request.strength, **mask_image}


def _finish(picture: Image.Image, request: Request) -> FinishedImage:
    from PIL import Image

    if isinstance(request, EditRequest) and request.mask is not None:
        # What was not to be edited is as it was, and not as the model's decoder would paint it.
        scaled = picture.convert("RGB").resize(request.size)
        picture = Image.composite(scaled, _open(request.image), _open(request.mask))
    return FinishedImage(encode(picture, request.options.output), Size(*picture.size))


def _open(png: bytes) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def _decode_latents(pipeline: Any, latents: Any) -> Image.Image | None:
    """The picture so far. None: they are packed in a way that only the pipeline knows."""
    config = pipeline.vae.config
    is_plain = latents.ndim == 4 and latents.shape[1] == config.get("latent_channels")
    scale = config.get("scaling_factor")
    if not is_plain or scale is None:
        return None
    plain = latents / scale + (config.get("shift_factor") or 0)
    decoded = pipeline.vae.decode(plain.to(pipeline.vae.dtype), return_dict=False)[0]
    picture: Image.Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    return picture


def _find_own_size(pipeline: Any) -> Size:
    """Of the pictures that the model has learnt from."""
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    sample_size = getattr(pipeline, "default_sample_size", None)
    if sample_size is None and model is not None:
        sample_size = model.config.get("sample_size")
    scale = getattr(pipeline, "vae_scale_factor", 8)
    match sample_size:
        case int():
            return Size(sample_size * scale, sample_size * scale)
        case (int(height), int(width)):
            return Size(width * scale, height * scale)
    return DEFAULT_SIZE


def _find_variant(folder: Path) -> str | None:
    """The weights' own name, where there is only one set and it has one: as in model.fp16."""
    files = [path.name for path in folder.glob("*/*.safetensors")]
    is_half = bool(files) and all(".fp16." in name for name in files)
    return "fp16" if is_half else None
