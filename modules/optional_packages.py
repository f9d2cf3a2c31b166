"""Packages that one capability needs and the rest of the server does not: imported on first use."""

import importlib
from types import ModuleType

from modules.errors import MissingPackageError


def import_package(module: str, capability: str, package: str) -> ModuleType:
    """Import `module`, for which pip installs `package`.

    Raises MissingPackageError, also where it is installed and something that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(capability, package) from error
