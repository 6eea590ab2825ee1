"""The command line: `fedsim init | config | schema | run | sweep | reproduce | partition | plot | list | diff | eval | predict | doctor`.

Commands only parse and print. A user's mistake is one line on standard error and exit code 2; a failing client shows its own
traceback and exits with code 1.
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

from fedsim.cli import show
from fedsim.cli.options import File, Formats, OptionalFile, Overrides, Quiet, Workers, path_argument, path_option
from fedsim.core.errors import ClientError, Notice, UserError, cut, visible
from fedsim.core.inductor import without_folder
from fedsim.runs.signals import ended_by_signals

_INTERRUPTED = 130  # exit code that click returns after Ctrl-C
_STOPPED = "stopped; run the same command to resume from the last complete round"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Federated fine-tuning of language models, simulated on a single machine.

Describe an experiment in a YAML file (base model, PEFT method, data, partition, rounds); one command trains the local-only,
federated and centralized models, evaluates them on one validation set, and writes metrics, models and figures.
central.match sets the budget of the centralized model: as many examples as all clients together, or as many steps as one.

\b
  fedsim init
  fedsim run experiments/lora_sentiment/tiny.yaml
  fedsim run experiments/lora_sentiment/tiny.yaml seed=1 adapter.name=p_tuning
  fedsim partition experiments/lora_sentiment/tiny.yaml 'partition={name: dirichlet, num_clients: 10, alpha: 0.1}'
""",
)


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
def init(file: Annotated[Path, path_argument("The file to write.")] = Path("experiment.yaml")) -> None:
    """Write a commented experiment file that runs as it is (default: experiment.yaml). Existing files are not overwritten."""
    from importlib.resources import files

    text = files("fedsim").joinpath("assets/experiment.yaml").read_text(encoding="utf-8")
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(text.replace("experiment.yaml", file.name))
    except FileExistsError:
        raise UserError(f"{file}: already exists; give another name") from None
    print(file)


@app.command("config")
def config_(
    file: OptionalFile = None,
    overrides: Overrides = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Explain a key, a section or a component, e.g. local.lr, local or dirichlet."),
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
    """Print the JSON schema of experiment files, with which an editor completes and checks keys."""
    from fedsim.config.json_schema import text

    print(text(), end="")


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    quiet: Quiet = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Resume exactly this run (its folder, or its id under results); rounds may be increased.",
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

    exp = Experiment.load(file, overrides or [])  # before torch is imported: a mistake is reported at once
    from fedsim.runs.run import run as run_experiment

    done = run_experiment(exp, progress=not quiet, resume=resume)
    from fedsim.analysis.load import load_runs
    from fedsim.analysis.scores import central_budget, summary
    from fedsim.runs.seeds import SeedRuns

    if isinstance(done, SeedRuns):
        for metric in (file.stem for file in done.figures):
            about = f"{metric} of {len(done.runs)} seeds: mean and 95 % t interval, models chosen by validation"
            show.table(done.table(metric), about)
        show.lines([*(run.path for run in done.runs), *sorted(done.path.iterdir())])
        return
    metrics = load_runs(done.path)
    central = metrics["scope"] == "central"
    budget = central_budget(metrics.loc[central, "central.match"].unique()) if "central.match" in metrics else ""
    by = f"models chosen by validation {metrics['best.metric'].iloc[0]}{f' (centralized: {budget})' if budget else ''}"
    for metric in ("accuracy", "macro_f1", "exact_match", "loss", "perplexity"):
        if (metrics["name"] == metric).any():
            show.table(summary(metrics, metric=metric), f"{metric} of {done.path}; {by}")
    show.lines(sorted((done.path / "figures").glob("*")))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of a sweep.")],
    overrides: Overrides = None,
    workers: Workers = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric shown in tables and figures (default: each run's best.metric).")
    ] = None,
    quiet: Quiet = False,
    formats: Formats = None,
) -> None:
    """Run a grid or a list of settings; finished runs are skipped, stopped ones resumed, failed ones tried again.

    The file holds `experiment` (a file, or its sections), `grid` (key: [values], every combination; or a list of grids),
    `list` (single settings), `tuned` (a sweep that runs first, and keys that take its best values) and `claims`. Overrides apply to all runs; keys that the sweep sets take precedence. Writes RESULTS/NAME/: a
    folder per run, report.md, sweep.json, table.csv and table.parquet (one row per model), cells.csv (mean and bootstrap interval over
    seeds) and figures/.

    Exits with code 1 if a run failed; all others are finished then, and the reasons are listed.
    """
    from fedsim.runs.sweep_plan import Sweep

    plan = Sweep.load(file, overrides or [])  # before torch is imported
    from fedsim.runs.sweep import run_sweep

    done = run_sweep(plan, progress=not quiet, workers=workers, metric=metric, formats=formats)
    finished = sum(job.state == "finished" for job in done.jobs)
    if finished and done.problem is None:
        from fedsim.analysis.sweeps import cells, swept_keys

        table = done.table(metric)
        budget = table.attrs.get("central_budget")
        about = f"{finished} of {len(done.jobs)} run(s) in {done.path}{f' (centralized: {budget})' if budget else ''}"
        show.table(cells(table), about, swept_keys(table))
        show.lines(done.path / name for name in ("report.md", "table.csv", "table.parquet", "cells.csv"))
        show.lines(sorted(f for f in (done.path / "figures").glob("*") if f.suffix[1:] in formats))
    if done.failed:
        print(file=sys.stderr)
        show.failed(done.jobs)
    if done.problem is not None:
        show.say(f"fedsim: {finished} run(s) are finished, but there are no tables: {done.problem}")
        raise typer.Exit(2)
    if done.failed:
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
    workers: Workers = None,
    quiet: Quiet = False,
    formats: Formats = None,
) -> None:
    """Reproduce a published experiment and compare the results with the published numbers.

    Writes report.md and report.html (self-contained) with figures, a table (published, ours, difference, standard error) and
    pass/fail checks of the expected behavior (a failed check does not make the command fail). Finished runs are reused.
    """
    import shlex

    from fedsim.runs.reproduce import Reproduction
    from fedsim.runs.reproduce import reproduce as make

    plan = Reproduction.load(experiment, size, budget, overrides or [])
    words = ["fedsim", "reproduce", experiment, "--size", size]
    words += ["--budget", plan.budget] if plan.budget is not None else []
    command = shlex.join([*words, *(overrides or [])])
    report = make(plan, command=command, progress=not quiet, workers=workers, formats=formats)
    if report is None:
        show.failed(plan.jobs, ", so there is no report")
        raise typer.Exit(1)
    text = report.read_text(encoding="utf-8").splitlines()
    show.lines(line for line in text if re.search("PASSED|FAILED|NOT JUDGED", line))
    show.lines([report, report.with_suffix(".html")])


@app.command()
def partition(
    file: File,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, path_option("Folder for partition.json and partition.png (default: RESULTS/NAME/partition).")
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

    report = prepare(exp).report
    place = out or results_of(exp) / exp.name / "partition"
    if out is None:
        check_own(place, results_of(exp))
    write_atomic(place / "partition.json", (json.dumps(report, indent=2) + "\n").encode())
    figure = Figure(layout="constrained")
    plots.partition(report, figure.subplots())
    write_figure(place / "partition.png", figure, 150)
    show.partition(report)
    show.lines([place / "partition.json", place / "partition.png"])


@app.command()
def privacy(file: File, overrides: Overrides = None) -> None:
    """Print what an experiment's privacy costs, round by round, without training."""
    from fedsim.config.experiment import Experiment

    exp = Experiment.load(file, overrides or [])  # before torch is imported
    from fedsim.runs import local_sgd
    from fedsim.runs.build import prepare
    from fedsim.runs.private import about, table

    parts = prepare(exp)
    if parts.ledger is not None:
        show.lines(local_sgd.about(parts))
        show.table(local_sgd.table(parts), f"epsilon of an example by client, {exp.rounds} rounds")
        return
    if parts.privacy is None:
        raise UserError(
            f"{file}: privacy.name: {exp.privacy.name} guarantees nothing here; give privacy={{name: central, noise_multiplier: 1}}"
        )
    show.lines(about(parts.privacy, parts.exp))
    show.table(table(parts.privacy, parts.exp.rounds), f"{parts.exp.rounds} of {exp.rounds} rounds")


_METRICS = "accuracy, macro_f1, loss, perplexity, exact_match, ... (default: accuracy, loss and exact_match)."
_X = "step, round, tokens, bytes, seconds, simulated or epsilon (default: step if all models do as many steps, else tokens)."


@app.command()
def plot(
    runs: Annotated[list[Path], path_argument("Run folders, experiment folders or a results folder.")],
    out: Annotated[
        Path | None,
        path_option("Folder for the figures (default: the run's own figures/, or ./figures for several runs)."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help=_METRICS)] = None,
    x: Annotated[str | None, typer.Option(help=_X)] = None,
    formats: Formats = None,
) -> None:
    """Redraw a run's figures, compare several runs, or rebuild a sweep's tables and figures."""
    from fedsim.analysis.load import find_runs
    from fedsim.analysis.plots import plot_runs, save_sweep
    from fedsim.analysis.sweep_report import write_report
    from fedsim.analysis.sweeps import write_tables

    if len(runs) == 1 and (runs[0] / "sweep.json").is_file():
        if x is not None:
            raise UserError(f"--x: {x!r} has no use for a sweep's folder, which has no curves; name some of its runs")
        own = out is None and metric is None  # else the sweep's tables and report stay as they are
        tables = write_tables(runs[0]) if own else []
        figures = save_sweep(runs[0], out, metric, formats)
        show.lines([*tables, *figures, *(write_report(runs[0], figures) if own else ())])
        return
    found = find_runs(runs)
    place = out or (found[0] / "figures" if len(found) == 1 else Path("figures"))
    show.lines(plot_runs(found, place, metric=metric, x=x, formats=formats))


_WHERE = "Only runs with this value of a config key or a column; also != < <= > >=. May be repeated."
_COMPONENTS = "List the components that a config can name instead: adapters, data, partitioners ... with their keys."


@app.command("list")
def list_(
    path: Annotated[
        Path | None, path_argument("A results folder, an experiment's or a run's (default: results).")
    ] = None,
    where: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help=_WHERE)] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="KEY", help="Sort by a config key, a column or a metric; -KEY: descending.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list with one object per run.")] = False,
    components: Annotated[bool, typer.Option("--components", help=_COMPONENTS)] = False,
) -> None:
    """List runs with their state, the config keys that vary, and their best scores; or the components a config can name.

    \b
      fedsim list results/rates --where 'local.lr<1e-3' --where adapter=lora --sort best_federated
    """
    if components:
        show.components()
        return
    import json

    from fedsim.analysis.listing import list_table
    from fedsim.analysis.load import find_runs

    place = path or Path("results")
    found: list[Path] = []
    try:
        found = find_runs(place)
    except UserError:
        if path is not None and not place.is_dir():  # a folder without runs is not a mistake
            raise
    frame = list_table(found, where or [], sort) if found else None
    if as_json:
        # Missing values are null; sections stay objects.
        records = [] if frame is None else frame.astype(object).where(frame.notna(), None).to_dict("records")
        print(json.dumps(records, indent=1, default=lambda value: value.item()))
    elif frame is None:
        print(visible(f"no runs in {place}"))
    else:
        of = "" if len(frame) == len(found) else f" of {len(found)}"
        show.table(frame, f"{len(frame)}{of} run(s) in {place}", frame.attrs["exact"])


@app.command()
def diff(
    a: Annotated[Path, path_argument("Folder of a run.", "RUN")],
    b: Annotated[Path, path_argument("Folder of another run.", "RUN")],
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

    found = diff_runs(a, b, rtol, atol)
    for side, path in (("a", a), ("b", b)):
        folder = find_runs(path)[0]
        print(f"{side}  {folder} ({read_state(folder)})")
    print(visible(f"\n{found}\n", lines=True))
    print("the runs agree" if found.agree else "the runs differ")
    if not found.agree:
        raise typer.Exit(1)


_TASKS = "Task names of lm-evaluation-harness, separated by commas."
_DATA = "Folder with local files of the tasks, or hub (default: $FEDSIM_DATA for the tasks it has, else the hub)."
_DTYPE = "Base-model dtype; auto uses the dtype of the checkpoint, as lm-eval does."
_WHICH = "Which checkpoints to evaluate: last, best (by validation) or both."
_ONLY = "Which models of a run to evaluate, separated by commas: global,'local/*' (default: all)."
_AGAINST = "Compare all models with this one: base, best or a row's name (default: base)."
_CAPITALS = "Begin the last sentence of HellaSwag's text form with a capital letter, as the hub's examples do."


@app.command("eval")
def eval_(
    runs: Annotated[
        list[str],
        path_argument("Run folders, folders of several runs, PEFT or transformers folders, or any model.path.", "RUN"),
    ],
    tasks: Annotated[str, typer.Option(help=_TASKS)] = "hellaswag,piqa,winogrande",
    data: Annotated[str | None, path_option(_DATA)] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate only the first N examples of each task.", min=1)] = None,
    batch_size: Annotated[str, typer.Option(help="Examples per batch: a number, or auto (8 on the CPU).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    dtype: Annotated[str, typer.Option(help=_DTYPE)] = "auto",
    which: Annotated[str, typer.Option(help=_WHICH)] = "last",
    only: Annotated[str | None, typer.Option(help=_ONLY)] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Also evaluate the base model, first.")] = True,
    base_path: Annotated[
        str | None, path_option("Path of the base model, if it is not where its adapters say.")
    ] = None,
    against: Annotated[str | None, typer.Option(help=_AGAINST)] = None,
    capitals: Annotated[bool, typer.Option("--capitals", help=_CAPITALS)] = False,
    task_files: Annotated[
        Path | None, path_option("Keep the local tasks in this folder, for lm_eval --include_path.")
    ] = None,
    out: Annotated[
        Path | None, path_option("Folder for eval.json and eval.csv (default: the run's own, else ./eval).")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate a run's models zero-shot with lm-evaluation-harness (the extra `eval`).

    One row per model: base, global, centralized and each local-only model; acc, acc_norm and standard errors are those of
    the harness. All models answer the same examples and are compared pairwise; `~` marks a difference that is not
    statistically significant.
    """
    from fedsim.zero_shot import evaluate_zero_shot
    from fedsim.zero_shot.models import find_models
    from fedsim.zero_shot.scores import check_writable, homes

    patterns = None if only is None else only.split(",")
    chosen: dict[str, Any] = {"which": which, "only": patterns, "base": base, "base_path": base_path}
    check_writable(homes(find_models(runs, **chosen), out), "--out")  # before hours of evaluation
    how = {"batch_size": batch_size, "device": device, "dtype": dtype, "against": against, "capitals": capitals}
    done = evaluate_zero_shot(
        runs, tasks, data=data, limit=limit, task_files=task_files, progress=not quiet, **chosen, **how
    )
    about = ", ".join(f"{name} {task['items']:,} of {task['of']:,}" for name, task in done.settings["tasks"].items())
    show.table(done.text(), f"examples evaluated: {about}")
    show.lines(filter(None, [done.note()]))
    show.lines(done.save(out))


_MODEL = "global (default), best, central, or client:ID: the client's own model, else its local-only one."
_INPUT = "CSV, TSV, JSON, JSONL or Parquet file with the columns of the run's data; the answer's may be missing."
_SITE = "Column that names each example's client, whose model predicts it, in the place of --model."


@app.command()
def predict(
    run: Annotated[Path, path_argument("Folder of a finished run.", "RUN")],
    input_: Annotated[Path, path_option(_INPUT, "--input")],
    model: Annotated[str | None, typer.Option(metavar="MODEL", help=_MODEL)] = None,
    output: Annotated[Path | None, path_option("File to write (default: standard output).")] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="csv or jsonl (default: by the output's ending, else csv).")
    ] = None,
    site_column: Annotated[str | None, typer.Option(metavar="NAME", help=_SITE)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
) -> None:
    """Predict new examples with a run's models: labels with probabilities, or generated text, in the order of the input."""
    from fedsim.runs.predict import FORMATS, write_predictions
    from fedsim.runs.predict import predict as predict_examples

    if format_ not in (None, *FORMATS):
        raise UserError(f"--format: {format_!r} is not known; give one of {', '.join(FORMATS)}")
    found = predict_examples(run, input_, model, site_column=site_column, device=device)
    text = write_predictions(found, output, format_)
    print(output if text is None else text, end="\n" if text is None else "")


@app.command()
def doctor() -> None:
    """Show installed versions, devices and available features."""
    show.environment()


# ------------------------------------------------------------------------------------------------ entry


def main(argv: Sequence[str] | None = None) -> int:
    """The command line's entry.

    Args:
        argv: arguments without the program's name; None = those of the process.

    Returns:
        The exit code: 0, 1 for a failing client or a bug, 2 for a user's mistake or a disk that cannot be written to, 130 after
        Ctrl-C (SIGINT), 143 after SIGTERM, 129 after SIGHUP.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    with without_folder(), ended_by_signals() as came:
        try:
            code = _main(given)
            return 128 + came[0] if came and code else code
        except BaseException as error:
            if not came:
                raise
            # Another error on the way out (a closed terminal, say) does not matter.
            said = _STOPPED if {"run", "sweep", "reproduce"}.intersection(given[:1]) else "stopped"
            with contextlib.suppress(OSError):
                print(f"fedsim: {getattr(error, '__notes__', [said])[0]}", file=sys.stderr)
            return 128 + came[0]


def _main(argv: list[str]) -> int:
    try:
        if any(not a.strip() or re.fullmatch(r"--[\w-]+=\s*", a) for a in argv):  # as a path: the working directory
            raise UserError("an argument is empty; give a value, or leave it out (is a shell variable not set?)")
        with _plain_notices():
            code = app(args=argv, prog_name="fedsim", standalone_mode=False)
    except UserError as error:
        show.say(f"fedsim: {error}")
        return 2
    except ClientError as error:
        print(visible(f"fedsim: {error}", lines=True), file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        show.say(f"fedsim: {cut(str(error.filename))}: {error.strerror}; give another folder or file")
        return 2
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        text = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text, file=sys.stderr)
        else:
            show.say(f"fedsim: {cut(text.rstrip('.'), 500)}; see fedsim --help")
        return 2
    if code == _INTERRUPTED:
        print(f"fedsim: {_STOPPED}", file=sys.stderr)
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _plain_notices() -> Iterator[None]:
    """Print each `Notice` once, as a plain line: where in the source it was raised does not help a user."""
    with warnings.catch_warnings():
        usual = warnings.showwarning
        printed: set[str] = set()

        def print_once(message: Warning | str, category: type[Warning], *about: Any, **more: Any) -> None:
            if not issubclass(category, Notice):
                usual(message, category, *about, **more)
            elif (line := f"fedsim: {message}") not in printed:
                printed.add(line)
                show.say(line)

        warnings.showwarning = print_once
        yield


def cli() -> None:
    """Console script."""
    import signal

    code = main()
    if code > 128:  # ignore another Ctrl-C while the interpreter ends
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
