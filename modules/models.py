"""ModelManager: which models are loaded."""

from __future__ import annotations

from modules.errors import NoModelLoadedError
from modules.loaded_model import LoadedModel
from modules.model_files import list_models
from modules.model_loading import load_model
from modules.settings import Settings


class ModelManager:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._current: LoadedModel | None = None

    @property
    def current(self) -> LoadedModel:
        """Raises NoModelLoadedError."""
        if self._current is None:
            raise NoModelLoadedError
        return self._current

    @property
    def is_loaded(self) -> bool:
        return self._current is not None

    def list_names(self) -> list[str]:
        """Names of the models on this machine, sorted; those in the hub's cache are left out."""
        return list_models(self._settings.model_dir)

    def load(self, name: str) -> LoadedModel:
        """Load a model and make it the current one; the old one stays until the new one is there.

        Raises: ModelNotFoundError, ModelLoadError.
        """
        model = load_model(name, self._settings)
        self.unload()
        self._current = model
        return model

    def unload(self) -> None:
        """Let the current model go; what it was still generating fails with a typed error."""
        if self._current is not None:
            self._current.engine.stop()
            self._current = None
