"""How well moderations by examples do: precision and recall by category, on labelled texts.

    python benchmarks/moderation.py                  the table, of tests/data/moderation.yaml
    python benchmarks/moderation.py --fit            writes moderation/calibration.yaml anew
    python benchmarks/moderation.py --model NAME     with another embedding model

The calibration is that of the examples' leave-one-out values together with the texts of `tune`;
`held_out` has no part in it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import yaml
from numpy.typing import NDArray

from modules.embeddings import Embedder
from modules.moderation import THRESHOLD, Moderator
from modules.moderation_examples import (
    CALIBRATION_FILE,
    CATEGORIES,
    FOLDER,
    HARMLESS,
    Calibration,
    calibrate,
    fit,
    label,
    load_examples,
    load_relations,
)
from modules.settings import PROJECT_ROOT, Settings, load_settings

LABELLED = PROJECT_ROOT / "tests" / "data" / "moderation.yaml"
HEADER = """\
# How values become probabilities, by category: slope and offset of a logistic curve. Written by
# benchmarks/moderation.py --fit, and used with this embedding model and these examples alone; for
# others it is worked out when they are first needed.
"""


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    texts: tuple[str, ...]
    names: tuple[str, ...]
    """The category that each was written for, or harmless."""
    labels: NDArray[np.int8]
    """[texts, categories], as of examples."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Of texts that are flagged, and that should be."""

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + self.wrong)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.right + self.missed)


def read_labelled(split: str) -> LabelledTexts:
    """`tune` or `held_out`."""
    groups = yaml.safe_load(LABELLED.read_text(encoding="utf-8"))[split]
    names = tuple(name for name, texts in groups.items() for _ in texts)
    texts = tuple(text for group in groups.values() for text in group)
    return LabelledTexts(texts, names, label(names, *load_relations(PROJECT_ROOT)))


async def judge(moderator: Moderator, texts: Sequence[str]) -> NDArray[np.float64]:
    """Scores [texts, categories]."""
    moderation = await moderator.moderate(texts)
    return np.array([[scores[name] for name in CATEGORIES] for scores in moderation.scores])


def count_by_category(labelled: LabelledTexts, scores: NDArray[np.float64]) -> dict[str, Counts]:
    """What a text is unsure of counts neither way."""
    return {
        name: _count(scores[:, i] >= THRESHOLD, labelled.labels[:, i])
        for i, name in enumerate(CATEGORIES)
    }


def count_flagged(labelled: LabelledTexts, scores: NDArray[np.float64]) -> Counts:
    """Whether a text is flagged at all."""
    labels = np.array([-1 if name == HARMLESS else 1 for name in labelled.names])
    return _count((scores >= THRESHOLD).any(axis=1), labels)


def add_up(counts: Iterable[Counts]) -> Counts:
    all_counts = list(counts)
    return Counts(
        sum(each.right for each in all_counts),
        sum(each.wrong for each in all_counts),
        sum(each.missed for each in all_counts),
    )


def _count(is_flagged: NDArray[np.bool_], labels: NDArray[Any]) -> Counts:
    return Counts(
        int((is_flagged & (labels > 0)).sum()),
        int((is_flagged & (labels < 0)).sum()),
        int((~is_flagged & (labels > 0)).sum()),
    )


def build_table(labelled: LabelledTexts, scores: NDArray[np.float64]) -> str:
    by_category = count_by_category(labelled, scores)
    rows: Mapping[str, Counts] = {
        **by_category,
        "all categories": add_up(by_category.values()),
        "flagged or not": count_flagged(labelled, scores),
    }
    lines = ["| | texts | precision | recall |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {each.right + each.missed} | {each.precision:.2f} | {each.recall:.2f} |"
        for name, each in rows.items()
    ]
    return "\n".join(lines)


def build_errors(labelled: LabelledTexts, scores: NDArray[np.float64]) -> str:
    """The texts that got a category wrong, and its score."""
    wrong = (scores >= THRESHOLD) != (labelled.labels > 0)
    lines = []
    for i in np.flatnonzero((wrong & (labelled.labels != 0)).any(axis=1)):
        found = (wrong[i] & (labelled.labels[i] != 0)).nonzero()[0]
        notes = ", ".join(f"{CATEGORIES[j]} {scores[i, j]:.2f}" for j in found)
        lines.append(f"{labelled.names[i]}: {labelled.texts[i]}  ({notes})")
    return "\n".join(lines)


async def write_calibration(embedder: Embedder) -> None:
    examples, tune = load_examples(PROJECT_ROOT), read_labelled("tune")
    embedded = await embedder.embed(examples.texts)
    regression, left_out = fit(embedded.vectors, examples.labels)
    values = regression.compute((await embedder.embed(tune.texts)).vectors)
    calibration = calibrate(
        np.concatenate([left_out, values]), np.concatenate([examples.labels, tune.labels])
    )
    path = PROJECT_ROOT / FOLDER / f"{CALIBRATION_FILE}.yaml"
    text = to_yaml(embedded.model, examples.fingerprint, calibration)
    path.write_text(text, encoding="utf-8")
    print(f"Written: {path}")


def to_yaml(model: str, fingerprint: str, calibration: Calibration) -> str:
    pairs = zip(CATEGORIES, calibration.slopes, calibration.offsets, strict=True)
    lines = [f"  {name}: [{slope:.3f}, {offset:.3f}]" for name, slope, offset in pairs]
    head = f"model: {model}\nexamples: '{fingerprint}'\ncategories:\n"
    return HEADER + head + "\n".join(lines) + "\n"


async def run(settings: Settings, is_fit: bool, shows_errors: bool) -> None:
    embedder = Embedder(settings)
    if is_fit:
        await write_calibration(embedder)
    moderator = Moderator(settings, embedder)
    for split in ("tune", "held_out"):
        labelled = read_labelled(split)
        scores = await judge(moderator, labelled.texts)
        print(f"\n{split}\n\n{build_table(labelled, scores)}")
        if shows_errors:
            print(f"\n{build_errors(labelled, scores)}")
    moderator.close()
    embedder.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="embedding model, instead of the settings' own")
    parser.add_argument("--classifier", help="text classifier, instead of examples")
    parser.add_argument("--fit", action="store_true", help="write moderation/calibration.yaml")
    parser.add_argument("--errors", action="store_true", help="show the texts that it got wrong")
    args = parser.parse_args()
    settings = load_settings([], {})
    if args.model:
        settings = replace(settings, embedding_model=args.model)
    settings = replace(settings, moderation_model=args.classifier or settings.moderation_model)
    asyncio.run(run(settings, args.fit, args.errors))


if __name__ == "__main__":
    main()
