"""ModelManager: which models are loaded, which request uses which, and how one takes another's
place.

Changes happen one at a time, first come, first served. Requests do not wait for them, but for a
model that they need and that has to be loaded first. Each keeps the model that it began with until
its answer has been sent, and a model that is replaced goes when its last request has ended.
Everything here happens on the event loop; what takes long, in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from modules.adapters import NO_ADAPTER
from modules.engine.inference_thread import InferenceThread
from modules.errors import (
    AdapterNotFoundError,
    GenerationAbortedError,
    ModelLoadError,
    ModelNotFoundError,
    NoModelLoadedError,
    ServerError,
    SettingsError,
)
from modules.load_progress import LoadProgress, LoadStage, Report, report_nothing
from modules.loaded_model import LoadedModel
from modules.memory import KVBudget
from modules.model_files import list_models
from modules.model_loading import Shared, start_loading, start_looking_for_room
from modules.settings import Settings

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
StartLoading = Callable[[str, Settings, Shared, Report], "Future[LoadedModel]"]
StartLooking = Callable[[str, Settings, Report], "Future[bool]"]

# So long may requests go on with a model that has been replaced: a client that does not read its
# answer must not keep its memory for ever.
MAX_LEAVING_SECONDS = 600.0
# So old may the listing of the model folder be that says whether a request's model is there.
LISTING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is asked for when a model is loaded, or loaded again as it was."""

    name: str
    """Maybe a path, or a name of the hub."""
    settings: Settings


@dataclass(frozen=True, slots=True)
class SleepingModel:
    """One that was let go because nobody used it. It comes back as it was when somebody does."""

    name: str
    path: Path
    max_model_len: int
    accepts_images: bool
    adapter_names: tuple[str, ...]
    wish: _Wish


# Of a load: what the files or the settings are to blame for.
_FAILURES = (ModelLoadError, ModelNotFoundError, SettingsError)


@contextmanager
def _logged_failures(name: str) -> Iterator[None]:
    """Not at the start of the server, which ends with them."""
    try:
        yield
    except _FAILURES as error:
        logger.error("%s could not be loaded: %s", name[:100], error)
        raise


class _Place:
    """A loaded model, and who uses it."""

    def __init__(self, model: LoadedModel, source: str) -> None:
        self.model = model
        self._source = source
        self.used_at = monotonic()
        """When a request last began or ended with it."""
        self._num_leases = 0
        self._is_stopped = False
        self._is_over = asyncio.Event()
        """Nobody uses it, or may."""
        self._is_over.set()

    @property
    def is_free(self) -> bool:
        return not self._num_leases

    @property
    def wish(self) -> _Wish:
        settings = replace(self.model.settings, lora=self.model.adapter_names)
        return _Wish(self._source, settings)

    def to_sleeping(self) -> SleepingModel:
        model = self.model
        return SleepingModel(
            model.name,
            model.path,
            model.max_model_len,
            model.accepts_images,
            model.adapter_names,
            self.wish,
        )

    def lease(self) -> None:
        self._num_leases += 1
        self.used_at = monotonic()
        self._is_over.clear()

    def release(self) -> None:
        self._num_leases -= 1
        self.used_at = monotonic()
        if self.is_free:
            self._is_over.set()

    async def stop_when_free(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_over.wait(), MAX_LEAVING_SECONDS)
        await self.stop()

    async def stop(self) -> None:
        """What is still being generated fails with a typed error."""
        await asyncio.to_thread(self.model.close)
        self._is_over.set()  # whoever still has a lease has been told
        if not self._is_stopped:
            self._is_stopped = True
            logger.info("Unloaded %s", self.model.name)


class ModelLease:
    """What one request uses. It stays until the lease is closed, when the answer has been sent."""

    def __init__(self, manager: ModelManager, tells_all: bool) -> None:
        self._manager = manager
        self._tells_all = tells_all
        self._place: _Place | None = None

    def must_wait(self, name: str | None) -> bool:
        """Whether `get` has to load something first. Raises NoModelLoadedError."""
        return self._manager.must_load(self._manager.split(name)[0])

    async def get(self, name: str | None = None, lora: str | None = None) -> LoadedModel:
        """The model that answers to `name`, see `ModelManager.find_name`, with the adapter that
        `lora` names, or else `name` after a colon. Once per lease.

        Raises: NoModelLoadedError, AdapterNotFoundError; where a model has to be loaded first, what
        `load` raises. Not everybody is told the reason, in which are paths of this machine.
        """
        assert self._place is None
        own_name, adapter = self._manager.split(name)
        wanted, param = (adapter, "model") if lora is None else (lora, "lora")
        self._manager.require_adapter(own_name, wanted, param)
        found = self._manager.find_name(own_name)
        try:
            self._place = await self._manager.take(own_name)
        except _FAILURES as error:
            if self._tells_all:
                raise
            raise ModelLoadError(
                f"The model {found} cannot be loaded. The server's log says why."
            ) from error
        return self._place.model.with_adapter(wanted, param)

    def close(self) -> None:
        if self._place is not None:
            self._place.release()
            self._place = None


class ModelManager:
    def __init__(
        self,
        settings: Settings,
        start_loading: StartLoading = start_loading,
        start_looking_for_room: StartLooking = start_looking_for_room,
    ) -> None:
        self._settings = replace(settings, lora=())
        self._first_lora = settings.lora
        self._start_loading = start_loading
        self._start_looking_for_room = start_looking_for_room
        self._thread = InferenceThread()
        self._budget = KVBudget()
        self._max_loaded = settings.max_loaded_models or max(1, len(settings.model))
        self._places: dict[str, _Place] = {}
        self._default: str | None = None
        self._asleep: dict[str, SleepingModel] = {}
        self._leaving: dict[_Place, asyncio.Task[None]] = {}
        self._changes: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()
        self._is_closed = False
        self._listing: frozenset[str] = frozenset()
        self._listed_at = -inf

    # Which there are

    @property
    def loaded(self) -> tuple[LoadedModel, ...]:
        """The default first, then as they were loaded."""
        places = sorted(self._places.items(), key=lambda item: item[0] != self._default)
        return tuple(place.model for _, place in places)

    @property
    def current(self) -> LoadedModel:
        """The default: it answers where no model is named, or none that there is.

        Raises NoModelLoadedError.
        """
        if self._default not in self._places:
            raise NoModelLoadedError
        return self._places[self._default].model

    @property
    def is_loaded(self) -> bool:
        return self._default in self._places

    @property
    def default_name(self) -> str | None:
        """Of the model that answers where none is named, loaded or asleep; None: there is none."""
        return self._default

    @property
    def asleep(self) -> tuple[SleepingModel, ...]:
        """The default first, then as they fell asleep."""
        return tuple(sorted(self._asleep.values(), key=lambda model: model.name != self._default))

    def find(self, name: str) -> LoadedModel | None:
        """The loaded model of that name, or that alias."""
        place = self._places.get(self._settings.model_aliases.get(name, name))
        return place.model if place else None

    def list_names(self) -> list[str]:
        """Names of the models on this machine, sorted; those in the hub's cache are left out."""
        return list_models(self._settings.model_dir)

    def find_name(self, name: str | None) -> str:
        """The name of the model that answers to `name`: that one itself if it is loaded, or may be
        loaded for a request; else the default.

        Raises NoModelLoadedError.
        """
        own_name = self._settings.model_aliases.get(name or "", name)
        if own_name is not None and self._is_to_be_had(own_name):
            return own_name
        if self._default is None:
            raise NoModelLoadedError
        return self._default

    def split(self, name: str | None) -> tuple[str | None, str | None]:
        """`model:adapter` as a model's name and an adapter's, if there is no model of that name."""
        name = self._settings.model_aliases.get(name or "", name)
        own_name, colon, adapter = (name or "").rpartition(":")
        if not colon or self._is_to_be_had(name or "") or not self.has(own_name):
            return name, None
        return own_name, adapter

    def has(self, name: str) -> bool:
        """Whether a model of that name, or that alias, is loaded, or may be for a request."""
        return self._is_to_be_had(self._settings.model_aliases.get(name, name))

    def _is_to_be_had(self, name: str) -> bool:
        if name in self._places or name in self._asleep:
            return True
        return self._settings.model_autoload and name in self._list_again()

    def _list_again(self) -> frozenset[str]:
        """Every request asks; with many models, or a slow disk, looking takes its time."""
        if monotonic() - self._listed_at > LISTING_SECONDS:
            self._listing = frozenset(self.list_names())
            self._listed_at = monotonic()
        return self._listing

    # For requests

    def must_load(self, name: str | None) -> bool:
        """Whether what answers to `name` has to be loaded first. Raises NoModelLoadedError."""
        return self.find_name(name) not in self._places

    def require_adapter(self, name: str | None, adapter: str | None, param: str) -> None:
        """Before a model is loaded for it: that one will not have an adapter which it did not have.

        Raises: NoModelLoadedError, AdapterNotFoundError.
        """
        own_name = self.find_name(name)
        if own_name not in self._places and adapter not in (None, "", NO_ADAPTER):
            sleeping = self._asleep.get(own_name)
            names = sleeping.adapter_names if sleeping else ()
            if adapter not in names:
                raise AdapterNotFoundError(adapter, names, param)

    @contextmanager
    def lease(self, tells_all: bool = False) -> Iterator[ModelLease]:
        """`tells_all`: also what is not for everybody, when a model cannot be loaded."""
        lease = ModelLease(self, tells_all)
        try:
            yield lease
        finally:
            lease.close()

    async def take(self, name: str | None) -> _Place:
        """The place of the model that answers to `name`, leased."""
        while True:
            place = self._places.get(self.find_name(name))
            if place is None:
                place = await self._change(self._load_for_request(name))
            if place in self._places.values():  # else it had to make room again already
                place.lease()
                return place

    async def _load_for_request(self, name: str | None) -> _Place:
        own_name = self.find_name(name)
        if own_name not in self._places:  # else another request has had it loaded meanwhile
            sleeping = self._asleep.get(own_name)
            wish = sleeping.wish if sleeping else _Wish(own_name, self._settings)
            with _logged_failures(own_name):
                own_name = (await self._exchange(wish, report_nothing)).name
        return self._places[own_name]

    # Changes

    async def load(
        self,
        name: str,
        overrides: Mapping[str, Any] | None = None,
        report: Report = report_nothing,
    ) -> LoadedModel:
        """Load a model and make it the default. One of the same name goes then, and where there are
        too many, those that have not been used for longest; each when its requests have ended.

        `overrides`: of the settings that the server was started with, by name.

        Raises what `load_model` raises; then, everything stays as it was.
        """
        with _logged_failures(name):
            return await self._load_named(name, overrides or {}, report)

    async def _load_named(
        self, name: str, overrides: Mapping[str, Any], report: Report = report_nothing
    ) -> LoadedModel:
        own_name = self._settings.model_aliases.get(name, name)
        wish = _Wish(own_name, replace(self._settings, **overrides))
        return await self._change(self._load(wish, report))

    async def _load(self, wish: _Wish, report: Report) -> LoadedModel:
        model = await self._exchange(wish, report)
        self._default = model.name
        return model

    async def wake_or_load(self, name: str) -> None:
        """A model that sleeps comes back as it was. Raises what `load_model` raises."""
        if name in self._asleep:
            await self._change(self._load_for_request(name))
        else:
            await self.load(name)

    async def load_all(self, names: Sequence[str]) -> None:
        """At start; the first one is the default. Raises what `load_model` raises."""
        first = await self._load_named(names[0], {"lora": self._first_lora})
        for name in names[1:]:
            await self._load_named(name, {})
        self._default = first.name

    async def unload(self, name: str | None = None) -> None:
        """Let a model go, or all; what they are still generating fails with a typed error.

        Raises ModelNotFoundError if that one is not loaded.
        """
        own_name = self._settings.model_aliases.get(name or "", name)
        # Those that had to make room for others, too, and before those that wait for that.
        leaving = [place for place in self._leaving if own_name in (None, place.model.name)]
        for place in leaving:
            await place.stop()
        await self._change(self._unload(own_name, is_found=bool(leaving)))

    async def _unload(self, name: str | None, is_found: bool) -> None:
        names = [each for each in (*self._places, *self._asleep) if name in (None, each)]
        if name is not None and not names and not is_found:
            raise ModelNotFoundError(f"The model {name} is not loaded.")
        places = [self._places.pop(each) for each in names if each in self._places]
        for each in names:
            self._asleep.pop(each, None)
        if self._default in names:
            self._default = next(iter((*self._places, *self._asleep)), None)
        for place in places:
            await place.stop()

    def abort_all(self) -> None:
        """End every generation of every model, but those of the background."""
        for place in (*self._places.values(), *self._leaving):
            place.model.engine.abort_all()

    async def unload_idle(self) -> None:
        """Let models go that nobody has used for `idle_timeout`; a request brings them back.

        A service: it does not end.
        """
        timeout = self._settings.idle_timeout * 60
        while True:
            now = monotonic()
            free = [place.used_at for place in self._places.values() if place.is_free]
            await asyncio.sleep(max(0.01, min(free, default=now) + timeout - now))
            await self._change(self._put_to_sleep(timeout))

    async def _put_to_sleep(self, timeout: float) -> None:
        for name, place in tuple(self._places.items()):
            if place.is_free and monotonic() - place.used_at >= timeout:
                self._asleep[name] = place.to_sleeping()
                self._retire(place)

    def close(self) -> None:
        """At the end: let everything go. What is still being generated, or waits for a model, fails
        with a typed error. For any thread.
        """
        self._is_closed = True
        for change in tuple(self._changes):
            change.get_loop().call_soon_threadsafe(change.cancel)
        for place in (*self._places.values(), *self._leaving):
            place.model.close()
        self._places.clear()
        self._default = None

    async def _change(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do it when its turn has come, even if whoever asked for it has left.

        Raises GenerationAbortedError when everything ends before.
        """
        if self._is_closed:
            work.close()
            raise GenerationAbortedError("The server is shutting down.")

        async def do_in_turn() -> Result:
            with closing(work):  # if its turn never comes
                async with self._turn:
                    return await work

        task = asyncio.create_task(do_in_turn())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # and not whoever waits for it
                raise GenerationAbortedError("The server is shutting down.") from None
            raise

    async def _exchange(self, wish: _Wish, report: Report) -> LoadedModel:
        """Load a model, and let those go that it takes the place of: after that, or before, where
        there is no memory for both.
        """
        report(LoadProgress(LoadStage.FINDING))
        leaving = self._choose_leaving(wish.name)
        if self._leaving and not await self._has_room(wish, report):
            await self._wait_for_leaving()
        if leaving and not await self._has_room(wish, report):
            return await self._load_after(leaving, wish, report)
        return await self._load_beside(leaving, wish, report)

    async def _has_room(self, wish: _Wish, report: Report) -> bool:
        future = self._start_looking_for_room(wish.name, wish.settings, report)
        return await asyncio.wrap_future(future)

    async def _load_beside(
        self, leaving: Sequence[_Place], wish: _Wish, report: Report
    ) -> LoadedModel:
        shared = Shared(
            thread=self._thread,
            budget=self._budget,
            num_to_come=max(1, self._max_loaded - len(self._places) + len(leaving)),
            replaced=tuple(place.model for place in (*leaving, *self._leaving)),
        )
        begun_at = monotonic()
        future = self._start_loading(wish.name, wish.settings, shared, report)
        model = await asyncio.wrap_future(future)
        logger.info(
            "Loaded %s in %.1f s (%s, %s, context length %d tokens)",
            model.name,
            monotonic() - begun_at,
            model.device,
            model.dtype,
            model.max_model_len,
        )
        for place in self._choose_leaving(model.name):
            self._retire(place)
        self.add(model, wish)
        return model

    async def _load_after(
        self, leaving: Sequence[_Place], wish: _Wish, report: Report
    ) -> LoadedModel:
        """If it fails, what had to go for it comes back."""
        default, wishes = self._default, [place.wish for place in leaving]
        for place in leaving:
            self._retire(place)
        await self._wait_for_leaving()
        try:
            return await self._load_beside((), wish, report)
        except Exception:  # whatever it was: the others must come back, and it is raised again
            for each in wishes:
                await self._restore(each)
            self._default = default
            raise

    async def _restore(self, wish: _Wish) -> None:
        """One that cannot be had again takes no other with it, nor the reason why it had to go."""
        try:
            await self._load_beside((), wish, report_nothing)
        except ServerError as error:
            logger.error("%s could not be loaded again: %s", wish.name, error)

    async def _wait_for_leaving(self) -> None:
        if self._leaving:
            await asyncio.wait(self._leaving.values())

    def add(self, model: LoadedModel, wish: _Wish | None = None) -> None:
        """Make a model that runs one of the loaded ones."""
        self._places[model.name] = _Place(model, wish.name if wish else model.name)
        self._asleep.pop(model.name, None)
        num_surplus = len(self._places) + len(self._asleep) - self._max_loaded
        for name in list(self._asleep)[: max(0, num_surplus)]:
            del self._asleep[name]
        if self._default not in (*self._places, *self._asleep):
            self._default = model.name

    def _choose_leaving(self, name: str) -> list[_Place]:
        """Whose place a model of that name takes."""
        own = [place for each, place in self._places.items() if each == name]
        others = [place for each, place in self._places.items() if each != name]
        others.sort(key=lambda place: place.used_at)
        num_surplus = len(others) + 1 - self._max_loaded
        return own + others[: max(0, num_surplus)]

    def _retire(self, place: _Place) -> None:
        """No further request gets it; it goes when those that have it have ended."""
        del self._places[place.model.name]
        task = asyncio.create_task(place.stop_when_free())
        self._leaving[place] = task
        task.add_done_callback(lambda _: self._leaving.pop(place))
