"""Presets: `presets/<name>.yaml` → sampling parameters by their wire names, as they stand there.

What they mean, and which values are allowed, is the wire schema's business.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.data_files import list_data_files, load_data_file
from modules.errors import InvalidRequestError

PRESETS_FOLDER = "presets"


def load_preset(root: Path, name: str) -> Mapping[str, Any]:
    """Raises DataFileNotFoundError, InvalidRequestError."""
    data = load_data_file(root / PRESETS_FOLDER, name)
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise InvalidRequestError(f"The preset file of {name!r} holds no parameters.", "preset")
    return data


def list_presets(root: Path) -> list[str]:
    return list_data_files(root / PRESETS_FOLDER)
