"""LoadedModel: what one loaded model is to everything that generates with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modules.adapters import NO_ADAPTER, Adapters
from modules.engine.async_engine import AsyncEngine
from modules.engine.low_rank import Adapter
from modules.errors import InvalidRequestError
from modules.image_reader import ImageReader
from modules.instruction_templates import ChatTemplate
from modules.memory import KVPart, release_memory
from modules.prompt_encoder import PromptEncoder
from modules.settings import Settings
from modules.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that can generate. A request keeps the one it began with."""

    name: str
    path: Path
    """What it was loaded from: a folder in transformers' format or a .gguf file."""
    settings: Settings
    """What it was loaded with: the server's, but for what was asked for when it was loaded."""
    engine: AsyncEngine
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and reply together; of an encoder-decoder, of each."""
    chat_template: ChatTemplate
    vocabulary: Vocabulary
    prompt_encoder: PromptEncoder
    eos_token_ids: frozenset[int] = frozenset()
    """They end a reply."""
    max_guided_len: int | None = None
    """As `max_model_len`, with a negative prompt; None: the same."""
    continues_prompt: bool = True
    """False where the reply is a text of its own, as an encoder-decoder's is."""
    image_reader: ImageReader | None = None
    """None where it reads text only."""
    device: str = "cpu"
    dtype: str = "float32"
    kv_part: KVPart | None = None
    """Of the memory for keys and values; None if nobody knows how much of it the model takes."""
    adapters: Adapters
    applied_adapters: tuple[Adapter, ...] = ()
    """With which of them it generates."""

    @property
    def accepts_images(self) -> bool:
        return self.image_reader is not None

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of those that are loaded for it."""
        return self.adapters.names

    def close(self) -> None:
        """Stop its engine, and give back the memory of the model; the tokenizer stays usable.

        What is still being generated fails with GenerationAbortedError. Idempotent. It waits for a
        step that is running: not for an event loop's thread.
        """
        self.engine.stop()
        self.adapters.close()
        if self.kv_part is not None:
            self.kv_part.give_back()
        release_memory()

    def with_adapter(self, name: str | None, param: str = "lora") -> LoadedModel:
        """This model as a request wants it that names this adapter in the field `param`.

        None: with all adapters that are loaded; "" or "none": with none. Raises
        AdapterNotFoundError.
        """
        if name is None:
            loaded = self.adapters.all
            return replace(self, applied_adapters=loaded) if loaded else self
        if name in ("", NO_ADAPTER):
            return replace(self, applied_adapters=())
        adapter = self.adapters.get(name, param)
        return replace(self, name=f"{self.name}:{name}", applied_adapters=(adapter,))

    def check_token_ids(self, token_ids: Iterable[int], param: str) -> None:
        """Raises InvalidRequestError, with the wire name of the field that they came in."""
        unknown = next((i for i in token_ids if not 0 <= i < self.vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"Invalid value for '{param}': Token id {unknown} is outside the model's "
                f"vocabulary of {self.vocab_size}.",
                param,
            )

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = self.tokenizer.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,  # it would change text that has been sent already
        )
        assert isinstance(text, str)
        return text
