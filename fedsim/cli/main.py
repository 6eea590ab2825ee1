"""The command line: `fedsim init | config | run | sweep | reproduce | partition | plot | list | diff | eval | doctor`.

A user's mistake is one line on standard error and exit code 2; a failing client shows its own traceback and exits 1.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsim.core.errors import ClientError, Notice, UserError, cut, visible
from fedsim.core.inductor import without_folder
from fedsim.runs.signals import ended_by_signals

_INTERRUPTED = 130  # what the parser makes of Ctrl-C
_STOPPED = "stopped; run the same command to resume from the last complete round"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Federated fine-tuning of language models, simulated on a single machine.

Describe an experiment in a YAML file (base model, PEFT method, data, partition, rounds); one command trains the local-only,
federated and centralized models, evaluates them on one validation set, and writes metrics, models and figures.
central.match says which budget the centralized model has: as many examples as all clients together, or as many steps as one.

\b
  fedsim init
  fedsim run experiments/lora_sentiment/tiny.yaml
  fedsim run experiments/lora_sentiment/tiny.yaml seed=1 adapter.name=p_tuning
  fedsim partition experiments/lora_sentiment/tiny.yaml 'partition={name: dirichlet, num_clients: 10, alpha: 0.1}'
""",
)

File = Annotated[
    Path, typer.Argument(help="YAML file of an experiment; a run's own config.yaml works too.", show_default=False)
]


def _keys(incomplete: str) -> list[str]:
    """Keys that a shell may complete."""
    from fedsim.config.reference import every_key

    return sorted({f"{k.path}=" for k in every_key() if k.path.startswith(incomplete)})


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides with dotted keys, e.g. local.lr=1e-3 cohort.size=5 adapter.name=ia3.",
        show_default=False,
        autocompletion=_keys,
    ),
]

Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format", metavar="FORMAT", help="Of the figures: png (default), pdf, svg; several with commas, or repeated."
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        from fedsim import __version__

        print(f"fedsim {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("experiment.yaml"),
) -> None:
    """Write a commented experiment file that runs as it is; an existing file is never overwritten."""
    from importlib.resources import files

    text = files("fedsim").joinpath("assets/experiment.yaml").read_text(encoding="utf-8")
    place = _place(file, "FILE")
    try:
        with open(place, "x", encoding="utf-8") as stream:
            stream.write(text.replace("experiment.yaml", file.name))
    except FileExistsError:
        raise UserError(f"{file}: already exists; give another name") from None
    print(place)


@app.command("config")
def config_(
    file: Annotated[
        Path | None,
        typer.Argument(help="YAML file of an experiment; a run's own config.yaml works too.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Explain a key, a section or a component, e.g. local.lr, local or dirichlet.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the resolved config of an experiment as YAML, or explain a key. Nothing is trained or written."""
    if explain is not None:
        from fedsim.config.reference import explain as explained

        print(explained(explain))
        return
    if file is None:
        raise UserError("config: no file; give an experiment's YAML file, or --explain KEY")
    from fedsim.config.experiment import Experiment

    print(Experiment.load(file, overrides or []).to_yaml(), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files, which lets an editor complete and check keys."""
    from fedsim.config.json_schema import text

    print(text(), end="")


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no progress, only the table and the paths at the end.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Resume exactly this run (its folder, or its id under results); rounds may be increased.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run an experiment, or resume it from its last checkpoint.

    Trains the modes that the file names (local, federated, central), selects models on the validation examples, evaluates
    them once on the test examples, and writes RESULTS/NAME/ID/: config.yaml, environment.json, partition.npz, metrics/,
    checkpoints/, the models (global/, best/, local/CLIENT/, central/) and figures/. The run id is a hash of every setting
    that affects the results. Running the same command again therefore shows the finished run, or resumes the stopped one.

    --resume RUN refuses keys that would change the results of that run. With it, rounds may be increased if the learning-rate
    schedule does not depend on them: local.schedule=constant, an explicit local.horizon, or local.schedule_over=round.

    Changing a section's name (adapter.name=p_tuning) drops the file's other keys of that section.
    """
    from fedsim.config.experiment import Experiment

    exp = Experiment.load(file, overrides or [])  # before torch is imported: a slip is told at once
    from fedsim.runs.run import run as run_experiment

    done = run_experiment(exp, progress=not quiet, resume=resume)
    from fedsim.analysis.load import load_runs
    from fedsim.analysis.scores import central_budget, summary
    from fedsim.runs.seeds import SeedRuns

    if isinstance(done, SeedRuns):
        for metric in (file.stem for file in done.figures):
            _table(
                done.table(metric),
                f"{metric} of {len(done.runs)} seeds: mean and 95 % t interval, models chosen by validation",
            )
        for path in (*(run.path for run in done.runs), *sorted(done.path.iterdir())):
            print(path)
        return
    metrics = load_runs(done.path)
    central = metrics["scope"] == "central"
    budget = central_budget(metrics.loc[central, "central.match"].unique()) if "central.match" in metrics else ""
    said = f" (centralized: {budget})" if budget else ""
    for metric in ("accuracy", "macro_f1", "exact_match", "loss", "perplexity"):
        if (metrics["name"] == metric).any():
            by = metrics["best.metric"].iloc[0]
            title = f"{metric} of {done.path}; models chosen by validation {by}{said}"
            _table(summary(metrics, metric=metric), title)
    for figure in sorted((done.path / "figures").glob("*")):
        print(figure)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of a sweep.", show_default=False)],
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of concurrent runs (default: one per CUDA device; one per core on CPU).",
            min=1,
            max=1024,
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric shown in tables and figures (default: each run's best.metric).")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no live table, only the results.")] = False,
    formats: Formats = None,
) -> None:
    """Run a grid or a list of settings; finished runs are skipped, stopped ones resumed, failed ones tried again.

    The file holds `experiment` (a file, or its sections), `grid` (key: [values], every combination; or a list of grids) and
    `list` (single settings). Overrides apply to all runs; keys that the sweep sets take precedence. Writes RESULTS/NAME/: a
    folder per run, sweep.json, table.csv and table.parquet (one row per model), cells.csv (mean and bootstrap interval over
    seeds) and figures/.

    Exits with code 1 if a run failed; all others are finished then, and the reasons are listed.
    """
    from fedsim.runs.sweep_plan import Sweep, said

    kinds = _formats(formats)
    plan = Sweep.load(file, overrides or [])  # before torch is imported
    from fedsim.runs.sweep import run_sweep

    done = run_sweep(plan, progress=not quiet, workers=workers, metric=metric, formats=kinds)
    jobs, failed = done.jobs, done.failed
    finished = [job for job in jobs if job.state == "finished"]
    if finished and done.problem is None:
        from fedsim.analysis.sweeps import cells, swept_keys

        table = done.table(metric)
        budget = table.attrs.get("central_budget")
        said_of = f" (centralized: {budget})" if budget else ""
        _table(cells(table), f"{len(finished)} of {len(jobs)} run(s) in {done.path}{said_of}", swept_keys(table))
        for name in ("table.csv", "table.parquet", "cells.csv"):
            print(done.path / name)
        for figure in sorted(f for f in (done.path / "figures").glob("*") if f.suffix[1:] in kinds):
            print(figure)
    if failed:
        print(f"\n{len(failed)} of {len(jobs)} run(s) failed:", file=sys.stderr)
        for job in failed:
            print(visible(f"  {said(job.settings)}: {job.reason}"), file=sys.stderr)
    if done.problem is not None:
        problem = f"{len(finished)} run(s) are finished, but there are no tables: {done.problem}"
        print(visible(f"fedsim: {problem}"), file=sys.stderr)
        raise typer.Exit(2)
    if failed:
        raise typer.Exit(1)


@app.command()
def reproduce(
    experiment: Annotated[
        str, typer.Argument(help="A folder under experiments/ with a reproduce.yaml, or its path.", show_default=False)
    ],
    overrides: Overrides = None,
    size: Annotated[
        str, typer.Option(help="tiny (embedded), smollm2 (135M, real data) or full (the published size).")
    ] = "tiny",
    budget: Annotated[
        str | None,
        typer.Option(help="Training budget of that size (default: the published one on a GPU, else the smaller one)."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of concurrent runs (default: one per CUDA device; one per core on CPU).",
            min=1,
            max=1024,
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no live table, only the checks and the paths.")
    ] = False,
    formats: Formats = None,
) -> None:
    """Reproduce a published experiment and compare the results with the published numbers.

    Writes report.md and report.html (self-contained) with figures, a table (published, ours, difference, standard error) and
    pass/fail checks of the expected behaviour (a failed check does not make the command fail). Finished runs are reused.
    """
    import shlex

    from fedsim.runs.reproduce import Reproduction
    from fedsim.runs.reproduce import reproduce as make
    from fedsim.runs.sweep_plan import said

    kinds = _formats(formats)
    plan = Reproduction.load(experiment, size, budget, overrides or [])
    words = ["fedsim", "reproduce", experiment, "--size", size]
    words += ["--budget", plan.budget] if plan.budget is not None else []
    command = shlex.join([*words, *(overrides or [])])
    report = make(plan, command=command, progress=not quiet, workers=workers, formats=kinds)
    if report is None:
        failed = [job for job in plan.jobs if job.state == "failed"]
        print(f"{len(failed)} of {len(plan.jobs)} run(s) failed, so there is no report:", file=sys.stderr)
        for job in failed:
            print(visible(f"  {said(job.settings)}: {job.reason}"), file=sys.stderr)
        raise typer.Exit(1)
    text = report.read_text(encoding="utf-8")
    for line in text.splitlines():
        if any(word in line for word in ("PASSED", "FAILED", "NOT JUDGED")):
            print(line)
    print(report)
    print(report.with_suffix(".html"))


@app.command()
def partition(
    file: File,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for partition.json and partition.png (default: RESULTS/NAME/partition).")
    ] = None,
) -> None:
    """Preview the data partition (table and heat map) without training."""
    import json

    from fedsim.config.experiment import Experiment, results_of

    exp = Experiment.load(file, overrides or [])  # before torch is imported
    from matplotlib.figure import Figure

    from fedsim.analysis import plots
    from fedsim.core.files import check_own, write_atomic, write_figure
    from fedsim.runs.build import prepare

    out = _place(out, "--out")
    report = prepare(exp).report
    place = out or results_of(exp) / exp.name / "partition"
    if out is None:
        check_own(place, results_of(exp))
    write_atomic(place / "partition.json", (json.dumps(report, indent=2) + "\n").encode())
    figure = Figure(layout="constrained")
    plots.partition(report, figure.subplots())
    write_figure(place / "partition.png", figure, 150)
    _partition_table(report)
    print(place / "partition.json")
    print(place / "partition.png")


@app.command()
def plot(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, experiment folders or a results folder.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the figures; default: the run's own figures/, or ./figures for several runs."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, macro_f1, loss, perplexity, exact_match, ...; default: accuracy, loss and exact_match."
        ),
    ] = None,
    x: Annotated[
        str | None,
        typer.Option(
            help="step, round, tokens, bytes, seconds or simulated; default: steps if all models do as many, else tokens."
        ),
    ] = None,
    formats: Formats = None,
) -> None:
    """Redraw a run's figures, compare several runs, or rebuild a sweep's tables and figures."""
    from fedsim.analysis.load import find_runs
    from fedsim.analysis.plots import plot_runs, save_sweep
    from fedsim.analysis.sweeps import write_tables

    kinds = _formats(formats)
    runs, out = [_place(run, "RUNS") for run in runs], _place(out, "--out")
    if len(runs) == 1 and (runs[0] / "sweep.json").is_file():
        if x is not None:
            raise UserError(f"--x: {x!r} has no use for a sweep's folder, which has no curves; name some of its runs")
        tables = write_tables(runs[0], metric) if out is None and metric is None else []
        written = [*tables, *save_sweep(runs[0], out, metric, kinds)]
    else:
        found = find_runs(runs)
        place = out or (found[0] / "figures" if len(found) == 1 else Path("figures"))
        written = plot_runs(found, place, metric=metric, x=x, formats=kinds)
    for path in written:
        print(path)


@app.command("list")
def list_(
    path: Annotated[
        Path | None, typer.Argument(help="A results folder, an experiment's or a run's; default: results.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Only runs with this value of a config key or a column; also != < <= > >=. May be repeated.",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Sort by a config key, a column or a metric; -KEY in the other order."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list with an object for each run.")] = False,
    components: Annotated[
        bool,
        typer.Option(
            "--components",
            help="List the components that a config can name instead: adapters, data, partitioners ... with their keys.",
        ),
    ] = False,
) -> None:
    """List runs with their state, the config keys that vary, and their best scores; or the components a config can name.

    \b
      fedsim list results/rates --where 'local.lr<1e-3' --where adapter=lora --sort best_federated
    """
    if components:
        _components()
        return
    import json

    from fedsim.analysis.listing import list_table
    from fedsim.analysis.load import find_runs

    place = _place(path or Path("results"), "PATH")
    found: list[Path] = []
    try:
        found = find_runs(place)
    except UserError:
        if path is not None and not place.is_dir():  # a slip; without runs a folder is no fault
            raise
    frame = list_table(found, where or [], sort) if found else None
    if as_json:
        # Missing values are null; sections stay objects.
        records = [] if frame is None else frame.astype(object).where(frame.notna(), None).to_dict("records")
        print(json.dumps(records, indent=1, default=lambda value: value.item()))
    elif frame is None:
        print(visible(f"no runs in {place}"))
    else:
        counted = f"{len(frame)} run(s)" if len(frame) == len(found) else f"{len(frame)} of {len(found)} run(s)"
        _table(frame, f"{counted} in {place}", frame.attrs["exact"])


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of another.", show_default=False)],
    rtol: Annotated[float, typer.Option(help="Relative tolerance; 0: the same numbers.")] = 0.0,
    atol: Annotated[float, typer.Option(help="Absolute tolerance.")] = 0.0,
) -> None:
    """Compare two runs and show the first round, client and metric where they differ.

    Compares config, plan, partition, metrics (except wall-clock time and measured memory), models, predictions and scores.
    Differences in lanes, threads or micro-batch size are reported but do not count as a mismatch. If the number of rounds or
    the evaluation frequency differs, what both runs have is compared.

    Exits with code 0 if they agree, 1 if they differ.
    """
    from fedsim.analysis.diff import diff_runs
    from fedsim.analysis.load import find_runs, read_state

    a, b = _place(a, "RUN"), _place(b, "RUN")
    found = diff_runs(a, b, rtol, atol)
    for side, path in (("a", a), ("b", b)):
        folder = find_runs(path)[0]
        print(f"{side}  {folder} ({read_state(folder)})")
    print(visible(f"\n{found}\n", lines=True))
    print("the runs agree" if found.agree else "the runs differ")
    if not found.agree:
        raise typer.Exit(1)


@app.command("eval")
def eval_(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Run folders, folders of several runs, PEFT or transformers folders, or any model.path.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="Task names of lm-evaluation-harness, separated by commas.")
    ] = "hellaswag,piqa,winogrande",
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with local files of the tasks, or hub; default: $FEDSIM_DATA where it has them, else the hub.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Evaluate only the first N examples of each task.", min=1, show_default=False)
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Examples per batch: a number, or auto (8 on the CPU).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Base-model dtype; auto uses the dtype of the checkpoint, as lm-eval does.")
    ] = "auto",
    which: Annotated[
        str, typer.Option(help="Which checkpoints to evaluate: last, best (by validation) or both.")
    ] = "last",
    only: Annotated[
        str | None,
        typer.Option(
            help="Which models of a run to evaluate, separated by commas: global,'local/*' (default: all).",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Also evaluate the base model, as the first row.")
    ] = True,
    base_path: Annotated[
        str | None,
        typer.Option(help="Path of the base model, if it is not where its adapters say.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare all models with this one: base, best or a row's name (default: base).", show_default=False
        ),
    ] = None,
    capitals: Annotated[
        bool,
        typer.Option("--capitals", help="Begin the last sentence of HellaSwag's text form as the hub's rows do."),
    ] = False,
    task_files: Annotated[
        Path | None,
        typer.Option(help="Keep the local tasks in this folder, for lm_eval --include_path.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for eval.json and eval.csv (default: the run's own, else ./eval).", show_default=False
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no progress, only the table and the paths.")
    ] = False,
) -> None:
    """Evaluate a run's models zero-shot with lm-evaluation-harness (the extra `eval`).

    One row per model: base, global, centralized and each local-only model; acc, acc_norm and standard errors are those of
    the harness. All models answer the same examples and are compared pairwise; `~` marks a difference that is not
    statistically significant.
    """
    from fedsim.zero_shot import evaluate_zero_shot
    from fedsim.zero_shot.models import find_models
    from fedsim.zero_shot.scores import check_writable, homes

    runs = [_expanded(run, "RUN") for run in runs]
    data, base_path = _expanded(data, "--data"), _expanded(base_path, "--base-path")
    task_files, out = _place(task_files, "--task-files"), _place(out, "--out")
    patterns = None if only is None else only.split(",")
    # Scoring takes hours: a place that cannot be written to is found out before.
    places = homes(find_models(runs, which=which, only=patterns, base=base, base_path=base_path), out)
    check_writable(places, "--out")
    done = evaluate_zero_shot(
        runs,
        tasks,
        data=data,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        which=which,
        only=patterns,
        base=base,
        base_path=base_path,
        against=against,
        capitals=capitals,
        task_files=task_files,
        progress=not quiet,
    )
    about = ", ".join(f"{name} {task['items']:,} of {task['of']:,}" for name, task in done.settings["tasks"].items())
    _table(done.text(), f"items scored: {about}")
    if done.note():
        print(done.note())
    for path in done.save(out):
        print(path)


@app.command()
def doctor() -> None:
    """Show installed versions, devices and available features."""
    import importlib.util
    import os
    import platform

    import torch

    from fedsim.runs.environment import versions

    lines: list[tuple[str, str]] = [("python", platform.python_version())]
    missing = "missing: pip install fedsim-llm, or pip install -e . in the repository"
    lines += [(name, found or missing) for name, found in versions().items() if name != "gguf"]
    gguf = importlib.util.find_spec("gguf") is not None
    lines.append(("GGUF models", "work" if gguf else "need: pip install gguf"))
    for name in ("tensorboard", "wandb", "mlflow"):
        there = importlib.util.find_spec(name) is not None
        lines.append((f"tracker {name}", "works" if there else f"needs: pip install {name}"))
    lines.append(
        ("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads by default, bfloat16 {_bf16_on_cpu(torch)}")
    )
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        lines.append(
            (
                f"cuda:{i}",
                f"{about.name}, {about.total_memory / 2**30:.0f} GiB, bfloat16 {'works' if torch.cuda.is_bf16_supported() else 'is not supported'}",
            )
        )
    if torch.cuda.device_count() == 0:
        lines.append(("CUDA", "no device: the executor uses the CPU"))
    count = torch.cuda.device_count()
    default = (
        "serial on cpu"
        if count == 0
        else "serial on cuda:0"
        if count == 1
        else f"pool of {count} workers, one per CUDA device"
    )
    lines.append(("default executor", default))
    lines.append(
        (
            "FEDSIM_DATA",
            os.environ.get("FEDSIM_DATA", "not set: experiments on real data look for their files under it"),
        )
    )
    width = max(len(k) for k, _ in lines)
    for key, value in lines:
        print(f"{key:{width}s}  {value}")


def _bf16_on_cpu(torch: Any) -> str:
    fast = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return "works, with AMX" if fast else "works, without AMX (slower than float32 as a rule)"


def _components() -> None:
    from fedsim.config.experiment import components
    from fedsim.core.section import keys_of

    for section in ("data", "partition", "adapter", "algorithm", "aggregator", "executor"):
        print(f"{section}:")
        for name, cls in components(section).items():
            if name:
                print(f"  {name:22s} {', '.join(k for k in keys_of(cls) if k != 'name')}")
            else:
                print(f"  {'(any PEFT method)':22s} by PEFT's name, with the keys of its config class")


def _partition_table(report: dict[str, Any]) -> None:
    import pandas as pd

    counts = pd.DataFrame(report["class_counts"], columns=report["class_names"])
    frame = pd.concat([pd.DataFrame({"client": report["client_names"], "rows": report["sizes"]}), counts], axis=1)
    frame["JS (bits)"] = [None if v is None else round(v, 4) for v in report["js"]]
    shown = frame if len(frame) <= 40 else frame.head(40)
    clients = report["num_clients"]
    sample = f"; a sample of {len(frame)} clients" if clients > len(frame) else ""
    _table(shown, f"{clients} clients, {report['rows']} rows{sample}")
    if len(frame) > 40:
        print(
            f"... and {len(frame) - 40} more clients{' of the sample' if sample else ''}; all of them are in partition.json"
        )
    if sample:
        print(f"rows of a client: {report['min_rows']} to {report['max_rows']}, median {report['median_rows']:g}")
    print(
        f"mean JS divergence {report['js_mean']:.4f} bits (max {report['js_max']:.4f}), size Gini {report['size_gini']:.3f}"
    )
    notes = [f"{k.replace('_', ' ')}: {v}" for k, v in report["notes"].items() if v]
    if notes:
        print(visible("; ".join(notes)))
    if report["empty_clients"]:
        print(visible(f"without a row, left out of cohorts: {', '.join(report['empty_clients'])}"))


def _expanded(text: str | None, key: str) -> str | None:
    """A path of the command line as the config's own are read: `~` is a home folder; `key` is named in errors."""
    from fedsim.config.experiment import expand_path

    return None if text is None else expand_path(text, key)


def _place(path: Path | None, key: str) -> Path | None:
    """The same of a `Path`."""
    return None if path is None else Path(_expanded(str(path), key))


def _table(frame: Any, title: str, exact: Sequence[str] = ()) -> None:
    """Print a DataFrame; `exact` names the columns of config values."""
    from fedsim.analysis.tables import text_table

    print(f"\n{visible(title)}\n{text_table(frame, exact)}")


def _formats(given: list[str] | None) -> list[str]:
    """The formats asked for, several in one option with commas between them."""
    from fedsim.analysis.plots import FORMATS

    formats = [name.strip().lower() for text in given or ["png"] for name in text.split(",")]
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format: {name!r} is not available; use {', '.join(FORMATS)}, several with commas")
    return formats


def main(argv: Sequence[str] | None = None) -> int:
    """The command line's entry.

    Args:
        argv: arguments without the program's name; None = those of the process.

    Returns:
        The exit code: 0, 1 for a failing client or a bug, 2 for a user's mistake or a disk that cannot be written to, 130 after
        Ctrl-C (SIGINT), 143 after SIGTERM, 129 after SIGHUP.
    """
    with without_folder(), ended_by_signals() as came:
        try:
            code = _main(argv)
            return 128 + came[0] if came and code else code
        except BaseException as error:
            if not came:
                raise
            # What else went wrong on the way out (a terminal that is gone, say) is no news.
            given = sys.argv[1:] if argv is None else argv
            said = _STOPPED if {"run", "sweep", "reproduce"}.intersection(given[:1]) else "stopped"
            with contextlib.suppress(OSError):
                print(f"fedsim: {getattr(error, '__notes__', [said])[0]}", file=sys.stderr)
            return 128 + came[0]


@contextlib.contextmanager
def _plain_notices() -> Iterator[None]:
    """Notices are lines as all others are, each once: a warning's source line says nothing to who types commands."""
    with warnings.catch_warnings():
        usual = warnings.showwarning
        told: set[str] = set()

        def show(message: Warning | str, category: type[Warning], *about: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                line = visible(f"fedsim: {message}")
                if line not in told:
                    print(line, file=sys.stderr)
                told.add(line)
            else:
                usual(message, category, *about, **more)

        warnings.showwarning = show
        yield


def _main(argv: Sequence[str] | None) -> int:
    try:
        if any(not a.strip() or re.fullmatch(r"--[\w-]+=\s*", a) for a in (sys.argv[1:] if argv is None else argv)):
            # As a path it would mean the folder that the command is given in.
            raise UserError("an argument is empty; give a value, or leave it out (is a shell variable not set?)")
        with _plain_notices():
            code = app(args=None if argv is None else list(argv), prog_name="fedsim", standalone_mode=False)
    except UserError as error:
        print(visible(f"fedsim: {error}"), file=sys.stderr)
        return 2
    except ClientError as error:
        print(visible(f"fedsim: {error}", lines=True), file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(
            visible(f"fedsim: {cut(str(error.filename))}: {error.strerror}; give another folder or file"),
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return 2
        if hasattr(error, "format_message"):  # the command line parser's own usage errors
            print(
                visible(f"fedsim: {cut(error.format_message().rstrip('.'), 500)}; see fedsim --help"), file=sys.stderr
            )
            return 2
        raise
    if code == _INTERRUPTED:
        print(f"fedsim: {_STOPPED}", file=sys.stderr)
    return code if isinstance(code, int) else 0


def cli() -> None:
    """Console script."""
    import signal

    code = main()
    if code > 128:  # another Ctrl-C while the interpreter ends is no news either
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
