"""Importing stays light, and who may import whom stays as docs/architecture.md says."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import fast_only

import fedsim

ROOT = Path(fedsim.__file__).parent
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate")

# Room -> the rooms below it, which it may import beside itself.
ROOMS = {
    "core": set(),
    "algorithms": {"core"},
    "aggregators": {"core"},
    "channel": {"core"},
    "data": {"core"},
    "models": {"core", "data"},
    "training": {"core", "algorithms", "aggregators", "channel", "data", "models"},
    "simulate": {"core", "algorithms", "aggregators", "privacy"},
    "executors": {"core", "aggregators"},
    "analysis": {"core"},
    "config": {"core", "aggregators", "algorithms"},
    "privacy": {"core"},
    "runs": {
        *("core", "algorithms", "aggregators", "channel", "data", "models", "training", "simulate", "executors"),
        *("analysis", "config", "privacy"),
    },
    "zero_shot": {"core", "data", "models", "analysis", "config", "runs"},
    "cli": {"core", "analysis", "config", "privacy", "runs", "zero_shot"},
}
# Beyond the rooms below, and why.
ALSO = {
    # Examples, or a PEFT config, that a script hands over; and the default partition.
    "config.experiment": {"data.memory", "data.partitioners", "models.adapters"},
    # Components own their sections, and who knows a value checks it.
    "config.adapters": {"models.adapters"},
    "config.components": {"data.partitioners"},
    "config.datasets": {"data.files"},
    "config.sections": {"channel.codecs"},
    "analysis.diff": {"data.partition"},  # reads a partition as the run wrote it
    "runs.reproduce": {"zero_shot"},  # of a published table of scores
}
# Third-party packages; numerics do no input or output, and a notebook reads runs without torch.
PURE = {"torch", "numpy", "scipy"}
READING = {"numpy", "pandas", "matplotlib", "yaml", "scipy"}
OUTSIDE = {
    "core": {"torch", "numpy"},
    **dict.fromkeys(("aggregators", "algorithms", "channel"), PURE),
    **dict.fromkeys(("data.partition", "data.dealing", "data.skew"), PURE),
    "data.partitioners": {*PURE, "pydantic"},
    **{name: {"pydantic", "pydantic_core"} for name in ("core.section", "core.section_errors")},
    "analysis": READING,
    "analysis.documents": {*READING, "jinja2", "markdown_it", "markupsafe"},
    **{name: {*READING, "pydantic"} for name in ("analysis.report_spec", "analysis.verdicts")},
    **{name: set() for name in ("core.errors", "core.types", "core.files")},
    "core.seeding": {"numpy"},
}
FILES_AND_PROCESSES = {
    *("io", "os", "pathlib", "json", "pickle", "csv", "shutil", "tempfile", "socket", "subprocess"),
    *("multiprocessing", "threading", "concurrent"),
}
CONFIG_READERS = {"config", "runs", "zero_shot", "cli", "__init__", "__main__"}  # others take plain arguments


def module_name(path: Path) -> str:
    """`data.partition` of fedsim/data/partition.py; a package by its own name."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(p): p for p in sorted(ROOT.rglob("*.py"))}


def imports(path: Path, *, top: bool = False) -> set[str]:
    """Dotted names that a file imports, `from a import b` as `a.b` too; `top` leaves those inside functions out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inner(names: set[str]) -> set[str]:
    """Modules of fedsim among imported names: `data.tokens` for `fedsim.data.tokens.Tokens`."""
    out = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "fedsim":
            tail = parts[1:]
            while tail and ".".join(tail) not in MODULES:
                tail = tail[:-1]
            out.add(".".join(tail) or "__init__")
    return out


def rule(module: str, table: dict[str, set[str]]) -> set[str] | None:
    """The rule of a module or of its package."""
    return table.get(module, table.get(module.split(".")[0]))


def test_every_rule_is_about_a_module_that_exists() -> None:
    rooms = {m.split(".")[0] for m in MODULES} - {"__init__", "__main__"}
    assert rooms == set(ROOMS), "every file has a room"
    assert {*OUTSIDE, *ALSO, *(n for allowed in ALSO.values() for n in allowed)} <= {*MODULES, *rooms}
    assert all(below < set(ROOMS) for below in ROOMS.values())


def test_a_module_imports_only_rooms_below_its_own() -> None:
    extra = set()
    for module in set(MODULES) - {"__init__", "__main__"}:
        room, also = module.split(".")[0], ALSO.get(module, set())
        found = inner(imports(MODULES[module]))
        allowed = {room, "__init__", *ROOMS[room]}
        extra |= {(module, n) for n in found - also if n.split(".")[0] not in allowed}
        assert also <= found, f"{module}: an exception that nobody needs"
    assert not extra, "(module, import that its room must not have)"


def test_the_layers_have_no_circle() -> None:
    left = dict(ROOMS)
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for room in free:
            del left[room]


def packages(module: str) -> set[str]:
    """Top-level packages that a module imports."""
    return {n.split(".")[0] for n in imports(MODULES[module])}


def of_rooms(*rooms: str) -> list[str]:
    found = [m for m in MODULES if m.split(".")[0] in rooms]
    assert found
    return found


def test_third_party_packages_stay_where_they_belong() -> None:
    for module in MODULES:
        allowed = rule(module, OUTSIDE)
        if allowed is not None:
            assert packages(module) - set(sys.stdlib_module_names) - {"fedsim"} <= allowed, module


def test_numerics_open_no_file_and_start_no_process() -> None:
    for module in (*of_rooms("aggregators", "algorithms"), "core.params"):
        assert not packages(module) & FILES_AND_PROCESSES, module
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"open", "print", "input"}, module


def test_training_knows_no_processes() -> None:
    for module in of_rooms("training", "simulate", "models"):
        assert not packages(module) & {"subprocess", "concurrent", "threading"}, module
        assert not any("multiprocessing" in n for n in imports(MODULES[module])), module


def test_modules_import_each_other_without_a_circle() -> None:
    graph = {m: inner(imports(p, top=True)) - {m} for m, p in MODULES.items()}
    assert any(graph.values())
    left = dict(graph)
    while left:
        free = [m for m, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for m in free:
            del left[m]


def test_global_random_state_is_left_alone() -> None:
    """`torch.manual_seed` only inside `fork_rng`; NumPy's and Python's global generators never."""
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert "np.random.seed" not in text and "random.seed(" not in text, module
        assert text.count("torch.manual_seed(") <= text.count("fork_rng("), module


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """Module of fedsim -> heavy packages that came with it, each in a fresh process's order: lightest first."""
    light = [
        "fedsim",
        "fedsim.core.errors",
        "fedsim.config.experiment",
        "fedsim.cli.main",
        "fedsim.analysis.load",
        "fedsim.analysis.plots",
    ]
    code = (
        "import sys, importlib\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, *[h for h in {(*HEAVY, 'matplotlib.pyplot')!r} if h in sys.modules])\n"
        "import fedsim\n"
        "fedsim.Experiment(); fedsim.load_runs; fedsim.plots\n"
        f"print('use', *[h for h in {HEAVY!r} if h in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


def test_importing_brings_nothing_heavy(imported: dict[str, list[str]]) -> None:
    assert len(imported) == 7 and not any(imported.values()), imported


def test_editors_and_type_checkers_see_the_public_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    scope: dict[str, object] = {"__version__": fedsim.__version__}
    exec(compile(ast.Module(block.body, []), "__init__.py", "exec"), scope)
    (listed,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    assert ast.literal_eval(listed) == fedsim.__all__, "a checker reads a plain list alone"
    for name in fedsim.__all__:
        assert scope[name] is getattr(fedsim, name), name
    assert (ROOT / "py.typed").is_file()


def test_a_checker_sees_every_key_of_an_experiment() -> None:
    tree = ast.parse((ROOT / "config" / "experiment.py").read_text(encoding="utf-8"))
    (cls,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Experiment"]
    (block,) = [n for n in cls.body if isinstance(n, ast.If)]
    (init,) = block.body
    fields = [f.name for f in dataclasses.fields(fedsim.Experiment)]
    assert [a.arg for a in init.args.kwonlyargs] == fields == [*inspect.signature(fedsim.Experiment).parameters]


@fast_only(0, 2)
@pytest.mark.parametrize(
    "argv",
    [
        ["run", "experiments/lora_sentiment/tiny.yaml", "local.learning_rate=1"],
        ["partition", "experiments/lora_sentiment/tiny.yaml", "local.learning_rate=1"],
        ["sweep", "experiments/heterogeneity/sweep.yaml", "local.learning_rate=1"],
        ["reproduce", "lora_sentiment", "--size", "smollm2", "local.learning_rate=1"],
        ["config", "experiments/lora_sentiment/tiny.yaml", "local.learning_rate=1"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_misspelt_key_is_told_before_torch_is_imported(argv: list[str]) -> None:
    code = f"import sys; from fedsim.cli.main import main; code = main({argv!r}); sys.exit(9 if 'torch' in sys.modules else code)"
    environment = {**os.environ, "FEDSIM_DATA": "/somewhere"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "unknown key local.learning_rate (did you mean local.lr?)" in done.stderr and done.stderr.count("\n") == 1


def test_the_public_names_are_there_and_others_are_not() -> None:
    for name in fedsim.__all__:
        assert getattr(fedsim, name) is not None
    assert set(fedsim.__all__) == set(dir(fedsim))
    with pytest.raises(AttributeError, match="no_such_name"):
        fedsim.no_such_name  # noqa: B018
