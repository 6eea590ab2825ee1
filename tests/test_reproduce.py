"""`fedsim reproduce`: which runs an experiment is made of, what is wrong with one, and a small one from start to end."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiers import fast_only

from fedsim.analysis.verdicts import CHECKS
from fedsim.cli.main import main
from fedsim.config.experiment import read_yaml
from fedsim.core.errors import UserError
from fedsim.runs import reproduce as module
from fedsim.runs.reproduce import Reproduction

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(f.parent.name for f in (ROOT / "experiments").glob("*/reproduce.yaml"))
PUBLISHED = {  # rows per class at each site, as decoded from the published figure
    "lora-1": [[6, 59, 25], [221, 525, 0], [19, 523, 433]],
    "lora-5": [[89, 231, 71], [92, 376, 156], [65, 500, 231]],
    "lora-10": [[111, 366, 96], [43, 465, 266], [92, 276, 96]],
}


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))


def test_the_published_experiments_are_there() -> None:
    assert EXPERIMENTS == ["lora_sentiment", "p_tuning_sentiment", "sft_instructions"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_size_and_budget_of_an_experiment_loads(name: str) -> None:
    """What the report is to print is about runs that are made, and every check is one that exists."""
    spec = read_yaml(ROOT / "experiments" / name / "reproduce.yaml")
    labels = {one["label"] for one in spec["runs"]}
    lines = [*spec["published"], *spec["verdicts"]]
    assert {label for line in lines for label in line.get("runs") or [line["run"]]} == labels
    assert {line["check"] for line in spec["verdicts"]} <= set(CHECKS)
    assert set(spec["sizes"]) == set(module.SIZES)
    for size, about in spec["sizes"].items():
        for budget in about.get("budgets") or [None]:
            plan = Reproduction.load(name, size, budget)
            assert len(plan.jobs) == len(plan.labels) == len(plan.titles) > 0
            keys = [(job.exp.to_yaml()) for job in plan.jobs]
            assert len(set(keys)) == len(keys), "no run twice"
            assert {job.exp.name for job in plan.jobs} == {f"{name}_{size}"}
            assert all(set(job.exp.modes) == {"local", "federated", "central"} for job in plan.jobs)


def test_lora_sentiment_is_what_was_published() -> None:
    for size in module.SIZES:
        plan = Reproduction.load("lora_sentiment", size, "published" if size == "smollm2" else None)
        runs = dict(zip(plan.labels, (job.exp for job in plan.jobs), strict=True))
        for label, counts in PUBLISHED.items():
            assert runs[label].partition.counts == counts
        for alpha in (1, 5, 10):
            sampler = runs[f"sampler-{alpha}"].partition
            assert (sampler.name, sampler.num_clients, sampler.alpha) == ("dirichlet_fedma", 3, alpha)
        assert (runs["adapter-1"].adapter.name, runs["adapter-1"].adapter.bottleneck) == ("adapter", 32)
        ptuning = runs["p_tuning-1"].adapter
        assert (ptuning.name, ptuning.num_virtual_tokens, ptuning.hidden) == ("p_tuning", 10, 1024)
    full = runs["lora-1"]
    work = full.local
    assert (work.steps, work.batch_size, full.rounds, work.horizon, work.warmup) == (200, 128, 5, 2000, 50)
    assert (work.lr, work.min_lr, work.weight_decay, list(work.betas), work.clip) == (
        1e-4,
        1e-6,
        0.01,
        [0.9, 0.98],
        1.0,
    )
    assert (full.adapter.r, full.adapter.dropout, full.adapter.init) == (32, 0.0, "xavier")
    assert work.keep_state and full.algorithm.weights == "steps" and full.evaluate.every_steps == 100


def test_tiny_runs_have_three_seeds() -> None:
    plan = Reproduction.load("lora_sentiment", "tiny")
    seeds: dict[str, list[int]] = {}
    for label, job in zip(plan.labels, plan.jobs, strict=True):
        seeds.setdefault(label, []).append(job.exp.seed)
    assert all(seeds[label] == [0, 1, 2] for label in seeds if label.startswith(("lora", "sampler")))


def test_p_tuning_sentiment_is_what_was_published() -> None:
    plan = Reproduction.load("p_tuning_sentiment", "full")
    (exp,) = {job.exp.to_yaml(): job.exp for job in plan.jobs}.values()
    work = exp.local
    assert (exp.rounds, work.epochs, work.batch_size, work.horizon, work.warmup) == (50, 1, 64, 3750, 50)
    assert (work.lr, work.min_lr, exp.adapter.num_virtual_tokens, exp.adapter.hidden) == (1e-4, 0.0, 10, 2048)
    assert (exp.partition.name, exp.partition.num_clients, exp.central.match) == ("iid", 3, "epochs")
    assert exp.data.template == "{sentence} sentiment:{label}"


def test_sft_instructions_is_what_was_published() -> None:
    for size, budget in (("full", None), ("smollm2", "published")):
        (exp,) = (job.exp for job in Reproduction.load("sft_instructions", size, budget).jobs)
        work = exp.local
        assert (exp.rounds, work.steps, work.batch_size, work.lr, work.schedule) == (5, 200, 128, 5e-6, "constant")
        assert (work.weight_decay, list(work.betas), work.clip, work.keep_state) == (0.01, [0.9, 0.98], 1.0, True)
        assert (exp.adapter.name, exp.algorithm.weights, exp.central.match) == ("none", "uniform", "steps")
        assert (exp.partition.name, exp.partition.column) == ("by_column", "source")
        assert (exp.evaluate.every_steps, exp.data.max_length, exp.best.metric) == (50, 2048, "loss")
        assert exp.data.validation_rows is None and exp.data.test_rows is None, "the combined validation rows, all"
        assert (exp.data.validation, exp.data.test, exp.data.split_seed) == (0.1, 0.1, 0)
    assert [s["path"] for s in Reproduction.load("sft_instructions", "full").jobs[0].exp.data.sources] == [
        "tatsu-lab/alpaca",
        "databricks/databricks-dolly-15k",
        "OpenAssistant/oasst1",
    ]
    (small,) = (job.exp for job in Reproduction.load("sft_instructions", "smollm2", "two-cores").jobs)
    assert small.local.lr * small.local.steps == pytest.approx(5e-6 * 200)
    table = read_yaml(ROOT / "experiments/sft_instructions/reproduce.yaml")["zero_shot"]["rows"]
    means = {row["name"]: round(sum(row["published"]) / 5, 3) for row in table}
    assert means == dict(zip(means, [0.541, 0.547, 0.543, 0.528, 0.549, 0.556], strict=True)), "as published"


@pytest.mark.thorough
def test_sft_instructions_from_its_runs_to_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The tiny size, cut to two short rounds; that scores cannot be made is said in their place."""

    def absent(*args: Any, **keys: Any) -> None:
        raise UserError("fedsim eval needs lm-evaluation-harness")

    monkeypatch.setattr("fedsim.zero_shot.evaluate_zero_shot", absent)
    short = ["rounds=2", "local.steps=2", "local.batch_size=4", "evaluate.every_steps=1", "data.validation_rows=12"]
    short.append("data.test_rows=0")
    assert main(["reproduce", "sft_instructions", "-q", f"results={tmp_path}", *short]) == 0
    out = capsys.readouterr().out.splitlines()
    text = Path(out[-2]).read_text()
    names = ["client drift within rounds", "local-only training on the smallest data set overfits"]
    names += ["below each client", "below the lowest of each client", "federated ends as low as centralized"]
    for name in names:
        assert sum(name in line and ("PASSED" in line or "FAILED" in line) for line in out) == 1, name
    assert "Ours: not scored (fedsim eval needs lm-evaluation-harness)." in text
    assert "| FedAvg | published | 0.377" in text and "statistically significant." in text
    assert "| 8-bit | 1,353 + 1.6 | 1,353 + 1.61 |" in text
    assert re.search(r"\| base model \| 2\.58 \| 12\.\d \|", text) and "oasst1 alone at the end" in text
    assert (Path(out[-2]).parent / "figures" / "loss-sites.png").is_file()


def scored(tasks: dict[str, Any], limit: int | None) -> str:
    return json.dumps({"models": [{"model": "base", "scores": {}}], "tasks": tasks, "limit": limit})


def test_a_run_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Made:
        def save(self, out: Path) -> None:
            (out / "eval.json").write_text(scored({"piqa": {}}, 5))

    def evaluate(run: Path, tasks: list[str], *, limit: int | None, progress: bool) -> Made:
        calls.append((run, tasks, limit))
        return Made()

    monkeypatch.setattr("fedsim.zero_shot.evaluate_zero_shot", evaluate)
    assert module.score(tmp_path, ["piqa"], 5) is None and calls == [(tmp_path, ["piqa"], 5)]
    assert module.score(tmp_path, ["piqa"], 5) is None and len(calls) == 1, "the scores are there"
    assert module.score(tmp_path, ["piqa"], None) is None and len(calls) == 2, "of all items they are not"
    assert module.score(tmp_path, ["piqa", "arc"], 5) is None and len(calls) == 3
    (tmp_path / "eval.json").write_text("[]")
    assert "holds a list instead of an object" in str(module.score(tmp_path, ["piqa"], 5)) and len(calls) == 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("--limit: too many"), "--limit: too many"),
        (ImportError("No module named 'lm_eval'"), "No module named 'lm_eval'; install what fedsim eval needs"),
        (ConnectionError("no\nnetwork"), "ConnectionError: no network"),
    ],
)
def test_why_a_run_has_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fails(*args: Any, **keys: Any) -> None:
        raise error

    monkeypatch.setattr("fedsim.zero_shot.evaluate_zero_shot", fails)
    reason = module.score(tmp_path, ["piqa"])
    assert reason is not None and reason.startswith(said) and "\n" not in reason


def test_items_scored_are_those_of_the_budget_or_the_size() -> None:
    limits = {
        (size, budget): Reproduction.load("sft_instructions", size, budget).limit
        for size, budget in (("tiny", None), ("smollm2", "two-cores"), ("smollm2", "published"), ("full", None))
    }
    assert list(limits.values()) == [20, 100, None, None]
    assert Reproduction.load("lora_sentiment", "tiny").limit is None


@pytest.fixture
def small(lab: Any) -> Path:
    """An experiment folder: two partitions of the lab's rows, one of them with two seeds."""
    folder = lab.root / "small"
    folder.mkdir()
    tree = lab.tree(name="small_tiny", modes=["local", "federated", "central"], rounds=2, evaluate={"every_steps": 1})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    counts = [[0, 5, 5], [5, 5, 5], [5, 10, 5]]
    spec = {
        "title": "A small <experiment>",
        "source": "nobody & co",
        "metric": "accuracy",
        "sizes": {"tiny": {"file": "tiny.yaml", "budgets": {"published": {"rounds": 3}, "short": {}}}},
        "runs": [
            {
                "label": "uneven",
                "title": "uneven",
                "set": {"partition": {"name": "class_counts", "counts": counts}},
                "seeds": {"tiny": [0, 1]},
            },
            {"label": "even", "title": "even", "set": {"partition.num_clients": 2}},
        ],
        "published": [
            {"name": "merged at the end", "run": "uneven", "what": "merged", "value": 0.9},
            {"name": "even, merged", "run": "even", "what": "merged", "value": None},
        ],
        "verdicts": [
            {"check": "lacking_class", "run": "uneven", "site": "site-1", "class": "negative"},
            {"check": "merged_beats_mean", "run": "uneven"},
            {"check": "merged_beats_lacking", "run": "uneven"},
            {"check": "merged_near_best_site", "run": "uneven"},
            {"check": "gap_shrinks", "runs": ["uneven", "even"]},
            {"check": "as_low_as_central", "run": "even", "metric": "loss"},
            {"check": "below_sites", "run": "even", "metric": "loss"},
            {"check": "saw_tooth", "run": "uneven"},
        ],
    }
    (folder / "reproduce.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return folder


def test_an_experiment_from_its_runs_to_its_report(small: Path, lab: Any, capsys: pytest.CaptureFixture) -> None:
    args = ["reproduce", str(small), "--budget", "short", "--workers", "1", "-q"]
    assert main(args) == 0
    out = capsys.readouterr().out.splitlines()
    report = lab.root / "results" / "small_tiny" / "report" / "report.md"
    assert out[-2:] == [str(report), str(report.with_suffix(".html"))]
    assert sum("PASSED" in line or "FAILED" in line or "NOT JUDGED" in line for line in out) >= 8
    runs = sorted(f.parent for f in (lab.root / "results").rglob("status.json"))
    assert len(runs) == 3
    text = report.read_text()
    assert "fedsim reproduce" in text and "--budget short" in text and all(run.name in text for run in runs)
    html = report.with_suffix(".html").read_text()
    HTMLParser().feed(html)
    assert "A small &lt;experiment&gt;" in html and "nobody &amp; co" in html and "<script" not in html
    assert "data:image/png;base64," in html and "http" not in html.split("<body")[0]
    times = [(run / "checkpoints/run.json").stat().st_mtime_ns for run in runs]
    assert main(args) == 0
    assert [(run / "checkpoints/run.json").stat().st_mtime_ns for run in runs] == times, (
        "finished runs are not made again"
    )


def test_budgets_have_reports_of_their_own(small: Path) -> None:
    assert Reproduction.load(small, "tiny").budget == "short", "no GPU, so the smaller one"
    published = Reproduction.load(small, "tiny", "published")
    assert {job.exp.rounds for job in published.jobs} == {3} and published.path.name == "report-published"
    assert Reproduction.load(small, "tiny", "short").path.name == "report"
    assert {job.exp.rounds for job in Reproduction.load(small, "tiny", None, ["rounds=5"]).jobs} == {5}


def test_a_run_that_fails_leaves_no_report(small: Path, capsys: pytest.CaptureFixture) -> None:
    spec = yaml.safe_load((small / "reproduce.yaml").read_text())
    spec["runs"][1]["set"] = {"adapter": {"name": "lora", "target_modules": ["nowhere"]}}
    (small / "reproduce.yaml").write_text(yaml.safe_dump(spec))
    assert main(["reproduce", str(small), "--workers", "1", "-q"]) == 1
    err = capsys.readouterr().err
    assert "1 of 3 run(s) failed, so there is no report" in err and "run=even seed=0: adapter.target_modules" in err


@fast_only(0, 1, 4, 5)
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["lora_sentimant"], "did you mean lora_sentiment?"),
        (
            ["lora_sentiment", "--size", "huge"],
            "lora_sentiment: --size: 'huge' is not there; give one of: tiny, smollm2, full",
        ),
        (["lora_sentiment", "--budget", "more"], "--budget: 'more' is not there"),
        (["lora_sentiment", "--size", "smollm2", "--budget", "more"], "give one of: published, two-cores"),
        (["lora_sentiment", "local.lrr=3"], "run lora-1: unknown key local.lrr"),
        (["lora_sentiment", "seed=7"], "'seed=7': this experiment sets seed itself"),
        (["lora_sentiment", "partition.alpha=2"], "'partition.alpha=2': this experiment sets partition itself"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(args: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["reproduce", *args]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_folder_without_runs_of_a_size_is_refused(small: Path) -> None:
    spec = yaml.safe_load((small / "reproduce.yaml").read_text())
    (small / "reproduce.yaml").write_text(
        yaml.safe_dump({**spec, "runs": [{**one, "sizes": ["full"]} for one in spec["runs"]]})
    )
    with pytest.raises(UserError, match="names no run for size 'tiny'"):
        Reproduction.load(small)


@fast_only(0, 1, 5, 6, 7)
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sizes": ["tiny"]}, "sizes: ['tiny'] is not a mapping"),
        ({"sizes": {"tiny": {}}}, "sizes.tiny.file: missing"),
        ({"sizes": {"tiny": {"file": "tiny.yaml", "budgets": 3}}}, "sizes.tiny.budgets: 3 is not a mapping"),
        ({"runs": ["even"]}, "runs[0]: 'even' is not a section"),
        ({"runs": []}, "runs: number of values must be >= 1"),
        ({"runs": [{"label": "even"}]}, "runs[0].title: missing"),
        ({"verdicts": [{"check": "wishful", "run": "even"}]}, "wishful"),
        ({"published": [{"name": "x", "run": "nobody", "what": "merged", "value": 1}]}, "nobody"),
        ({"figures": ["nobody"]}, "nobody"),
    ],
)
def test_a_wrong_file_is_found_before_any_run(
    small: Path, lab: Any, capsys: pytest.CaptureFixture, keys: dict, said: str
) -> None:
    spec = yaml.safe_load((small / "reproduce.yaml").read_text())
    (small / "reproduce.yaml").write_text(yaml.safe_dump({**spec, **keys}))
    assert main(["reproduce", str(small), "-q"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not (lab.root / "results").exists()


def test_other_keys_have_a_report_of_their_own(small: Path) -> None:
    plain, changed = Reproduction.load(small), Reproduction.load(small, overrides=["local.lr=1e-4"])
    assert changed.path != plain.path and changed.path.parent == plain.path.parent
    assert {job.exp.local.lr for job in changed.jobs} == {1e-4}
