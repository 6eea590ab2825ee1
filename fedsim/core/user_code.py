"""Components in a user's own file, named `FILE.py:NAME`: made from the bytes that were read first, in every process.

The modules beside the file that it imports belong to it. All of them live in a package whose name is a hash of what they
hold, so that two files that import different `helpers` do not meet, nor two versions of one file.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copyreg
import dataclasses
import functools
import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath
from types import FunctionType, ModuleType
from typing import Any

from fedsim.core.errors import UserError

_PACKAGE = "fedsim_user_"
_NEVER_BESIDE = {*sys.stdlib_module_names, "fedsim"}


class UserCode(str):
    """A component's name, `FILE.py:NAME` with the whole path; pickles with what the file and its modules hold.

    Attributes:
        files: path from the file's folder -> content; the file itself comes first.
    """

    files: dict[str, bytes]

    def __new__(cls, name: str, files: dict[str, bytes]) -> UserCode:
        made = super().__new__(cls, name)
        made.files = files
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return UserCode, (str(self), self.files)

    def __deepcopy__(self, memo: dict[int, Any]) -> UserCode:
        return self

    @property
    def folder(self) -> Path:
        return Path(self.rpartition(":")[0]).parent

    @property
    def wanted(self) -> str:
        """NAME."""
        return self.rpartition(":")[2]

    @property
    def identity(self) -> str:
        """What run ids know it by: NAME and what the files hold, wherever they lie."""
        (_, main), *others = self.files.items()
        digest = hashlib.sha256(main)
        for path, content in sorted(others):
            digest.update(repr((path, content)).encode())
        return f"{self.wanted}@{digest.hexdigest()}"

    @property
    def package(self) -> str:
        """Name of the package of its modules."""
        place = hashlib.sha256(self.rpartition(":")[0].encode()).hexdigest()
        return f"{_PACKAGE}{place[:8]}_{self.identity.rpartition('@')[2][:16]}"


def is_user_code(name: Any) -> bool:
    """Whether a component's name is of the form `FILE.py:NAME`."""
    file, colon, _ = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    return bool(colon) and file.endswith(".py")


def read(name: str, key: str) -> UserCode:
    """The name with what its file holds now; a name that carries it already, as it is.

    Args:
        name: as the user writes it; a relative file is looked for in the working directory.
        key: of the config, for messages.

    Raises:
        UserError: if the file cannot be read.
    """
    if isinstance(name, UserCode):
        return name
    text, _, wanted = name.rpartition(":")
    file = Path(text).expanduser()
    try:
        files = {file.name: file.read_bytes()}
        for path in (waiting := [file.name]):
            for below in _imported(path, files[path]):
                found = next((p for p in (f"{below}.py", f"{below}/__init__.py") if (file.parent / p).is_file()), None)
                if found is not None and found not in files:
                    files[found] = (file.parent / found).read_bytes()
                    waiting.append(found)
    except OSError as error:
        raise UserError(f"{key}: {text!r} cannot be read ({error.strerror}); give FILE.py:NAME") from None
    return UserCode(f"{file.resolve()}:{wanted}", files)


def load(name: str, key: str, what: str, fits: Callable[[Any], bool]) -> type:
    """The frozen dataclass that `FILE.py:NAME` names, whose fields are the keys of its section.

    Of a function its keyword-only parameters are the fields. Instances may be sent to other processes, where the class is
    made from the same bytes.

    Args:
        name: see `read`.
        key: of the config, for messages.
        what: the kind that is wanted in words, e.g. `class derived from fedsim.algorithms.Algorithm`.
        fits: whether something is of this kind.

    Raises:
        UserError: for a file that cannot be read or run, or has no such class.
    """
    code = read(name, key)
    with errors_of(code, key):
        module = _module(code, _module_of(next(iter(code.files))))
    found, file, wanted = getattr(module, code.wanted, None), next(iter(code.files)), code.wanted
    if not fits(found):
        own = [n for n, o in vars(module).items() if getattr(o, "__module__", None) == module.__name__ and fits(o)]
        there = f"it has {', '.join(own)}" if own else "see docs/extend.md"
        raise UserError(f"{key}: {file} has no {what} named {wanted!r}; {there}")
    if isinstance(found, FunctionType):
        with errors_of(code, key):
            return _of_function(found, f"{key}: {file}:{wanted}")
    if "__dataclass_fields__" not in vars(found) or not found.__dataclass_params__.frozen:
        raise UserError(f"{key}: {file}: {wanted} is not a frozen dataclass; put @dataclass(frozen=True) above it")
    return found


@contextlib.contextmanager
def errors_of(code: UserCode, key: str) -> Iterator[None]:
    """Say an error of the user's code in one line that names file and line.

    Raises:
        UserError: for any error but a `UserError`, which stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        paths = {str(code.folder / path): path for path in code.files}
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        places += [(error.filename, error.lineno)] if isinstance(error, SyntaxError) else []
        at = next(
            (f"{paths[file]}, line {line}" for file, line in reversed(places) if file in paths), next(iter(code.files))
        )
        raise UserError(f"{key}: {at}: {type(error).__name__}: {' '.join(str(error).split())}") from error


@functools.cache
def _of_function(function: FunctionType, of: str) -> type:
    """A dataclass of the keyword-only parameters, which calls the function."""
    hints = typing.get_type_hints(function, include_extras=True)
    fields: list[Any] = []
    for name, p in inspect.signature(function).parameters.items():
        if p.kind is not p.KEYWORD_ONLY:
            continue
        if name not in hints:
            raise UserError(f"{of}: {name} has no type; write e.g. {name}: int")
        given = p.default is not p.empty
        factory = dataclasses.field(default_factory=functools.partial(type(p.default), p.default)) if given else None
        plain = not isinstance(p.default, (list, dict, set))
        fields.append((name, hints[name], *([p.default if plain else factory] if given else [])))

    def call(self: Any, *args: Any) -> Any:
        return function(*args, **{name: getattr(self, name) for name, *_ in fields})

    about = {"__call__": call, "__doc__": function.__doc__ or "", "__module__": function.__module__}
    return dataclasses.make_dataclass(function.__name__, fields, frozen=True, kw_only=True, namespace=about)


# ------------------------------------------------------------------------------------------------ modules


def _imported(path: str, content: bytes) -> Iterator[str]:
    """Where modules that a file imports, anywhere in it, would lie below the folder, without `.py`."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):  # said with its line when the file is run
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = PurePosixPath(path).parts[: -node.level] if node.level else ()
            front = ".".join([*up, *([node.module] if node.module else [])])
            names = [f"{front}.{alias.name}".lstrip(".") for alias in node.names]
        else:
            continue
        relative = isinstance(node, ast.ImportFrom) and node.level
        for parts in (name.split(".") for name in names):
            if relative or parts[0] not in _NEVER_BESIDE:
                yield from ("/".join(parts[:n]) for n in range(1, len(parts) + 1))


def _module(code: UserCode, name: str) -> ModuleType:
    """The module of this name in the package of a user's file."""
    _Finder.loaders.setdefault(code.package, _Loader(code))
    return importlib.import_module(f"{code.package}.{name}")


def _module_of(path: str) -> str:
    """`pkg.sub` of `pkg/sub.py`, `pkg` of `pkg/__init__.py`."""
    *folders, name = path.removesuffix(".py").split("/")
    return ".".join([*folders, *([] if name == "__init__" and folders else [name.replace(".", "_")])])


class _Loader(importlib.abc.SourceLoader):
    """Loads the modules of one user's file from the bytes that its name carries."""

    def __init__(self, code: UserCode) -> None:
        self.code, self.paths = code, {f"{code.package}.{_module_of(path)}": path for path in code.files}
        tops = {name.split(".")[1] for name in self.paths} - _NEVER_BESIDE
        self.builtins = {**vars(builtins), "__import__": functools.partial(_import, code.package, tops)}

    def get_filename(self, fullname: str) -> str:
        return str(self.code.folder / self.paths[fullname])

    def get_data(self, path: Any) -> bytes:
        return self.code.files[Path(path).relative_to(self.code.folder).as_posix()]

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self.builtins
        super().exec_module(module)
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__ == module.__name__:
                copyreg.pickle(value, functools.partial(_reduce, self.code))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of users' packages, all of which are known here by name."""

    loaders: typing.ClassVar[dict[str, _Loader]] = {}

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        loader = cls.loaders.get(package)
        if loader is not None and fullname in loader.paths:
            return importlib.util.spec_from_file_location(fullname, loader.get_filename(fullname), loader=loader)
        if loader is not None and any(name.startswith(f"{fullname}.") for name in loader.paths):
            return ModuleSpec(fullname, None, is_package=True)  # a folder without __init__.py
        return None


sys.meta_path.append(_Finder)


def _import(
    package: str, tops: set[str], name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
) -> Any:
    """`__import__` in a user's modules, which looks among them first."""
    top = name.partition(".")[0]
    if level or top not in tops:
        return builtins.__import__(name, globals, locals, fromlist, level)
    found = builtins.__import__(f"{package}.{name}", globals, locals, fromlist)
    return found if fromlist else getattr(found, top)


def _reduce(code: UserCode, value: Any) -> tuple[Any, ...]:
    make, args, *rest = value.__reduce_ex__(2)
    if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return (make, args, *rest)
    kind = type(value)
    return (_new, (code, kind.__module__.partition(".")[2], kind.__qualname__, *args[1:]), *rest)


def _new(code: UserCode, module: str, name: str, *args: Any) -> Any:
    kind = functools.reduce(getattr, name.split("."), _module(code, module))
    return kind.__new__(kind, *args)
