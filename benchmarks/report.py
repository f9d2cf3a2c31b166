"""What a benchmark reports: medians over rounds, ratios between columns, and the machine's name."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Extensions of x86 and ARM that decide how fast a model runs.
CPU_FLAGS = (
    *("avx2", "f16c", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni"),
    *("amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve"),
)
PACKAGES = ("torch", "transformers", "numba")


class Report:
    """Values by measure and column; the first column is compared with each of the others."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns
        self._values: dict[str, dict[str, list[float]]] = {}

    def add(self, measure: str, column: str, value: float) -> None:
        """One round's value. Rows appear in the order in which they were first added."""
        self._values.setdefault(measure, {}).setdefault(column, []).append(value)

    def median(self, measure: str, column: str) -> float | None:
        values = self._values.get(measure, {}).get(column)
        return statistics.median(values) if values else None

    def print_table(self) -> None:
        """In Markdown, aligned."""
        subject, *others = self.columns
        header = ["", *self.columns, *(f"{subject} / {other}" for other in others)]
        rows = [[measure, *self._cells(measure)] for measure in self._values]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        for row in (header, ["-" * width for width in widths], *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print(f"| {' | '.join(cells)} |", flush=True)

    def write(self, path: Path, options: Namespace, **more: Any) -> None:
        """All rounds, as JSON."""
        report = {
            "machine": describe_machine(),
            "options": vars(options),
            **more,
            "columns": self.columns,
            "results": self._values,
        }
        path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")

    def _cells(self, measure: str) -> list[str]:
        medians = [self.median(measure, column) for column in self.columns]
        subject, *others = medians
        ratios = (subject / other if subject is not None and other else None for other in others)
        return [
            *(_format(value, ".4g" if value and abs(value) < 10 else ".1f") for value in medians),
            *(_format(ratio, ".2f") for ratio in ratios),
        ]


def describe_machine() -> dict[str, str]:
    known = {
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "flags": " ".join(flag for flag in CPU_FLAGS if flag in _cpu_flags()),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }
    torch = sys.modules.get("torch")  # not loaded for the sake of its name
    if torch is not None and torch.cuda.is_available():
        known["gpu"] = torch.cuda.get_device_name()
    return known


def peer_environment() -> dict[str, str]:
    """This process's, without how its own threads wait: others have their own ways."""
    return {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}


def print_machine() -> None:
    print(", ".join(f"{name}: {value}" for name, value in describe_machine().items()), flush=True)


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return (_cpu_info("flags") or _cpu_info("Features")).split()


def _cpu_info(key: str) -> str:
    """The first line of Linux's /proc/cpuinfo with that key; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
