"""Users' scripts in a process: each client's runs in a thread, and one thread runs at a time.

A thread has its turn from the task it is given until it asks for the next one. At each hand-over what scripts change of a process is
exchanged: arguments, working directory, environment, output, random states, torch's settings, logging, warnings, and the modules that lie
beside the script, which every client imports for itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import multiprocessing
import os
import random
import shlex
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from fedsim.client.compat import compat
from fedsim.client.context import Context, FLModel, use
from fedsim.core.heartbeat import beat
from fedsim.core.seeding import stream_seed


class ScriptFailed(Exception):
    """What went wrong in a client's script: one line, or its traceback."""


@dataclass(frozen=True)
class Script:
    """A script and how it is run; pickles with what its files hold.

    Attributes:
        path: of the script.
        files: path from its folder -> content, of the script and of the modules beside it that it imports.
        args: site -> its arguments.
        once: whether a script lives for all rounds; else it is started for each task.
        torch: whether parameters are tensors; else NumPy arrays.
        compat: whether NVFlare's names stand for fedsim's.
        share_base: whether models that scripts load by `from_pretrained` share their weights.
        config: the section `client` of the config.
        seed: of the experiment.
        job: the run's id.
        logs: site -> file that its output goes to; without one, where it goes.
    """

    path: Path
    files: Mapping[str, bytes]
    args: Mapping[str, str]
    once: bool
    torch: bool
    compat: bool
    share_base: bool
    config: Mapping[str, Any]
    seed: int
    job: str
    logs: Mapping[str, Path] = field(default_factory=dict)

    def argv(self, site: str) -> list[str]:
        """The script's `sys.argv`."""
        return [str(self.path), *shlex.split(self.args.get(site, ""))]


class _Beside(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports the modules beside a script from the bytes that the run's id holds."""

    def __init__(self, script: Script) -> None:
        self.folder, self.files = script.path.parent, script.files
        self.tops = {Path(name).parts[0].removesuffix(".py") for name in script.files if name != script.path.name}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        stem = name.replace(".", "/")
        for file, package in ((f"{stem}.py", False), (f"{stem}/__init__.py", True)):
            if file in self.files and name.partition(".")[0] in self.tops:
                place = str(self.folder / file)
                spec = importlib.machinery.ModuleSpec(name, self, origin=place, is_package=package)
                spec.has_location = True
                return spec
        return None

    def get_source(self, fullname: str) -> str:
        stem = fullname.replace(".", "/")
        name = f"{stem}.py" if f"{stem}.py" in self.files else f"{stem}/__init__.py"
        return importlib.util.decode_source(self.files[name])

    def owns(self, name: str) -> bool:
        """Whether a module is the script's own."""
        return name == "__main__" or name.partition(".")[0] in self.tops


@dataclass
class Surroundings:
    """What scripts change of a process."""

    argv: list[str]
    path: list[str]
    folder: str
    environ: dict[str, str]
    out: TextIO
    modules: dict[str, types.ModuleType]
    randoms: tuple[Any, Any, torch.Tensor, list[torch.Tensor]]
    dtype: torch.dtype
    handlers: list[logging.Handler]
    level: int
    filters: list[Any]
    finder: _Beside | None = field(default=None, repr=False)

    @classmethod
    def take(cls, finder: _Beside | None, owns: Callable[[str], bool]) -> Surroundings:
        """Those of now; the modules of the script leave `sys.modules`."""
        root = logging.getLogger()
        modules = {n: sys.modules.pop(n) for n in [n for n in sys.modules if owns(n)]}
        if finder is not None and finder in sys.meta_path:
            sys.meta_path.remove(finder)
        return cls(
            *(list(sys.argv), list(sys.path), os.getcwd(), dict(os.environ), sys.stdout, modules),
            (random.getstate(), np.random.get_state(), torch.get_rng_state(), _of_devices()),
            *(torch.get_default_dtype(), list(root.handlers), root.level),
            *(list(warnings.filters), finder),
        )

    def put(self) -> None:
        """Make them those of the process."""
        sys.argv, sys.path[:], sys.stdout = self.argv, self.path, self.out
        if os.getcwd() != self.folder:
            os.chdir(self.folder)
        if self.environ != dict(os.environ):
            os.environ.clear()
            os.environ.update(self.environ)
        sys.modules.update(self.modules)
        if self.finder is not None:
            sys.meta_path.insert(0, self.finder)
        python, numpy, tensor, devices = self.randoms
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(tensor)
        if devices and torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(devices)
        torch.set_default_dtype(self.dtype)
        root = logging.getLogger()
        root.handlers[:], root.level = self.handlers, self.level
        warnings.filters[:] = self.filters
        getattr(warnings, "_filters_mutated", lambda: None)()  # what was shown once is looked up anew


def _of_devices() -> list[torch.Tensor]:
    """Random states of GPUs that are in use."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


class ScriptClient:
    """One client's script.

    Args:
        script: what to run.
        site: the client's name.
        stream: names of its random streams.
    """

    def __init__(self, script: Script, site: str, stream: Sequence[str | int]) -> None:
        self.script, self.site = script, site
        self.logged: list[tuple[str, float, int | None]] = []
        self.ended = False
        self._task: tuple[str, FLModel] | None = None
        self._answer: FLModel | None = None
        self._error: str | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._finder = _Beside(script)
        self._thread: threading.Thread | None = None
        self._stream, self._threads = stream, torch.get_num_threads()
        self._mine: Surroundings | None = None
        self._context = Context(site, script.job, self._next, self._take, self._log, config=dict(script.config))

    def ask(self, kind: str, model: FLModel) -> FLModel:
        """Give the script a task and its turn, until it has answered and asks for the next one, or ends.

        Raises:
            ScriptFailed: if it raises, or does not answer.
        """
        if self.ended:
            raise ScriptFailed(
                f"{self.script.path.name} ended after its first tasks and there is one more: let it loop while is_running(), or set "
                "client.launch=each_round"
            )
        self._task, self._answer = (kind, model), None
        self._turn()
        if self._error is not None:
            raise ScriptFailed(self._error)
        if self._answer is None:
            how = "ends" if self.ended else "asks for the next task"
            raise ScriptFailed(
                f"{self.script.path.name} {how} without an answer to the task {kind}: call send once for each model"
            )
        return self._answer

    def end(self) -> None:
        """No more tasks: let the script come to its end.

        Raises:
            ScriptFailed: if it raises.
        """
        if self._thread is None or self.ended:
            return
        self._task, self._context.over, self._context.received = None, True, None
        self._turn()
        if self._error is not None:
            raise ScriptFailed(self._error)

    # ------------------------------------------------------------------------------------------ the baton

    def _turn(self) -> None:
        mains = Surroundings.take(None, self._finder.owns)
        try:
            if self._thread is None:
                self._begin(mains)
                self._thread = threading.Thread(target=self._run, name=f"script-{self.site}", daemon=True)
                self._thread.start()
            else:
                assert self._mine is not None
                self._mine.put()
            self._go.release()
            self._back.acquire()
            sys.stdout.flush()
            self._mine = Surroundings.take(self._finder, self._finder.owns)
        finally:
            mains.put()

    def _begin(self, mains: Surroundings) -> None:
        """Surroundings as a fresh process has them."""
        mains.put()
        for name in mains.modules:
            sys.modules.pop(name, None)
        sys.argv = self.script.argv(self.site)
        sys.path.insert(0, str(self.script.path.parent))
        sys.meta_path.insert(0, self._finder)
        if (log := self.script.logs.get(self.site)) is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            sys.stdout = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        seed = stream_seed(self.script.seed, "script", *self._stream)
        random.setstate(random.Random(seed).getstate())
        np.random.set_state(np.random.RandomState(seed % 2**32).get_state())
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())

    def _run(self) -> None:
        self._go.acquire()
        torch.set_num_threads(self._threads)  # OpenMP has a number for each thread
        use(self._context)
        try:
            module = types.ModuleType("__main__")
            module.__file__ = str(self.script.path)
            sys.modules["__main__"] = module
            source = self.script.files[self.script.path.name]
            exec(compile(source, str(self.script.path), "exec"), vars(module))
        except SystemExit as end:
            if end.code not in (None, 0):
                self._error = f"{self.script.path.name} ended by SystemExit: {end.code}"
        except BaseException as error:
            frames = traceback.TracebackException.from_exception(error)
            own = [f for f in frames.stack if f.filename != __file__]
            frames.stack = traceback.StackSummary.from_list(own)
            self._error = "".join(frames.format()).rstrip()
        self.ended = True
        self._back.release()

    def _next(self) -> tuple[str, FLModel] | None:
        """The next task; the script gives up its turn until there is one."""
        beat()
        if self._task is None:
            self._back.release()
            self._go.acquire()
            beat()
        task, self._task = self._task, None
        return task

    def _take(self, model: FLModel) -> None:
        beat()
        kept = FLModel.__new__(FLModel)
        vars(kept).update(vars(model))  # `send` clears the script's own
        self._answer = kept

    def _log(self, name: str, value: float, step: int | None) -> None:
        beat()
        self.logged.append((name, value, step))


def settle(script: Script) -> None:
    """What holds for all scripts of this process: heartbeats, data loaders without workers, NVFlare's names, shared weights."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.utils.data import DataLoader

    register_optimizer_step_post_hook(lambda *_: beat())  # a long round is no hang
    original, told = DataLoader.__init__, []

    def alone(self: Any, *args: Any, num_workers: int = 0, **keys: Any) -> None:
        if num_workers and not told:
            told.append(1)
            print("fedsim: data loaders of scripts load in their own process: num_workers=0", file=sys.stderr)
        if num_workers:
            keys = {k: v for k, v in keys.items() if k not in ("prefetch_factor", "persistent_workers", "timeout")}
        original(self, *args, num_workers=0, **keys)

    if script.config.get("spawn"):
        # As in a process of its own: it may have children, by fork, which do not import the script again.
        multiprocessing.current_process()._config["daemon"] = False
        multiprocessing.set_start_method("fork", force=True)
    else:
        DataLoader.__init__ = alone
    if script.compat:
        compat()
    if script.share_base:
        _share_base()


def _share_base() -> None:
    """Models that scripts load by `from_pretrained` with the same arguments hold the same tensors, as long as nobody trains them."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.from_pretrained.__func__
    held: dict[str, dict[str, torch.Tensor]] = {}

    def shared(cls: type, *args: Any, **keys: Any) -> Any:
        model = original(cls, *args, **keys)
        key = repr((cls.__qualname__, args, sorted(keys.items(), key=lambda item: item[0])))
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        first = held.setdefault(key, {n: t.data for n, t in own.items()})
        for name, tensor in own.items():
            tensor.data = first[name]
        return model

    PreTrainedModel.from_pretrained = classmethod(shared)
