"""Every error this project raises on purpose. No status codes: the HTTP layer owns that mapping.

ServerError
├── SettingsError                    a flag, environment variable or settings key is wrong
├── ExtensionError                   an extension cannot be found, imported or set up
│   └── HookError                    one of its hooks has failed, in a request
├── TunnelError                      the public URL cannot be had
├── DownloadError                    a model cannot be downloaded from the hub
├── ModelError
│   ├── ModelNotFoundError           no folder, file, package or hub entry has that name
│   ├── ModelLoadError               it is there, and cannot be loaded
│   │   └── UnfitSettingError        as the settings say, which it names
│   ├── NotBatchableError            it can be loaded, and must run one request at a time
│   └── NoModelLoadedError           the request needs a model and none is loaded
├── CapabilityError                  one that the server has in principle cannot be used now
│   ├── MissingPackageError          the package that it is made of is not installed
│   ├── NotConfiguredError           a setting has to be made first
│   └── BackendError                 the other program that does the work cannot be used
├── InvalidRequestError              what the client asked for makes no sense; names the field
│   ├── NotSupportedError            this server does not do such a thing at all
│   ├── ObjectNotFoundError          no such file or batch
│   ├── AdapterNotFoundError         no adapter of that name is loaded
│   ├── StorageFullError             the quota leaves no room for it
│   ├── ContextLengthExceededError   the prompt does not fit into the model's context
│   ├── DataFileNotFoundError        no such character, template, preset or grammar
│   └── TemplateError                a chat template does not compile, or refuses the messages
│       └── TemplateLimitError       it takes too long, or makes too much
└── EngineError
    ├── EngineDeadError              the model has failed, or was stopped; it generates no more
    ├── GenerationFailedError        a fault inside the engine ended this generation
    │   └── NoTokenLeftError         all that might come next has been left out, on request
    └── GenerationAbortedError       the server ended this generation, not the client
"""

from collections.abc import Iterable


class ServerError(Exception):
    """Base of the tree; its text is always fit to be shown to the person who caused it."""


class SettingsError(ServerError):
    pass


class ExtensionError(ServerError):
    pass


class HookError(ExtensionError):
    """`reason` never quotes a text that went through the hook."""

    def __init__(self, extension: str, hook: str, reason: str) -> None:
        super().__init__(f"The extension {extension} has failed in {hook}: {reason}.")


class TunnelError(ServerError):
    pass


class DownloadError(ServerError):
    pass


class ModelError(ServerError):
    pass


class ModelNotFoundError(ModelError):
    pass


class ModelLoadError(ModelError):
    pass


class UnfitSettingError(ModelLoadError):
    """`settings`: names of those at fault, the one to change first of all at first."""

    def __init__(self, message: str, *settings: str) -> None:
        super().__init__(message)
        self.settings = settings


class NotBatchableError(ModelError):
    pass


class NoModelLoadedError(ModelError):
    def __init__(self) -> None:
        super().__init__(
            "No model is loaded. Load one with POST /v1/internal/model/load, or start the server "
            "with --model NAME."
        )


class CapabilityError(ServerError):
    pass


class MissingPackageError(CapabilityError):
    """`capability` is in the plural; `package` is the name that pip knows."""

    def __init__(self, capability: str, package: str) -> None:
        super().__init__(
            f"{capability} need the package {package}, which is not installed, or not whole. "
            f"Install it with: pip install {package}"
        )


class NotConfiguredError(CapabilityError):
    pass


class BackendError(CapabilityError):
    pass


class InvalidRequestError(ServerError):
    """The request cannot be served as it is. `param` is the wire name of the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotSupportedError(InvalidRequestError):
    pass


class ObjectNotFoundError(InvalidRequestError):
    def __init__(self, kind: str, object_id: str) -> None:
        super().__init__(f"There is no {kind} {object_id[:100]!r}.", f"{kind}_id")


class AdapterNotFoundError(InvalidRequestError):
    def __init__(self, name: str, loaded: Iterable[str], param: str) -> None:
        there = ", ".join(loaded)
        there = f"Loaded are: {there}." if there else "None is."
        super().__init__(f"The adapter {name[:100]!r} is not loaded. {there}", param)


class StorageFullError(InvalidRequestError):
    def __init__(self, num_bytes: int, num_free_bytes: int) -> None:
        super().__init__(
            f"There is no room for {num_bytes} bytes: of the quota for files and results of "
            f"batches, {num_free_bytes} are left. Delete some, or raise openai-storage_quota.",
            "file",
        )


class ContextLengthExceededError(InvalidRequestError):
    def __init__(
        self,
        max_model_len: int,
        num_prompt_tokens: int,
        param: str | None = None,
        *,
        is_counted: bool = True,
    ) -> None:
        number = num_prompt_tokens if is_counted else f"at least {num_prompt_tokens}"
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, and the prompt has "
            f"{number}. Please shorten the prompt; at least one token must be left "
            "for the reply.",
            param,
        )
        self.max_model_len = max_model_len
        self.num_prompt_tokens = num_prompt_tokens


class DataFileNotFoundError(InvalidRequestError):
    pass


class TemplateError(InvalidRequestError):
    pass


class TemplateLimitError(TemplateError):
    """With other messages it will be the same again."""


class EngineError(ServerError):
    pass


class EngineDeadError(EngineError):
    pass


class GenerationFailedError(EngineError):
    def __init__(self) -> None:
        super().__init__("The model failed while it was generating this reply.")


class NoTokenLeftError(GenerationFailedError):
    pass


class GenerationAbortedError(EngineError):
    pass
