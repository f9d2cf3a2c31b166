"""A text classifier in the place of examples, its labels translated into OpenAI's categories."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modules.batch_queue import BatchLimits, Prepared
from modules.batch_worker import BatchWorker
from modules.errors import ModelLoadError, ModelNotFoundError, NotConfiguredError
from modules.model_files import FoundModel, find_model
from modules.model_kinds import ModelKind
from modules.moderation_examples import CATEGORIES
from modules.moderation_windows import Judged, Window
from modules.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

CPU_LIMITS = BatchLimits(max_items=32, max_tokens=512, max_padding=32)
CARD_LIMITS = BatchLimits(max_items=256, max_tokens=16384, max_padding=2048)

# Labels of known classifiers, in small letters and digits alone → categories. Which label is which
# of OpenAI's is a matter of judgement where it means more than one: a toxic text is one that
# harasses.
LABELS: Mapping[str, str] = {
    **{re.sub(r"[^a-z]", "", name): name for name in CATEGORIES},
    # The initials of KoalaAI/Text-Moderation.
    "s": "sexual",
    "h": "hate",
    "v": "violence",
    "hr": "harassment",
    "sh": "self-harm",
    "s3": "sexual/minors",
    "h2": "hate/threatening",
    "v2": "violence/graphic",
    # Jigsaw's, as unitary/toxic-bert and its relatives have them.
    "toxic": "harassment",
    "toxicity": "harassment",
    "severetoxic": "harassment",
    "severetoxicity": "harassment",
    "obscene": "harassment",
    "insult": "harassment",
    "threat": "harassment/threatening",
    "identityhate": "hate",
    "identityattack": "hate",
    "sexualexplicit": "sexual",
    # Words that others use.
    "offensive": "harassment",
    "hateful": "hate",
    "hatespeech": "hate",
    "nsfw": "sexual",
    "suicide": "self-harm",
    "suicidal": "self-harm/intent",
    "violent": "violence",
    "crime": "illicit",
    "weapons": "illicit/violent",
}


class ClassifierJudge:
    # Less than any such model reads at once, in sentences enough to know what they are about.
    window = Window(max_words=80, max_bytes=480)

    def __init__(self, name: str, settings: Settings) -> None:
        self._name = name
        self._settings = settings
        self._worker: BatchWorker[str] = BatchWorker("moderations", self._load)

    @property
    def loaded_name(self) -> str | None:
        return self._name if self._worker.is_loaded else None

    async def judge(self, texts: Sequence[str]) -> Judged:
        computed = await self._worker.run(texts)
        return Judged(self._name, computed.rows.astype(np.float64))

    def close(self) -> None:
        self._worker.close()

    def _load(self) -> Classifier:
        classifier = load_classifier(self._name, self._settings)
        self._name = classifier.name
        return classifier


class Classifier:
    """See batch_worker.BatchModel; a row has the score of each category, from 0 to 1."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._columns = find_columns(name, model.config.id2label)
        self._max_tokens = _find_max_tokens(model.config, tokenizer)

    @property
    def is_on_card(self) -> bool:
        return bool(self._model.device.type != "cpu")

    @property
    def limits(self) -> BatchLimits:
        return CARD_LIMITS if self.is_on_card else CPU_LIMITS

    def prepare(self, inputs: Sequence[str]) -> list[Prepared]:
        encoded = self._tokenizer(list(inputs), truncation=True, max_length=self._max_tokens)
        rows = [{key: values[i] for key, values in encoded.items()} for i in range(len(inputs))]
        return [Prepared(row, len(row["input_ids"])) for row in rows]

    def compute(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        import torch

        rows = [dict(prepared.features) for prepared in batch]
        features = self._tokenizer.pad(rows, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            scores = self._to_scores(self._model(**features).logits.float())
        computed: NDArray[np.float32] = scores.cpu().numpy()
        return computed

    def _to_scores(self, logits: Tensor) -> Tensor:
        """[texts, labels] → [texts, categories]."""
        is_any_of_many = self._model.config.problem_type == "multi_label_classification"
        scores = logits.new_zeros(len(logits), len(CATEGORIES))
        if is_any_of_many or logits.shape[1] == 1:
            probabilities = logits.sigmoid()
            for label, category in self._columns.items():
                scores[:, category] = scores[:, category].maximum(probabilities[:, label])
        else:  # one of the labels is right: what several of them mean is as likely as all together
            probabilities = logits.softmax(dim=1)
            for label, category in self._columns.items():
                scores[:, category] += probabilities[:, label]
        return scores.clamp(0, 1)


def find_columns(name: str, labels: Mapping[int, str]) -> dict[int, int]:
    """Index of a label → index of its category, of those that have one.

    Raises ModelLoadError if there is none.
    """
    known = {
        index: CATEGORIES.index(LABELS[word])
        for index, label in labels.items()
        for word in (re.sub(r"[^a-z0-9]", "", str(label).lower()),)
        if word in LABELS
    }
    if not known:
        raise ModelLoadError(
            f"{name} cannot moderate: none of its labels is known to mean one of OpenAI's "
            f"categories ({', '.join(map(str, labels.values()))})."
        )
    return known


def load_classifier(name: str, settings: Settings) -> Classifier:
    """The model of the setting `moderation_model`. Raises NotConfiguredError, ModelLoadError."""
    # Here and not above: it loads slowly, and only this needs it.
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from modules.model_loading import blame, to_folder

    try:
        found = find_model(name, settings, ModelKind.CLASSIFICATION)
    except ModelNotFoundError as error:
        # What the client has asked for is there; what the settings name is not.
        raise NotConfiguredError(f"Moderations cannot be had. {error}") from error
    device = "cuda" if torch.cuda.is_available() and not settings.cpu else "cpu"
    options = {"local_files_only": True, "trust_remote_code": settings.trust_remote_code}
    with blame(found):
        folder = to_folder(found.path, settings)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
        _refuse_without_head(found, report["missing_keys"])
    return Classifier(found.name, model.to(device), tokenizer)


def _refuse_without_head(found: FoundModel, missing: Sequence[str]) -> None:
    """transformers would make a classifier of any model, with a head that has learnt nothing."""
    if missing:
        raise ModelLoadError(
            f"{found.name} is no text classifier: it has no weights for {sorted(missing)[0]}."
        )


def _find_max_tokens(config: Any, tokenizer: Any) -> int:
    """RoBERTa counts positions from 2 on, and says so with its tokenizer's limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(min(tokenizer.model_max_length, positions or 2**16, 2**16))
