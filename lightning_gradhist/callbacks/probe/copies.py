"""Copies to be used up: what hangs together stays together, and the originals stay as they are.

What cannot be copied, a dataset or a loader among them, is refused here.
"""

from __future__ import annotations

import abc
import copyreg
import enum
import functools
import gc
import math
import queue
import threading
import types
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Collection, Generator
from contextlib import ExitStack, contextmanager
from multiprocessing import synchronize
from multiprocessing.managers import BaseProxy
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.weak import WeakIdKeyDictionary

from lightning_gradhist.callbacks._lightning import is_a
from lightning_gradhist.callbacks.probe.outcome import ProbeRefusedError, Refusals, is_out_of_memory
from lightning_gradhist.callbacks.probe.silence import PACKAGES, SilentLogger, SilentRun, is_of, is_writer
from lightning_gradhist.callbacks.probe.stand_ins import THREAD_IN_WORKER, Lent, Missing, Unheard, without_threads

_ATOMS = {type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis), type(NotImplemented)}
_ATOMS |= {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, types.CodeType}
_PLAIN = {dict, list, tuple, set, frozenset}
_LOCKS = (type(threading.Lock()), type(threading.RLock()), synchronize.Lock, synchronize.RLock)
_SHARED = [
    f"multiprocessing.{name}"
    for name in ("connection", "managers", "pool", "queues", "shared_memory", "sharedctypes", "synchronize")
]
_WEAK_DICTIONARIES = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, WeakIdKeyDictionary)
_NOT_COPIED = (
    "torch.distributed",
    "torch._C._distributed",
    "torch._dynamo",
    "torch.cuda",
    "deepspeed",
    "pyarrow",
    "h5py",
)
"""Packages whose objects are lent: what is asked of them leaves nothing behind, and they are no weights.

But for streams, which have a place that they are at."""
_STREAM = ("tell", "read_next_batch", "__next__")

LARGE = 2**20
"""Bytes above which a tensor or array of the data is lent, to be read only."""
ALL_SMALL = 2**26
"""Bytes of the data's smaller ones that are copied; the others are lent, too. As many are copied of what code refers to."""
_OF_DATA = ("LightningDataModule", "CombinedLoader", "_DataLoaderSource")


class Copier:
    """Copies objects with all that they reach, as ``copy.deepcopy`` does, and names by its path what cannot be copied.

    Beyond ``copy.deepcopy``: bound methods and weak references take their objects along, parameters their hooks. A compiled
    function becomes the one that it was compiled from. What cannot be copied is :class:`Missing` in the copy. Of a loader
    with workers, which read in processes of their own, it is lent to them.

    Attributes:
        code: functions, classes, modules and objects that were met and stay themselves, and may refer to more; each with
            the limit that was in force.
        limit: bytes above which a tensor or an array is lent, to be read only: infinite for what the module holds.
        by_id: objects by their ``id()``: where that is met, the copy has the id of the object's copy.
    """

    def __init__(self) -> None:
        self.refusals = Refusals()
        self._lent: list[tuple[int, int, str]] = []
        self.code: list[tuple[Any, float]] = []
        self.limit, self._in_worker = math.inf, False
        self.by_id: dict[int, Any] = {}
        self._copies: dict[int, Any] = {}  # as copy.deepcopy's memo, since some objects' own __deepcopy__ is handed it
        self._originals: list[Any] = []  # an id is only an object's own while that lives
        self._path: list[str] = []
        self._used: Counter[float] = Counter()  # bytes of copies, by limit
        self._lends_elsewhere = False  # what is not of the data
        self._rooms: dict[int, bool] = {}  # for storages, by their addresses

    def put(self, original: Any, stand_in: Any) -> None:
        """Has something else in the place of an object, or the object itself."""
        self._copies[id(original)] = stand_in
        self._copies.setdefault(id(stand_in), stand_in)  # met once more, it is no original
        self._originals.append((original, stand_in))

    def lend(self, *originals: Any) -> None:
        """Has objects as they are in the place of copies."""
        for original in originals:
            self.put(original, original)

    def keep(self, original: Any) -> Any:
        """Has an object stay itself, to be looked into later, and returns it."""
        self.code.append((original, self.limit))
        return original

    def shell(self, original: Any) -> Any:
        """An object's copy without what is in it, which :meth:`fill` puts in: later, for one that refers to all others."""
        self.keep(type(original))
        copied = _quiet(object.__new__(type(original)))
        self.put(original, copied)
        return copied

    def fill(self, copied: Any, attributes: dict[str, Any]) -> Any:
        """Gives an object copies of attributes, and returns it."""
        vars(copied).update(self._attributes(attributes))
        return copied

    def copy(self, value: Any, name: Any = "") -> Any:
        """The copy of an object: always the same one.

        The messages call it by its name: a word, what is written behind its owner's, or an index in a tuple.
        """
        kind = type(value)
        if kind in _ATOMS:
            return id(self.copy(self.by_id[value])) if kind is int and value in self.by_id else value
        if id(value) in self._copies:
            return self._copies[id(value)]
        plain = kind in _PLAIN and self._are_atoms(value)
        if plain and kind in (tuple, frozenset):  # first, as there may be millions
            return value
        if plain and (kind is not dict or self._are_atoms(value.values())):
            copied = value.copy()
            self.put(value, copied)
            return copied
        self._path.append(name)
        manner = self.limit, self._in_worker
        try:
            if kind in _PLAIN:  # nothing else needs to be asked of them, and there may be millions
                made = self._dictionary(value) if kind is dict else self._items(value)
            else:
                self._set_limit(value)
                made = self._copied(value)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, ProbeRefusedError):
                raise
            made = self._not_copied(value, error)
        finally:
            self._path.pop()
            self.limit, self._in_worker = manner
        self.put(value, made)
        return made

    def _set_limit(self, value: Any) -> None:
        if isinstance(value, (nn.Module, Optimizer)):
            self.limit, self._in_worker = math.inf, False
        elif isinstance(value, (DataLoader, Dataset, Sampler)) or is_a(value, *_OF_DATA):
            self.limit = LARGE

    @functools.cached_property
    def _guard(self) -> Lent | None:
        return Lent(self._lent, self.refusals) if self._lent else None

    @contextmanager
    def reading(self, in_training: bool = False) -> Generator[None, None, None]:
        """Within it, nothing can be written into what is lent; in a training step, if it is not of the data alone."""
        guard = self._guard if self._lends_elsewhere or not in_training else None
        try:
            with ExitStack() as stack:
                if not in_training:
                    stack.enter_context(without_threads(self.refusals))
                if guard is not None:
                    stack.enter_context(guard.tensors)
                    stack.enter_context(guard.arrays)
                    stack.enter_context(warnings.catch_warnings())
                    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                yield
            self.refusals.check()
        except Exception as error:
            self.refusals.check()
            if not (guard and isinstance(error, ValueError) and "read-only" in str(error)):  # so numpy has it
                raise
            names = " or ".join(path for _, _, path in self._lent[:3])
            raise ProbeRefusedError(
                f"{names} is written into in a training step, and too large to be copied"
                if in_training
                else f"{names} is written into when data are read, and too large to be copied; let workers read:"
                " DataLoader(num_workers=1)"
            ) from error

    def _are_atoms(self, values: Collection[Any]) -> bool:
        """Whether they are the same in a copy."""
        kinds = set(map(type, values))
        ints = values if kinds == {int} else [value for value in values if type(value) is int] if int in kinds else ()
        return _ATOMS.issuperset(kinds) and self.by_id.keys().isdisjoint(ints)

    def _copied(self, value: Any) -> Any:
        kind = type(value)
        if kind in weakref.ProxyTypes:  # which says that it is what it stands for
            return weakref.proxy(self.copy(value.__str__.__self__))
        if isinstance(value, Tensor):
            return self._tensor(value)
        # Checkpoint wrappers and ZeRO's optimizer are of torch.distributed, too.
        lent = is_of(value, _NOT_COPIED) and not isinstance(value, (nn.Module, Optimizer))
        lent &= not any(hasattr(kind, name) for name in _STREAM)
        if lent or isinstance(value, (*_LOCKS, torch.jit.ScriptFunction)):
            return value
        if isinstance(value, (type, types.ModuleType, enum.Enum)):
            return self.keep(value)
        if is_a(value, "Logger") and hasattr(kind, "log_metrics"):  # one of Lightning's
            self.put(vars(value).get("_experiment"), SilentRun())  # to ask for it by name may make it
            return SilentLogger(value)
        if is_writer(value):
            return SilentRun()
        if _is_beyond_this_process(value):
            raise TypeError("it is shared between processes")
        if isinstance(value, threading.Thread) and value.is_alive():
            if not self._of_data or self._in_worker:
                raise TypeError("it is running")
            raise ProbeRefusedError(
                f"{self._where()} is a running thread, for which a copy of the data would wait in vain; {THREAD_IN_WORKER}"
            )
        if kind is threading.Condition:
            return Unheard(self.copy(vars(value)["_lock"]), self._where(), self.refusals)
        if isinstance(value, queue.Queue):
            with value.mutex:  # a thread may be filling it
                items = value.queue.copy()
            self.put(value.queue, self.copy(items, ".queue"))
            return self._reduced(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, types.FunctionType):
            original = getattr(value, "_torchdynamo_orig_callable", None)
            if original is not None:
                return self.copy(original)
            writes = is_of(value, PACKAGES) and value.__name__.startswith("log")  # to a run, as mlflow.log_metric
            return SilentRun() if writes else self.keep(value)
        if is_cached(value):  # with a memory of its own; a copy of it would be the same once more
            self.keep(value.__wrapped__)
            return functools.lru_cache(**value.cache_parameters())(value.__wrapped__)
        if kind is weakref.ref:
            return weakref.ref(self.copy(value())) if value() is not None else value
        if isinstance(value, (types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType)):
            return self._method(value)
        if kind in _WEAK_DICTIONARIES:  # which would copy either keys or values, and not both
            return self._dictionary(value)
        if isinstance(value, (nn.Module, Optimizer)) and not isinstance(value, torch.jit.ScriptModule):
            return self.fill(self.shell(value), vars(value))
        if is_a(value, "DataLoader", "StatefulDataLoader", "CombinedLoader"):
            return self._loader(value)
        by_itself = hasattr(kind, "__deepcopy__") and not is_of(value, ("pandas",))  # whose tables may be large
        made = value.__deepcopy__(self._copies) if by_itself else self._reduced(value)
        return self.keep(value) if made is value else made

    @property
    def _of_data(self) -> bool:
        return self.limit == LARGE

    def _not_copied(self, value: Any, error: Exception) -> Any:
        reads_file = any(hasattr(one, "fileno") for one in (value, *gc.get_referents(value)))  # as a csv.reader of one
        for_workers = not (reads_file or isinstance(value, Tensor) or _is_beyond_this_process(value))
        if self._in_worker and for_workers:
            return value
        if isinstance(value, tuple):  # one whose class wants other arguments than its items
            items = [self.copy(item, (i,)) for i, item in enumerate(tuple.__iter__(value))]
            if all(one is other for one, other in zip(items, tuple.__iter__(value), strict=True)):
                return value
        generator = isinstance(value, types.GeneratorType)
        what = "a generator" if generator else f"a {type(value).__name__}"
        why = "" if generator else f" ({type(error).__name__}: {error!s:.200})"
        let_workers = for_workers and self._of_data and not self._in_worker
        way_out = ", or let workers read the data: DataLoader(num_workers=1)" if let_workers else ""
        where = "each __getitem__ or __iter__" if self._of_data else "training_step"
        return Missing(
            f"{self._where()} is {what}, which cannot be copied{why}, and what a probe does with it would be seen in"
            f" training; make it where it is used, as in {where}{way_out}",
            self.refusals,
        )

    def _where(self) -> str:
        """The path to what is being copied; indices and keys are in tuples."""
        return "".join(name if isinstance(name, str) else f"[{name[0]!r:.40}]" for name in self._path)

    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor) if self.limit < math.inf else None
        if storage is not None and not self._fits(storage):
            if self._in_worker and tensor.is_shared():
                raise TypeError("it is shared between processes, and large")
            self._lend(storage.data_ptr(), storage.nbytes())
            return tensor
        try:
            copied: Tensor = (tensor if tensor.is_leaf else tensor.detach()).__deepcopy__(self._copies)
        except (RuntimeError, NotImplementedError):  # nested ones, and those of other libraries
            copied = tensor.detach().clone()
        if tensor.is_leaf and copied.requires_grad != tensor.requires_grad:
            copied.requires_grad_(tensor.requires_grad)
        self.put(tensor, copied)
        self.fill(copied, vars(tensor))
        for hook in (tensor._backward_hooks or {}).values() if tensor.is_leaf else ():
            copied.register_hook(self.copy(hook, ".hook"))
        return copied

    def _array(self, array: np.ndarray[Any, Any]) -> Any:
        if array.dtype == object:
            if self._are_atoms(array.ravel().tolist()):  # as texts, of which there may be millions
                return array.copy()
            copied = array.copy()
            self.put(array, copied)
            for index, item in np.ndenumerate(array):
                copied[index] = self.copy(item, (index,))
            return copied
        if not array.flags.writeable:
            return array
        if isinstance(array, np.memmap) or not self._has_room(array.nbytes):
            if self._in_worker and not isinstance(array, np.memmap):
                return array
            view = array.view()
            self._lend(array.__array_interface__["data"][0], array.nbytes)
            view.flags.writeable = False
            return view
        return array.copy()

    def _fits(self, storage: Any) -> bool:
        """Whether there is room for all that a tensor is a view of, as a copy has it all."""
        address = storage.data_ptr()
        if address not in self._rooms:
            self._rooms[address] = self._has_room(storage.nbytes())
        return self._rooms[address]

    def _has_room(self, size: int) -> bool:
        size = max(size, 4096)  # many small ones take their time
        fits = self.limit == math.inf or (size <= self.limit and self._used[self.limit] + size <= ALL_SMALL)
        self._used[self.limit] += size if fits else 0
        return fits

    def _lend(self, address: int, size: int) -> None:
        self._lent.append((address, size, self._where()))
        self._lends_elsewhere |= not self._of_data

    def _method(self, method: Any) -> Any:
        copied = self.copy(method.__self__, ".__self__")
        if copied is method.__self__:
            return method
        stands_in = not isinstance(copied, (type(method.__self__), Missing))  # as for a writer
        if hasattr(method, "__func__") and not stands_in:
            return types.MethodType(method.__func__, copied)
        return getattr(copied, method.__name__)

    def _items(self, value: Any) -> Any:
        kind = type(value)
        if kind is list:
            copied: list[Any] = []
            self.put(value, copied)
            copied.extend([self.copy(item, (i,)) for i, item in enumerate(value)])
            return copied
        made = kind([self.copy(item, (i,)) for i, item in enumerate(value)])
        # A tuple may hold what holds it, and be copied by now.
        return self._copies.get(id(value), made)

    def _dictionary(self, value: Any) -> Any:
        copied = type(value)()
        self.put(value, copied)
        for key, item in list(value.items()):  # a weak one may lose some meanwhile
            copied[self.copy(key, "<key>")] = self.copy(item, (key,) if type(value) is dict else "<value>")
        return copied

    def _attributes(self, attributes: dict[str, Any]) -> dict[str, Any]:
        return {name: self.copy(value, f".{name}") for name, value in attributes.items()}

    def _loader(self, loader: Any) -> Any:
        # Lightning keeps a loader's arguments in it, too: last, so that paths are those of its own attributes.
        attributes = dict(sorted(vars(loader).items(), key=lambda item: item[0].startswith("__")))
        attributes["_iterator"] = None  # persistent workers hang on it: the copy starts its own
        iterators = [name for name, value in attributes.items() if is_a(value, "_BaseDataLoaderIter")]
        if attributes.get("num_workers"):
            in_workers = {name: attributes[name] for name in ("dataset", "collate_fn", "worker_init_fn")}
            self._in_worker = True
            for name, value in in_workers.items():
                self.copy(value, f".{name}")
            self._in_worker = False
        own = {name: value for name, value in attributes.items() if name not in iterators}
        copied = self.fill(self.shell(loader), own)
        for name in iterators:  # of a loader that holds one for all epochs
            vars(copied)[name] = copied._get_iterator()
        return copied

    def _reduced(self, value: Any) -> Any:
        self.keep(type(value))
        reduce = copyreg.dispatch_table.get(type(value))
        found: Any = reduce(value) if reduce else value.__reduce_ex__(4)
        if isinstance(found, str):
            return value
        make, arguments, *more = found
        state, items, pairs = [*more, None, None, None][:3]
        copied: Any = self.copy(make)(*(self.copy(argument) for argument in arguments))
        if copied is value:  # there is one alone
            return value
        copied = _quiet(copied)
        self.put(value, copied)
        if state is not None:
            self._set_state(copied, state)
        # By the methods of the base class: some of their own forbid it, as those of frozen dicts do.
        if items is not None:
            add = functools.partial(list.append, copied) if isinstance(copied, list) else copied.append
            for i, item in enumerate(items):
                add(self.copy(item, (i,)))
        if pairs is not None:
            base: Any = next((kind for kind in (OrderedDict, dict) if isinstance(copied, kind)), type(copied))
            for key, item in pairs:
                base.__setitem__(copied, self.copy(key, "<key>"), self.copy(item, (key,)))
        return copied

    def _set_state(self, copied: Any, state: Any) -> None:
        if hasattr(type(copied), "__setstate__"):
            named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
            copied.__setstate__(self._attributes(state) if named else self.copy(state))
            return
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        if attributes:  # what has slots alone has no dictionary
            self.fill(copied, attributes)
        for name, value in self._attributes(slots or {}).items():
            object.__setattr__(copied, name, value)


def _is_beyond_this_process(value: Any) -> bool:
    """Whether a copy of it is the same once more, as other processes have it, too."""
    return isinstance(value, (SharedMemory, BaseProxy)) or is_of(value, _SHARED)  # also of classes of the user's


def is_cached(value: Any) -> bool:
    """Whether it is a function that remembers its results, as of ``functools.lru_cache``."""
    return isinstance(value, functools._lru_cache_wrapper)


def _storage(tensor: Tensor) -> Any:
    """The memory of a tensor, None where it has none of its own, as a sparse one or one that wraps others."""
    try:
        storage = tensor.untyped_storage()
        return storage if storage.data_ptr() else None
    except (RuntimeError, NotImplementedError):
        return None


def _quiet(copied: Any) -> Any:
    """Takes an object's ``__del__`` away: it may close what the original still needs."""
    if isinstance(getattr(type(copied), "__del__", None), types.FunctionType):
        kind: Any = type(copied)
        copied.__class__ = _without_del(kind)
    return copied


class _Untold:
    """Before a class of the user's, it keeps that from being told of what is made from it."""

    __slots__ = ()  # as the layout of objects is that of the user's class

    def __init_subclass__(cls) -> None:
        pass


_QUIET: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()  # no ``__subclasses__()`` for ever


def _without_del(kind: Any) -> type:
    def reduce(self: Any, protocol: Any) -> Any:  # on its way to a worker; pickle does not find this class
        make, arguments, *rest = kind.__reduce_ex__(self, protocol)
        own = tuple(kind if argument is type(self) else argument for argument in arguments)
        return _made_quiet, (make, own), *rest

    if (made := _QUIET.get(kind)) is None:
        attributes = {"__del__": lambda self: None, "__reduce_ex__": reduce, "__module__": kind.__module__}
        # In the order alone: with one more base, objects would have another layout.
        meta: Any = type("Untold", (type(kind),), {"mro": lambda cls: [cls, _Untold, *kind.__mro__]})
        new = abc.ABCMeta.__new__ if isinstance(kind, abc.ABCMeta) else type.__new__  # a user's may keep what it makes
        made = _QUIET[kind] = new(meta, kind.__name__, (kind,), {**attributes, "__slots__": ()})
    return made


def _made_quiet(make: Any, arguments: Any) -> Any:
    return _quiet(make(*arguments))
