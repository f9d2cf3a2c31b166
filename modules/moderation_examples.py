"""Categories of harmful text, by likeness to the examples of `moderation/`: pure arithmetic.

Every category has a kernel ridge regression over the examples' vectors, whose value a logistic
curve makes a probability. What an example would get if it were none of the examples (its
leave-one-out value) has a closed form, so any embedding model is calibrated in a moment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.data_files import load_data_file
from modules.errors import InvalidRequestError, NotConfiguredError

FOLDER = "moderation"
EXAMPLES_FILE = "examples"
CALIBRATION_FILE = "calibration"
HARMLESS = "harmless"
# OpenAI's, in its order.
CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
# Chosen by leave-one-out on the examples, and on the texts to tune by.
SHARPNESS = 2.0
RIDGE = 0.1
NEWTON_STEPS = 50

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Examples:
    texts: tuple[str, ...]
    labels: NDArray[np.int8]
    """[texts, categories]: 1 for what belongs to it, -1 for what does not, 0 for neither."""

    @property
    def fingerprint(self) -> str:
        """Another one if anything is changed that a calibration depends on."""
        content = json.dumps([self.texts, self.labels.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The probability of a value: 1 / (1 + exp(-(slope * value + offset))), by category."""

    slopes: Floats
    offsets: Floats

    def to_probabilities(self, values: Floats) -> Floats:
        exponents = np.clip(self.slopes * values + self.offsets, -500, 500)
        probabilities: Floats = 1 / (1 + np.exp(-exponents))
        return probabilities


@dataclass(frozen=True, slots=True)
class Regression:
    vectors: Floats
    """[examples, dimensions], of length 1."""
    weights: Floats
    """[examples, categories]."""

    def compute(self, vectors: NDArray[Any]) -> Floats:
        """[texts, categories], about 1 for what belongs to a category and -1 for what does not."""
        values: Floats = _compare(vectors.astype(np.float64), self.vectors) @ self.weights
        return values


# Reading


def load_examples(root: Path) -> Examples:
    """Raises NotConfiguredError, which names the file."""
    document = _load(root, EXAMPLES_FILE)
    groups = _read_lists(document, "examples")
    implied, unsure = _read_lists(document, "implies"), _read_lists(document, "unsure")
    texts = [text for group in groups.values() for text in group]
    names = [name for name, group in groups.items() for _ in group]
    if HARMLESS not in names or len(set(names)) < 2:
        raise _broken(EXAMPLES_FILE, f"examples are missing, of a category or of {HARMLESS}")
    return Examples(tuple(texts), label(names, implied, unsure))


def load_relations(root: Path) -> tuple[Mapping[str, list[str]], Mapping[str, list[str]]]:
    """What `implies` and `unsure` say, to label other texts as the examples are.

    Raises NotConfiguredError.
    """
    document = _load(root, EXAMPLES_FILE)
    return _read_lists(document, "implies"), _read_lists(document, "unsure")


def label(
    names: Sequence[str],
    implied: Mapping[str, Sequence[str]],
    unsure: Mapping[str, Sequence[str]],
) -> NDArray[np.int8]:
    """[names, categories], as Examples.labels, for texts of these categories, or harmless ones."""
    labels = np.full((len(names), len(CATEGORIES)), -1, np.int8)
    for row, name in zip(labels, names, strict=True):
        if name != HARMLESS:
            row[[CATEGORIES.index(other) for other in unsure.get(name, ())]] = 0
            row[[CATEGORIES.index(other) for other in (name, *implied.get(name, ()))]] = 1
    return labels


def load_calibration(root: Path, model: str, examples: Examples) -> Calibration | None:
    """The one of the file; None if that is of another model or of other examples.

    Raises NotConfiguredError.
    """
    document = _load(root, CALIBRATION_FILE)
    if (document.get("model"), document.get("examples")) != (model, examples.fingerprint):
        return None
    try:
        pairs = np.array([document["categories"][name] for name in CATEGORIES], np.float64)
        slopes, offsets = pairs.T
    except (LookupError, TypeError, ValueError):
        reason = "`categories` should have two numbers for each category"
        raise _broken(CALIBRATION_FILE, reason) from None
    return Calibration(slopes, offsets)


def _load(root: Path, name: str) -> dict[str, Any]:
    try:
        document = load_data_file(root / FOLDER, name)
    except InvalidRequestError as error:  # which it is not: the file is the server's
        raise _broken(name, str(error)) from error
    if not isinstance(document, dict):
        raise _broken(name, "it should have lines of the form `key: value`")
    return document


def _read_lists(document: Mapping[str, Any], key: str) -> dict[str, list[str]]:
    """Category → texts, or other categories."""
    lists = document.get(key, {})
    known = {*CATEGORIES, *([HARMLESS] if key == "examples" else [])}
    if not isinstance(lists, dict):
        raise _broken(EXAMPLES_FILE, f"`{key}` should have a list for each category")
    for name, items in lists.items():
        if name not in known:
            raise _broken(EXAMPLES_FILE, f"{name!r} in `{key}` is no category")
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            reason = (
                f"`{name}` in `{key}` should be a list of texts; put one with a colon in quotes"
            )
            raise _broken(EXAMPLES_FILE, reason)
        if key != "examples" and not known.issuperset(items):
            raise _broken(EXAMPLES_FILE, f"`{name}` in `{key}` names something that is no category")
    return lists


def _broken(name: str, reason: str) -> NotConfiguredError:
    return NotConfiguredError(
        f"Moderations cannot be had: {FOLDER}/{name}.yaml cannot be used: {reason}"
    )


# Arithmetic


def fit(vectors: NDArray[Any], labels: NDArray[np.int8]) -> tuple[Regression, Floats]:
    """The regression, and of each of its examples the value that it gets without that one."""
    known: Floats = vectors.astype(np.float64)
    whole: Floats = np.asarray(
        np.linalg.inv(_compare(known, known) + RIDGE * np.eye(len(known))), np.float64
    )
    weights = np.zeros(labels.shape)
    left_out = np.zeros(labels.shape)
    for category, targets in enumerate(labels.T.astype(np.float64)):
        used = np.flatnonzero(targets)
        inverse = _leave_out(whole, np.flatnonzero(targets == 0))[np.ix_(used, used)]
        weights[used, category] = inverse @ targets[used]
        errors = weights[used, category] / np.diag(inverse)
        left_out[used, category] = targets[used] - errors
    return Regression(known, weights), left_out


def _leave_out(inverse: Floats, rows: NDArray[np.intp]) -> Floats:
    """The inverse of a matrix without these rows and columns, which are 0 in it, from its own: by
    the inverse of blocks, and much faster than inverting anew.
    """
    if not len(rows):
        return inverse
    inner = inverse[np.ix_(rows, rows)]
    less: Floats = inverse - inverse[:, rows] @ np.linalg.solve(inner, inverse[rows])
    return less


def calibrate(values: Floats, labels: NDArray[np.int8]) -> Calibration:
    """By values and labels of texts that the regression was not fitted to, [texts, categories]."""
    pairs = [
        _fit_logistic(column[marks != 0], marks[marks != 0] > 0)
        for column, marks in zip(values.T, labels.T, strict=True)
    ]
    slopes, offsets = np.array(pairs).T
    return Calibration(slopes, offsets)


def _compare(one: Floats, other: Floats) -> Floats:
    """A Gaussian kernel of vectors of length 1, plus 1 for a regression's constant part."""
    kernel: Floats = np.exp(SHARPNESS * (one @ other.T - 1)) + 1
    return kernel


def _fit_logistic(values: Floats, is_in: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset, by Platt, "Probabilistic outputs for support vector machines" (1999), with
    Newton's method as in Lin, Lin and Weng, "A note on Platt's probabilistic outputs" (2007).
    """
    num_in = int(is_in.sum())
    num_out = len(is_in) - num_in
    # Not quite 1 and 0: as if there had been one more of each kind.
    targets = np.where(is_in, (num_in + 1) / (num_in + 2), 1 / (num_out + 2))
    inputs = np.column_stack([values, np.ones(len(values))])
    guess = np.array([0.0, np.log((num_in + 1) / (num_out + 1))])
    for _ in range(NEWTON_STEPS):
        probabilities = 1 / (1 + np.exp(-inputs @ guess))
        gradient = inputs.T @ (probabilities - targets)
        spread = probabilities * (1 - probabilities)
        hessian = (inputs * spread[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-6 and _loss(inputs, targets, guess - size * step) > _loss(
            inputs, targets, guess
        ):
            size /= 2
        guess = guess - size * step
    return float(guess[0]), float(guess[1])


def _loss(inputs: Floats, targets: Floats, guess: Floats) -> float:
    exponents = inputs @ guess
    return float((np.logaddexp(0, exponents) - targets * exponents).sum())
