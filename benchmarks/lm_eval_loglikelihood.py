"""Loglikelihoods as lm-evaluation-harness gets them from a server, beside transformers' own.

lm-evaluation-harness sends tokens with `echo` and `logprobs` and adds up the numbers of the
continuation; here the same is computed in this process from the model's logits. Prints the largest
difference.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Pair = tuple[str, str]

SENTENCES = (
    "The capital of France is Paris, which lies on the river Seine.",
    "def add(a, b):\n    return a + b\n",
    "Water boils at a lower temperature on a high mountain than at the sea.",
    "Er sagte: »Das wird schon gehen«, und ging hinaus. 🙂",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    "Purple monkeys hum dishwasher geometry beneath the 日本語.",
    'He opened the letter slowly.\n\n"So it is true," he said, and put it into the fire.',
)


def main() -> int:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_folder, dtype=torch.float32).eval()
    pairs = build_pairs(arguments.pairs)
    largest = 0.0
    for batch_size, num_concurrent in ((1, 1), (1, 8), (6, 4)):
        client = LocalCompletionsAPI(
            base_url=f"{arguments.url}/completions",
            model="any",
            tokenizer=arguments.model_folder,
            tokenizer_backend="huggingface",
            batch_size=batch_size,
            num_concurrent=num_concurrent,
            max_length=arguments.max_length,
        )
        started = time.perf_counter()
        answers = client.loglikelihood([to_instance(pair) for pair in pairs], disable_tqdm=True)
        seconds = time.perf_counter() - started
        expected = [compute(model, *client._encode_pair(*pair)) for pair in pairs]
        difference = max(abs(a[0] - b[0]) for a, b in zip(answers, expected, strict=True))
        num_greedy = sum(a[1] == b[1] for a, b in zip(answers, expected, strict=True))
        largest = max(largest, difference)
        print(
            f"{len(pairs)} pairs, {batch_size} a request, {num_concurrent} requests at a time: "
            f"largest difference {difference:.2e}, greedy the same {num_greedy}/{len(pairs)}, "
            f"{seconds:.1f} s"
        )
    print(f"tokens of a continuation: {tokens_of(tokenizer, pairs)}; largest of all {largest:.2e}")
    return int(largest > arguments.tolerance)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="of the server's API, with /v1")
    parser.add_argument("--model-folder", required=True, help="what the server has loaded")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    return parser.parse_args()


def build_pairs(count: int) -> list[Pair]:
    """Contexts of one to forty sentences, and the words after them; cut by a fixed seed."""
    return list(_generate_pairs(random.Random(0), count))


def _generate_pairs(draw: random.Random, count: int) -> Iterator[Pair]:
    for _ in range(count):
        words = " ".join(draw.choices(SENTENCES, k=draw.choice((1, 2, 4, 40)))).split(" ")
        end = draw.randrange(max(1, len(words) - 12), len(words))
        yield " ".join(words[:end]), " " + " ".join(words[end:])


def to_instance(pair: Pair) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)


def tokens_of(tokenizer, pairs: list[Pair]) -> str:
    counts = [len(tokenizer.encode(text, add_special_tokens=False)) for _, text in pairs]
    return f"{min(counts)} to {max(counts)}"


@torch.inference_mode()
def compute(
    model: PreTrainedModel, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """The sum of the continuation's log-probabilities, and whether each token was the likeliest."""
    ids = torch.tensor([[*context, *continuation]])
    rows = model(ids).logits[0, len(context) - 1 : -1].float().log_softmax(-1)
    targets = torch.tensor(continuation)
    chosen = rows.gather(-1, targets[:, None])
    return chosen.sum().item(), bool((rows.argmax(-1) == targets).all())


if __name__ == "__main__":
    sys.exit(main())
