"""What a long conversation costs before the model reads it: rendering, and leaving turns out.

    python benchmarks/chat.py --turns 200 --json chat.json

Each mode takes its turn in every round; the table shows medians. Tokenization is measured by
holding a stopwatch beside the tokenizer; the rest is what is left of the whole.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in place of this folder, whose files have the names of libraries
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import Report, print_machine
from modules.chat import ChatOptions, ChatResources, open_conversation
from modules.context_fitting import Room, fit_prompt
from modules.loaded_model import LoadedModel
from modules.model_files import DEFAULT_MODEL
from modules.model_loading import load_model
from modules.settings import PROJECT_ROOT, load_settings

MODES = ("instruct", "chat", "chat-instruct")
TEXT = "The quick brown fox jumps over the lazy dog, and asks what comes next. "


class TimedEncoder:
    """A model's prompt encoder, and the seconds that were spent in it."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._encoder, name)
        return self._watch(value) if name in ("encode", "count") else value

    def _watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return watched


class TimedModel:
    """What fitting a prompt asks of a model."""

    def __init__(self, model: LoadedModel) -> None:
        self.prompt_encoder = TimedEncoder(model.prompt_encoder)


def main() -> None:
    options = parse_options()
    print_machine()
    model = load_model(options.model, load_settings(["--cpu"], {}))
    report = Report(list(MODES))
    messages = build_messages(options.turns, options.repeats)
    for round_number in range(options.rounds + 1):
        for mode in MODES:
            total, tokenization, num_dropped = measure(model, messages, mode, options.room)
            if round_number:  # the first compiles templates and counts every message
                report.add("tokenization (ms)", mode, tokenization * 1e3)
                report.add("the rest (ms)", mode, (total - tokenization) * 1e3)
                report.add("messages left out", mode, num_dropped)
    report.print_table()
    if options.json:
        report.write(options.json, options)
    model.engine.stop()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer and template")
    parser.add_argument("--turns", type=int, default=200, help="questions with replies")
    parser.add_argument("--repeats", type=int, default=3, help="sentences per message")
    parser.add_argument("--room", type=int, default=7680, help="tokens that a prompt may have")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for all rounds")
    return parser.parse_args()


def build_messages(num_turns: int, num_repeats: int) -> list[dict[str, str]]:
    turns = [
        {"role": role, "content": f"{turn}: {TEXT * num_repeats}"}
        for turn in range(num_turns)
        for role in ("user", "assistant")
    ]
    question = {"role": "user", "content": "And then?"}
    return [{"role": "system", "content": "Be brief."}, *turns, question]


def measure(
    model: LoadedModel, messages: list[dict[str, str]], mode: Any, room: int
) -> tuple[float, float, int]:
    """Seconds in all, seconds in the tokenizer, and messages left out."""
    timed: Any = TimedModel(model)
    resources = ChatResources(model.chat_template, PROJECT_ROOT, model.prompt_encoder.choose_marker)
    start = time.perf_counter()
    conversation = open_conversation(
        messages, ChatOptions(mode=mode, character="Example"), resources
    )
    fitted = fit_prompt(conversation, timed, Room(room, room))
    total = time.perf_counter() - start
    return total, timed.prompt_encoder.seconds, fitted.num_dropped_messages


if __name__ == "__main__":
    main()
