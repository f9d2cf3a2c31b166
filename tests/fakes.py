"""Hand-written stand-ins: an engine that plays scripts, a byte tokenizer, a model manager."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modules.adapters import Adapters
from modules.engine.outputs import FinishReason, TokenOutput, TopLogprobs
from modules.engine.sequence import SequenceRequest
from modules.errors import EngineDeadError, GenerationAbortedError
from modules.instruction_templates import ChatTemplate, TemplateSource
from modules.loaded_model import LoadedModel
from modules.models import ModelManager
from modules.prompt_encoder import PromptEncoder
from modules.settings import Settings
from modules.vocabulary import Vocabulary

END_OF_TEXT, IM_START, IM_END = 256, 257, 258
VOCAB_SIZE = 259

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@dataclass(frozen=True, slots=True)
class Script:
    """What the engine does with one sequence: token ids, then one way to end."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason = FinishReason.STOP
    """STOP adds an end-of-sequence token; LENGTH and ABORT are put on the last token."""
    logprob: float = -1.0
    num_cached_tokens: int = 0
    blocks: bool = False
    """Wait after the tokens until everything is ended, instead of ending."""
    error: Exception | None = None
    """Raise it after the tokens, instead of ending."""

    def play(self, request: SequenceRequest) -> list[TokenOutput]:
        ends = not (self.blocks or self.error)
        ids = (*self.token_ids, IM_END) if ends and self.finish_reason == "stop" else self.token_ids
        finish_reason = self.finish_reason if ends else None
        max_tokens = request.params.max_tokens
        if max_tokens is not None and max_tokens < len(ids):
            ids, finish_reason = ids[:max_tokens], FinishReason.LENGTH
        outputs = [
            TokenOutput(
                request.request_id,
                token_id,
                finish_reason if i == len(ids) - 1 else None,
                self.num_cached_tokens,
                self.logprob if request.params.num_logprobs is not None else None,
                self._build_top(token_id, request),
            )
            for i, token_id in enumerate(ids)
        ]
        return [*self._score(request), *outputs]

    def _score(self, request: SequenceRequest) -> list[TokenOutput]:
        """What `prompt_logprobs` asks for."""
        ids = request.prompt_token_ids if request.params.prompt_logprobs else ()
        ends = request.params.max_tokens == 0
        return [
            TokenOutput(
                request.request_id,
                token_id,
                FinishReason.LENGTH if ends and i == len(ids) - 1 else None,
                logprob=self.logprob if i else None,
                top_logprobs=self._build_top(token_id, request) if i else (),
                is_prompt=True,
            )
            for i, token_id in enumerate(ids)
        ]

    def _build_top(self, token_id: int, request: SequenceRequest) -> TopLogprobs:
        """Tokens beside it, the less likely the further."""
        num = request.params.num_logprobs or 0
        return tuple(((token_id + i) % VOCAB_SIZE, self.logprob - i) for i in range(num))


@dataclass(slots=True)
class FakeEngine:
    """The interface of AsyncEngine, over scripts that tests enqueue; one is played per sequence.

    Its events are of `threading`: a test may wait for them in another thread than the loop's.
    """

    scripts: deque[Script] = field(default_factory=deque)
    requests: list[SequenceRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    """Ids that `abort` was called for while they were running."""
    is_dead: bool = False
    is_stopped: bool = False
    blocked: threading.Event = field(default_factory=threading.Event)
    """Set when a script waits for `stop` or `abort_all`."""
    closed: threading.Event = field(default_factory=threading.Event)
    """Set when a `generate` has ended, in whatever way."""
    _open_ids: set[str] = field(default_factory=set)
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    def enqueue(self, text: str | tuple[int, ...], **options: object) -> None:
        ids = tuple(text.encode()) if isinstance(text, str) else text
        self.scripts.append(Script(ids, **options))

    def check_health(self) -> None:
        if self.is_dead:
            raise EngineDeadError("The model has failed; it must be loaded again.")

    async def generate(
        self, requests: Sequence[SequenceRequest]
    ) -> AsyncGenerator[list[TokenOutput], None]:
        self.check_health()
        self.requests += requests
        own_ids = {request.request_id for request in requests}
        self._open_ids |= own_ids
        try:
            async for outputs in self._play(requests):
                yield outputs
        finally:
            for request_id in own_ids & self._open_ids:
                self.abort(request_id)
            self.closed.set()

    async def _play(
        self, requests: Sequence[SequenceRequest]
    ) -> AsyncGenerator[list[TokenOutput], None]:
        scripts = [
            self.scripts.popleft() if self.scripts else Script(tuple(b"ok")) for _ in requests
        ]
        pending = [deque(s.play(r)) for s, r in zip(scripts, requests, strict=True)]
        while any(pending):
            await asyncio.sleep(0)
            outputs = [queue.popleft() for queue in pending if queue]
            outputs = [output for output in outputs if output.request_id in self._open_ids]
            self._open_ids -= {o.request_id for o in outputs if o.finish_reason is not None}
            if outputs:
                yield outputs
        if error := next((script.error for script in scripts if script.error), None):
            raise error
        if any(request.request_id in self._open_ids for request in requests):
            await self._wait_for_stop()

    async def _wait_for_stop(self) -> None:
        stopped = asyncio.get_running_loop().create_future()
        self._waiting.append(stopped)
        self.blocked.set()
        await stopped
        if self.is_stopped:
            raise GenerationAbortedError("The server is shutting down.")

    def abort(self, request_id: str) -> None:
        if request_id in self._open_ids:
            self._open_ids.remove(request_id)
            self.aborted.append(request_id)

    def abort_all(self) -> None:
        for request_id in tuple(self._open_ids):
            self.abort(request_id)
        self._wake()

    def stop(self) -> None:
        self.is_stopped = True
        self._wake()

    def _wake(self) -> None:
        for stopped in self._waiting:
            stopped.get_loop().call_soon_threadsafe(stopped.set_result, None)


class FakeModelManager(ModelManager):
    """With a model that is there already, and names of others."""

    def __init__(self, model: LoadedModel | None, names: Sequence[str] = ()) -> None:
        super().__init__(Settings())
        self.names = list(names)
        self.model = model

    @property
    def model(self) -> LoadedModel | None:
        return self.current if self.is_loaded else None

    @model.setter
    def model(self, model: LoadedModel | None) -> None:
        self._places.clear()
        self._default = None
        if model is not None:
            self.add(model)

    def list_names(self) -> list[str]:
        return sorted(self.names)


def build_tokenizer(
    *special_tokens: str, merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: a token's id is its byte. The ChatML tokens come after, then what `merges`
    make, then `special_tokens`.
    """
    chatml = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab = {char: byte for byte, char in _byte_characters().items()}
    vocab |= {text: END_OF_TEXT + i for i, text in enumerate(chatml)}
    vocab |= {first + second: VOCAB_SIZE + i for i, (first, second) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text) for text in (*chatml, *special_tokens)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def _byte_characters() -> dict[int, str]:
    """Byte-level BPE writes printable bytes as themselves, the others from U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def build_model(
    engine: FakeEngine, tokenizer: PreTrainedTokenizerFast, settings: Settings | None = None
) -> LoadedModel:
    return LoadedModel(
        name="tiny",
        adapters=Adapters("tiny", Path("loras"), None),
        path=Path("tiny"),
        settings=settings or Settings(),
        engine=engine,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        vocabulary=Vocabulary(tokenizer, len(tokenizer)),
        prompt_encoder=PromptEncoder(tokenizer, {IM_END}),
        max_model_len=1024,
        eos_token_ids=frozenset({IM_END}),
        chat_template=ChatTemplate(
            text=CHATML,
            name="tiny",
            source=TemplateSource.MODEL,
            reason="it comes with the model",
            special_tokens={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        ),
    )
