"""The report: the table against known numbers, the documents against hostile text, the figures."""

from __future__ import annotations

import base64
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jinja2 import DictLoader
from markdown_it import MarkdownIt
from matplotlib.colors import to_hex
from matplotlib.image import imread
from tiers import fast_only

from fedsim.analysis import plots
from fedsim.analysis.documents import line, render, to_html
from fedsim.analysis.finished import load_run
from fedsim.analysis.load import load_runs
from fedsim.analysis.published import as_given, published_table
from fedsim.analysis.published_scores import message_mib
from fedsim.analysis.report import Member
from fedsim.analysis.report import build as build_report
from fedsim.analysis.report_spec import Form, Report
from fedsim.analysis.tables import Table, escape_markdown
from fedsim.core.errors import UserError

_made = runpy.run_path(str(Path(__file__).with_name("test_verdicts.py")))
write, write_scores = _made["write"], _made["write_scores"]
REFERENCE = Path(__file__).parents[1] / "results/reference/lora_sentiment_smollm2/e5594966fe4e"
HOSTILE = (
    'a|b\\|c <script>alert("x")</script> **bold** _it_ [l](http://evil.example) ![i](x) `code` $x$ &lt; ~~s~~ # \u202e'
)


def build(spec: dict[str, Any], *args: Any) -> Path:
    return build_report(Report(**spec), *args)


def check(spec: dict[str, Any], labels: list[str]) -> None:
    Report(**spec).check_labels(labels)


def table(lines: list[dict[str, Any]], *paths: Path, metric: str = "accuracy") -> pd.DataFrame:
    lines = [{"name": "n", "run": "a", "value": None} | line for line in lines]
    check({"published": lines}, ["a"])
    spec = Report(metric=metric, published=lines)
    return published_table(spec, {"a": [load_run(path) for path in paths]})


# --------------------------------------------------------------------------------------------------- the table


def test_numbers_of_the_reference_run() -> None:
    lines = [{"what": "merged", "round": r, "value": 0.9} for r in range(1, 6)]
    lines += [{"what": "local_mean", "at": at} for at in (0.1, 0.2, 0.6, 1.0)]
    lines += [{"what": "local_min"}, {"what": "local_max"}, {"what": "local", "site": "site-1"}]
    lines += [{"what": "clients", "round": r} for r in range(1, 6)]
    lines += [{"what": "central"}, {"what": "merged", "best": True}, {"what": "local_max", "best": True}]
    found = table(lines, REFERENCE)
    ours = [0.876, 0.916, 0.925, 0.938, 0.929, 0.701, 0.785, 0.847, 0.858, 0.770, 0.912, 0.894]
    ours += [0.785, 0.826, 0.853, 0.886, 0.923, 0.965, 0.938, 0.960]
    assert found["ours"].round(3).tolist() == ours
    assert found["difference"].tolist()[:5] == pytest.approx((found["ours"] - 0.9).tolist()[:5])
    first = found["ours"][0]
    assert found["standard_error"][0] == pytest.approx(np.sqrt(first * (1 - first) / 226))
    assert (found["runs"] == 1).all() and (found["note"] == "").all()
    assert found["published"].isna().sum() == len(lines) - 5 and found["difference"].isna().sum() == len(lines) - 5


LOCAL = {"site-1": [0.1, 0.4, 0.6, 0.7, 0.5], "site-2": [0.1, 0.2, 0.2, 0.9, 0.3]}
CLIENTS = {"site-1": [0.3, 0.5, 0.6, 0.8], "site-2": [0.5, 0.7, 0.6, 0.7]}
MERGED = [0.1, 0.65, 0.85]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "made", LOCAL, MERGED, CLIENTS, [0.1, 0.3, 0.5, 0.7, 0.9], weight=100.0)


@fast_only(0, 1, 2, 4, 6, 7, 8, 9, 10, 13)
@pytest.mark.parametrize(
    ("line", "ours", "error"),
    [
        ({"what": "merged"}, 0.85, np.sqrt(0.85 * 0.15) / 10),
        ({"what": "merged", "round": 1}, 0.65, np.sqrt(0.65 * 0.35) / 10),
        ({"what": "central", "at": 0.25}, 0.3, np.sqrt(0.3 * 0.7) / 10),
        ({"what": "central", "at": 0}, 0.1, 0.03),
        ({"what": "local_mean"}, 0.4, (0.05 + np.sqrt(0.21) / 10) / 2),  # the mean of the sites' errors
        ({"what": "local_mean", "round": 1}, 0.4, (np.sqrt(0.24) / 10 + 0.04) / 2),
        ({"what": "local_min"}, 0.3, np.sqrt(0.21) / 10),
        ({"what": "local_max"}, 0.5, 0.05),
        ({"what": "local", "site": "site-2", "at": 0.75}, 0.9, 0.03),
        ({"what": "local_mean", "best": True}, 0.8, (np.sqrt(0.21) / 10 + 0.03) / 2),  # each site's best
        ({"what": "clients"}, 0.75, (0.04 + np.sqrt(0.21) / 10) / 2),
        ({"what": "clients", "round": 1}, 0.6, (0.05 + np.sqrt(0.21) / 10) / 2),
        ({"what": "clients", "at": 0.75}, 0.6, np.sqrt(0.24) / 10),
        ({"what": "clients", "best": True}, 0.75, (0.04 + np.sqrt(0.21) / 10) / 2),
    ],
)
def test_each_kind_of_line(run: Path, line: dict[str, Any], ours: float, error: float) -> None:
    found = table([line], run).iloc[0]
    assert (found["ours"], found["standard_error"]) == pytest.approx((ours, error))
    assert found["note"] == ""


def test_best_of_a_loss_is_its_lowest(tmp_path: Path) -> None:
    path = write(tmp_path / "r", None, [9.0, 0.1, 0.4], central=[0.01, 3.0, 2.0, 1.5, 1.6], metric="loss")
    found = table([{"what": "merged", "best": True}, {"what": "central", "best": True}], path, metric="loss")
    assert found["ours"].tolist() == [0.1, 1.5], "and not the one before training"


def test_several_seeds_have_the_error_of_their_mean(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(n), None, [0.1, value], seed=n) for n, value in enumerate((0.7, 0.8, 0.9))]
    found = table([{"what": "merged", "value": 0.75}], *paths).iloc[0]
    assert (found["ours"], found["difference"], found["runs"]) == pytest.approx((0.8, 0.05, 3))
    assert found["standard_error"] == pytest.approx(0.1 / np.sqrt(3))


def test_loss_has_an_error_where_single_rows_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "r", None, [9.0, 2.0, 4 / 3], metric="loss")
    ends = [{"what": "merged"}, {"what": "merged", "round": 1}]
    assert table(ends, path, metric="loss")["standard_error"].isna().all()
    nll = {"federated": np.array([1.0, 3.0])}  # over 1 and 2 tokens: 4/3, error 2/9
    write_scores(path, np.array([-1, -1]), nll=nll, tokens=np.array([1, 2]))
    found = table(ends, path, metric="loss")
    assert found["standard_error"][0] == pytest.approx(2 / 9)
    assert np.isnan(found["standard_error"][1]), "rows are kept of the last model alone"


def test_a_number_from_an_earlier_place_says_so(run: Path) -> None:
    lines = [{"what": "local_mean", "at": 0.3}, {"what": "merged", "at": 0.75}, {"what": "clients", "at": 0.55}]
    found = table(lines, run)
    assert found["ours"].tolist() == pytest.approx([0.3, 0.65, 0.6])
    words = "taken at {} % of the steps, the last score before"
    assert found["note"][0] == f"asked for at 30 %, {words.format(25)}"
    assert found["note"][1] == f"asked for at 75 %, {words.format(50)}"
    assert found["note"][2] == f"asked for at 55 %, {words.format(50)}"


def test_what_was_not_recorded_is_left_open(run: Path, tmp_path: Path) -> None:
    central = write(tmp_path / "c", central=[0.1, 0.3, 0.5])
    lines = [{"what": "merged"}, {"what": "local_mean"}, {"what": "clients"}, {"what": "merged", "round": 3}]
    lines.append({"what": "local", "site": "site-9"})
    found = table(lines, central)
    assert found["ours"].isna().all() and (found["runs"] == 0).all()
    assert found["note"][0] == "no validation accuracy was recorded at or before this place"
    assert found["note"][3] == "the run has 1 round"
    assert "site-9" in found["note"][4] and "none" in found["note"][4]
    both = table([{"what": "merged", "value": 0.5}], run, central).iloc[0]
    assert both["ours"] == 0.85 and both["runs"] == 1 and both["note"] == "1 of 2 runs gave no number"
    gone = published_table(Report(published=[{"name": "n", "run": "z", "what": "merged", "value": 0.5}]), {})
    assert gone["note"][0] == "no finished run 'z'" and np.isnan(gone["ours"][0])


# --------------------------------------------------------------------------------------------- wrong descriptions

GOOD = {"name": "n", "run": "a", "what": "merged", "value": 0.5}
SHOTS = {
    "run": "a",
    "tasks": ["piqa"],
    "columns": [{"task": "piqa", "metric": metric, "items": 400} for metric in ("acc", "acc_norm")],
    "rows": [
        {"name": "Base", "model": "base", "published": [0.5, 0.5]},
        {"name": "A", "model": "global", "published": [0.6, 0.55]},
        {"name": "B", "model": "central", "published": [0.5, 0.9]},
    ],
    "against": [["A", "B"]],
}
SENT = {"run": "a", "parameters": 2**22, "tensors": 4, "forms": [{"name": "fp32", "bits": 32, "values": 16}]}


@fast_only(0, 3, 4, 9, 12, 13, 15, 16, 21, 24, 26, 27, 28, 37)
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"published": "all"}, ["published", "'all'", "list"]),
        ({"published": ["merged"]}, ["published[0]", "'merged'"]),
        ({"published": [GOOD, {"name": "n", "run": "a"}]}, ["published[1].what"]),
        ({"published": [GOOD | {"what": "median"}]}, ["published[0].what", "'median'", "local_mean"]),
        ({"published": [GOOD | {"what": "local"}]}, ["published[0].site"]),
        ({"published": [GOOD | {"site": "site-1"}]}, ["published[0].site"]),
        ({"published": [GOOD | {"round": 0}]}, ["published[0].round", "0"]),
        ({"published": [GOOD | {"round": True}]}, ["published[0].round", "True"]),
        ({"published": [GOOD | {"at": 1.5}]}, ["published[0].at", "1.5"]),
        ({"published": [GOOD | {"at": 0.5, "round": 1}]}, ["one place"]),
        ({"published": [GOOD | {"best": True, "round": 1}]}, ["one place"]),
        ({"published": [GOOD | {"value": "high"}]}, ["published[0].value", "'high'"]),
        ({"published": [GOOD | {"rnd": 1}]}, ["published[0].rnd", "round"]),
        ({"published": [GOOD | {"run": "b"}]}, ["published[0]", "'b'", "a"]),
        ({"verdicts": [{"check": "saw", "run": "a"}]}, ["verdicts[0].check", "'saw'"]),
        ({"verdicts": [{"check": "gap_shrinks", "runs": ["a", "b"]}]}, ["verdicts[0]", "'b'"]),
        ({"figures": ["a", "b"]}, ["figures", "'b'"]),
        ({"figures": [{"run": "b"}]}, ["figures", "'b'"]),
        ({"figures": [{"scopes": ["local"]}]}, ["figures[0]", "run"]),
        ({"figures": [{"run": "a", "scope": "local"}]}, ["figures[0].scope", "scopes"]),
        ({"figures": [{"run": "a", "scopes": ["locally"]}]}, ["figures[0].scopes", "locally", "federated"]),
        ({"figures": [{"run": "a", "draw": "pie"}]}, ["figures[0].draw", "'pie'", "each_site"]),
        ({"zero_shot": ["piqa"]}, ["zero_shot", "['piqa']", "mapping"]),
        ({"zero_shot": {"run": "a", "tasks": ["piqa"], "rows": SHOTS["rows"]}}, ["zero_shot.columns"]),
        ({"zero_shot": SHOTS | {"run": "b"}}, ["zero_shot", "'b'", "a"]),
        ({"zero_shot": SHOTS | {"limits": {}}}, ["zero_shot.limits", "limit"]),
        ({"zero_shot": SHOTS | {"tasks": ["arc"]}}, ["zero_shot.columns[0].task", "'piqa'", "arc"]),
        ({"zero_shot": SHOTS | {"against": [["A", "Z"]]}}, ["zero_shot.against", "'Z'", "B"]),
        ({"zero_shot": SHOTS | {"rows": [{"name": "A", "model": "base", "published": [0.5]}]}}, ["rows[0].published"]),
        ({"zero_shot": SHOTS | {"columns": 3}}, ["zero_shot.columns", "3", "list"]),
        ({"zero_shot": SHOTS | {"tasks": []}}, ["zero_shot.tasks"]),
        ({"zero_shot": SHOTS | {"limit": {"tiny": 0}}}, ["zero_shot.limit.tiny", "0"]),
        (
            {"zero_shot": SHOTS | {"rows": [{"name": "A", "model": "base", "published": [0.5, 43.9]}]}},
            ["rows[0].published", "43.9", "<= 1"],
        ),
        (
            {"zero_shot": SHOTS | {"columns": [{"task": "piqa", "metric": "acc", "items": 0}] * 2}},
            ["columns[0].items", "0"],
        ),
        ({"messages": {"run": "a", "parameters": 1, "tensors": 1}}, ["messages.forms"]),
        ({"messages": SENT | {"parameters": "1.3B"}}, ["messages.parameters", "'1.3B'"]),
        ({"messages": SENT | {"forms": [{"name": "x", "bits": 0, "values": 1}]}}, ["forms[0].bits", "0"]),
        ({"messages": SENT | {"forms": [{"name": "x", "bits": 8, "values": 1, "blocks": 2}]}}, ["forms[0].blocks"]),
    ],
)
def test_a_wrong_description_is_one_clear_error(spec: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check(spec, ["a"])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_right_description_passes(tmp_path: Path) -> None:
    check({"zero_shot": SHOTS, "messages": SENT, "figures": [{"run": "a", "draw": "each_site"}]}, ["a"])
    check({"published": [GOOD | {"value": None, "best": False, "at": 1}], "verdicts": [], "figures": ["a"]}, ["a"])
    with pytest.raises(UserError, match="no run to report on"):
        build({}, [], tmp_path, {})


# ------------------------------------------------------------------------------------------------ the documents


class Page(HTMLParser):
    """Reads HTML strictly: open elements, tags with attributes, text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.text.setdefault(self.open[-1], []).append(data.strip())


def rendered(markdown: str) -> tuple[list[Any], list[str]]:
    """Kinds of all Markdown tokens, and the texts of inline content without its marks."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    inline = [token for token in tokens if token.type == "inline"]
    kinds = [token.type for token in tokens] + [child.type for token in inline for child in token.children]
    return kinds, ["".join(child.content for child in token.children) for token in inline]


def test_hostile_text_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, wherever a template prints it: in a heading, a paragraph, a list, an image, a table."""
    clean = HOSTILE.replace("\u202e", "\N{REPLACEMENT CHARACTER}")
    template = "# {{ title }}\n\n{{ title | line }}\n\n- **x** {{ title }}\n\n![{{ title }}](x.png)\n\n{{ cells }}\n"
    template = template.replace("cells", "cells.markdown() | safe") + "\n{{ lines | fence }}\n"
    loader = DictLoader({"t.md.jinja": template, "page.html.jinja": "<title>{{ title }}</title>{{ body }}"})
    monkeypatch.setattr("jinja2.FileSystemLoader", lambda *_: loader)
    cells = Table([HOSTILE, "b"], [[HOSTILE, "1"], ["c", "2\n3"]], {1}, {(0, 0)})
    markdown, html = render("t", {}, title=HOSTILE, cells=cells, lines=f"```\n{HOSTILE}\n````")
    kinds, texts = rendered(markdown)
    assert not {kind for kind in kinds if kind in ("html_block", "html_inline", "link_open", "code_inline", "hr")}
    assert not {kind for kind in kinds if kind in ("em_open", "s_open")} and kinds.count("image") == 1
    assert kinds.count("tr_open") == 3 and kinds.count("td_open") == 4 and kinds.count("strong_open") == 2
    assert texts[:3] + texts[4:] == [clean, clean, f"x {clean}", clean, "b", clean, "1", "c", "2 3"], "but the image"
    assert kinds.count("fence") == 1, "a longer fence than any inside"
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "a", "i", "em", "img"}
    assert page.text["h1"] == page.text["title"] == [clean] and page.text["p"] == [clean, clean]
    assert page.text["strong"] == ["x", clean] and page.text["td"] == ["1", "c", "2 3"]


@fast_only(0, 2, 4, 6, 10)
@pytest.mark.parametrize(
    "text", ["- a", "+ a", "1. a", "12) a", "# a", "> a", "---", "===", "* a", "~~~", "    a", "1.5 a"]
)
def test_text_opens_no_block_in_markdown(text: str) -> None:
    for printed, items in ((line(text), 0), (f"- **x** {escape_markdown(text)}", 1)):
        kinds, texts = rendered(f"before\n\n{printed}\n")
        assert texts == ["before", "x " * items + " ".join(text.split())]
        assert kinds.count("list_item_open") == items
        assert not set(kinds) & {"heading_open", "hr", "blockquote_open", "fence", "code_block", "ordered_list_open"}


def test_names_stay_readable_in_markdown() -> None:
    text = "lora_sentiment of lora-1, alpha = 1 (50 %)"
    assert line(text) == text
    assert "://" not in line("http://evil.example www.evil.example").replace("\\://", "")


def test_notes_are_markdown_without_html_links_and_files(members: list[Member], tmp_path: Path) -> None:
    text = "Deviations:\n\n| a | b |\n| --- | --- |\n| <1> | 2 |\n\n![x](/etc/hostname) [l](http://evil.example)"
    out = build({"notes": text}, members, tmp_path / "out", {})
    assert out.read_text().endswith(f"## Notes\n\n{text}\n")
    page = Page(out.with_suffix(".html").read_text())
    assert page.text["td"][-2:] == ["<1>", "2"] and "Deviations:" in page.text["p"]
    assert not {tag for tag, _ in page.tags} & {"a"} and all(
        "data:image/png" in dict(a)["src"] for t, a in page.tags if t == "img"
    )


SPEC = {
    "title": "LoRA <b>on</b> | sentiment",
    "source": "post 1, figure 2",
    "metric": "accuracy",
    "published": [
        {"name": "merged after round 1 <i>", "run": "a", "what": "merged", "round": 1, "value": 0.947},
        {"name": "central | at 30 %", "run": "b", "what": "central", "at": 0.3, "value": None},
        {"name": "gone", "run": "z", "what": "central", "value": 0.5},
    ],
    "verdicts": [
        {"check": "merged_beats_mean", "run": "a"},
        {"check": "below_sites", "run": "b"},
        {"check": "merged_beats_mean", "run": "z"},
    ],
    "notes": "Deviations:\n\n- a smaller base",
}


@pytest.fixture
def members(tmp_path: Path) -> list[Member]:
    """Label a: two seeds; label b: the merged model ends below a site; environments differ."""
    local = {
        "site-1": [0.1, 0.4, 0.6, 0.7, 0.5],
        "site-2": [0.1, 0.2, 0.2, 0.5, 0.3],
        "site-3": [0.1, 0.3, 0.6, 0.8, 0.8],
    }
    clients = {site: curve[1:] for site, curve in local.items()}
    central = [0.1, 0.5, 0.7, 0.8, 0.9]
    folder = tmp_path / "results"
    paths = [write(folder / f"a{n}", local, [0.1, 0.6 + n / 10, 0.85], clients, central, seed=n) for n in range(2)]
    paths.append(write(folder / "b0", local, [0.1, 0.5, 0.6], clients, central, counts={"site-1": [5, 5, 5]}))
    for n, path in enumerate(paths):
        about = {"commit": "15abfad3300e1790579bfb", "dirty": n == 2, "python": "3.11.7", "cpu": "A <CPU>", "cores": 2}
        about |= {"gpus": ["H200"] * n, "versions": {"torch": "2.13.0", "peft": "0.21.2", "numpy": "2.4"}}
        (path / "environment.json").write_text(json.dumps(about))
    (paths[0] / "figures").mkdir()
    (paths[0] / "figures/examples.md").write_text(
        "| input | label | federated | central |\n|---|---|---|---|\n"
        "| Sales \\| rose <script>x</script> | positive | positive | **neutral** |\n"
        "| **Loss** | negative | **neutral** | negative |\n\nTest rows, chosen models; wrong predictions in bold.\n"
    )
    return [
        Member("a", "LoRA, alpha = 1", paths[0]),
        Member("a", "LoRA, alpha = 1", paths[1]),
        Member("b", "p-tuning", paths[2]),
    ]


def test_build_writes_both_documents(members: list[Member], tmp_path: Path) -> None:
    out = tmp_path / "report"
    found = build(SPEC, members, out, {"size": "tiny", "command": "fedsim reproduce x --size tiny"})
    assert found == out / "report.md"
    assert sorted(file.name for file in (out / "figures").iterdir()) == [
        "accuracy.png",
        "partition-1.png",
        "partition-2.png",
    ]
    markdown, page_text = found.read_text(), (out / "report.html").read_text()
    kinds, texts = rendered(markdown)
    assert "html_inline" not in kinds and "html_block" not in kinds and "link_open" not in kinds
    headings = ["LoRA <b>on</b> | sentiment", "Summary", "Expected behavior", "Setup", "Figures", "Published and ours"]
    headings += ["Examples: LoRA, alpha = 1", "Runs", "Notes"]
    assert [text for text in texts if text in headings] == headings
    assert kinds.count("image") == 3 and kinds.count("table_open") == 4
    for place in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (out / place).is_file()
    page = Page(page_text)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert [base64.b64decode(str(src).removeprefix("data:image/png;base64,"))[1:4] for src in images] == [b"PNG"] * 3
    assert not {tag for tag, _ in page.tags} & {"script", "link", "a", "iframe"}
    assert not [attrs for tag, attrs in page.tags if tag != "img" and ("src" in attrs or "href" in attrs)]
    assert page.text["h1"] == ["LoRA <b>on</b> | sentiment"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_the_report_says_what_came_out(members: list[Member], tmp_path: Path) -> None:
    text = build(SPEC, members, tmp_path / "report", {"size": "tiny"}).read_text()
    assert "| a | merged after round 1 \\<i\\> | 0.947 | 0.650 | -0.297 | 0.050 | 2 |" in text
    assert "| b | central \\| at 30 % (1) | - | 0.500 | - | 0.033 | 1 |" in text
    assert "| z | gone (2) | 0.500 | - | - | - | 0 |" in text
    assert "- **1:** asked for at 30 %, taken at 25 % of the steps" in text
    assert "1 PASSED, 1 FAILED, 1 NOT JUDGED." in text
    words = ["**FAILED**", "**NOT JUDGED**", "**PASSED**", "# Setup", "![Validation accuracy]"]
    assert sorted(words, key=text.index) == words, "failed checks come first, and before any figure"
    assert "- **PASSED** global model above the mean of the clients (a)." in text and "held for 2 of 2 seeds" in text
    assert (
        "- **FAILED** federated ends above each client (b)." in text
        and "site-3 0.800, difference (global - site-3) -0.200" in text
    )
    assert "- **NOT JUDGED** global model above the mean of the clients (z)." in text and "no finished run 'z'" in text
    assert "- **size:** tiny" in text
    assert "- **commit:** 15abfad3300e / 15abfad3300e, with changes" in text
    assert "A \\<CPU\\>, 2 cores / 1 x H200; A \\<CPU\\>, 2 cores / 2 x H200; A \\<CPU\\>, 2 cores" in text
    assert "- **versions:** python 3.11.7, torch 2.13.0, peft 0.21.2\n" in text
    assert "- **time:** 4 min for 3 runs, 75 s to 75 s each" in text
    assert "| Sales \\| rose \\<script\\>x\\</script\\> | positive | positive | **neutral** |" in text
    assert "| \\*\\*Loss\\*\\* | negative | **neutral** | negative |" in text, "bold in the data is text"
    assert "| a | LoRA, alpha = 1 | 1 | finished | 75 | a1 | ../results/a1 |" in text
    assert "Notes\n\nDeviations:\n\n- a smaller base" in text


def test_lines_of_another_metric_say_so(tmp_path: Path) -> None:
    path = write(tmp_path / "r", None, [9.0, 0.0612], metric="loss")
    row = {"round": 1, "step": 10, "scope": "federated", "client": None, "split": "validation", "weight": 100.0}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"name": "accuracy", "value": 0.9, "seconds": 1.0}) + "\n")
    lines = [{"name": "end", "run": "a", "what": "merged", "value": 0.05}]
    lines += [{"name": name, "run": "a", "what": "merged", "metric": "accuracy"} for name in ("end", "end, accuracy")]
    text = build({"metric": "loss", "published": lines}, [Member("a", "A", path)], tmp_path / "out", {}).read_text()
    assert "| end | 0.05 | 0.0612 | +0.0112 | - | 1 |" in text
    assert text.count("| end, accuracy | - | 0.900 | - | 0.030 | 1 |") == 2
    assert "Validation loss, where a line names no other metric. Ours" in text


def test_a_bare_run_gives_a_report(tmp_path: Path) -> None:
    path = write(tmp_path / "r", central=[0.1, 0.5, 0.7])
    for file in ("partition.json", "status.json"):
        (path / file).unlink()
    text = build({}, [Member("a", "only central", path)], tmp_path / "out", {}).read_text()
    assert "accuracy.png" in text and "partition" not in text and "Examples" not in text and "Expected" not in text


def test_examples_of_another_form_stand_as_they_are(members: list[Member], tmp_path: Path) -> None:
    odd = "| a | b |\n|---|---|\n| one | two | three |\n``` <script>\n"
    (members[0].path / "figures/examples.md").write_text(odd)
    out = tmp_path / "report"
    kinds, _ = rendered(build(SPEC, members, out, {}).read_text())
    assert kinds.count("fence") == 1 and kinds.count("table_open") == 3 and "html_block" not in kinds
    assert odd.strip() in Page((out / "report.html").read_text()).text["code"]


def test_figures_are_chosen_by_label(members: list[Member], tmp_path: Path) -> None:
    spec = {"figures": ["b"], "metric": "accuracy"}
    build(spec, members, tmp_path / "one", {})
    assert sorted(file.name for file in (tmp_path / "one/figures").iterdir()) == ["accuracy.png", "partition.png"]
    text = build({"figures": ["b", "z"]}, members, tmp_path / "two", {}).read_text()
    assert "Not drawn, without a finished run or its validation accuracy: z." in text
    loss = build({"metric": "loss"}, members, tmp_path / "three", {}).read_text()
    assert "validation loss: a, b." in loss and not (tmp_path / "three/figures/loss.png").exists()


def test_panels_of_chosen_scopes(members: list[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, set[str]]] = []
    real = plots.panels

    def spy(groups: Any, metric: str) -> Any:
        seen.extend((title, set(rows["scope"])) for title, rows in groups)
        return real(groups, metric)

    monkeypatch.setattr(plots, "panels", spy)
    left = {"run": "b", "scopes": ["federated", "central"], "title": "against centralized"}
    build({"figures": [left, {"run": "b", "scopes": ["federated", "local"]}, "a"]}, members, tmp_path / "out", {})
    assert seen == [
        ("against centralized", {"federated", "central"}),
        ("p-tuning", {"federated", "local"}),
        ("LoRA, alpha = 1", {"local", "federated", "central"}),
    ]


def test_more_than_four_labels_take_several_figures(members: list[Member], tmp_path: Path) -> None:
    many = [Member(f"l{n}", f"title {n}", members[n % 3].path) for n in range(6)]
    build({}, many, tmp_path / "out", {})
    assert (tmp_path / "out/figures/accuracy-1.png").is_file() and (tmp_path / "out/figures/accuracy-2.png").is_file()
    assert not (tmp_path / "out/figures/accuracy-3.png").exists()


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2))])
def test_panels_have_one_legend_and_one_scale(members: list[Member], count: int, shape: tuple[int, int]) -> None:
    rows = load_runs(members[2].path)
    figure = plots.panels([(f"title {n}", rows) for n in range(count)], "accuracy")
    axes = figure.axes
    grid = axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == shape and [ax.get_title() for ax in axes] == [f"title {n}" for n in range(count)]
    assert len({ax.get_ylim() for ax in axes}) == 1
    legends = [*figure.legends, *(ax.get_legend() for ax in axes if ax.get_legend())]
    assert len(legends) == 1
    texts = [text.get_text() for text in legends[0].get_texts()]
    words = ["local-only, mean and range", "centralized", "federated clients, mean", "global model"]
    assert texts == words
    if count > 1:
        colors = [to_hex(handle.get_color()).upper() for handle in legends[0].legend_handles[1:]]
        assert colors == [plots.CENTRAL, plots.FEDERATED, plots.GLOBAL]


def test_a_legend_names_what_panels_with_and_without_seeds_share(members: list[Member]) -> None:
    seeds = load_runs([member.path for member in members[:2]])
    figure = plots.panels([("seeds", seeds), ("one", load_runs(members[2].path))], "accuracy")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["local-only, mean", "centralized", "federated clients, mean", "global model"]


def test_figures_are_not_blank(members: list[Member], tmp_path: Path) -> None:
    build(SPEC, members, tmp_path / "out", {})
    for file in (tmp_path / "out/figures").iterdir():
        image = imread(file)
        assert image.shape[1] >= 600 and image[..., :3].std() > 0.05


# ------------------------------------------------------------------------------- zero-shot scores and messages


def shots(path: Path, scores: dict[str, dict[str, Any]]) -> Path:
    """A run with `eval.json`: by model the cells of its columns."""
    models = [{"run": "made/r", "model": model, "base": "tiny", "scores": cells} for model, cells in scores.items()]
    about = {"piqa": {"items": 100, "of": 1838, "from": "valid.jsonl"}}
    (path / "eval.json").write_text(json.dumps({"models": models, "limit": 100, "tasks": about}))
    return path


def cell(value: float, stderr: float | None = 0.05, noise: bool | None = None) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "difference": None, "difference_stderr": None, "within_noise": noise}


def test_zero_shot_scores_stand_under_the_published_ones(run: Path, tmp_path: Path) -> None:
    base = {"piqa_acc": cell(0.4), "piqa_acc_norm": cell(0.3), "mean": cell(0.35, 0.04)}
    merged = {"piqa_acc": cell(0.6, noise=False), "piqa_acc_norm": cell(0.32, None, True), "mean": cell(0.46, 0.03)}
    shots(run, {"base": base, "global": merged})
    out = tmp_path / "out"
    text = build({"zero_shot": SHOTS}, [Member("a", "A", run)], out, {}).read_text()
    rows = [line for line in text.split("## Zero-shot")[1].split("##")[0].split("\n") if line.startswith("| ")][2:]
    # Errors sqrt(0.25 / 400) = 0.025, sqrt(0.24 / 400) = 0.0245, sqrt(0.2475 / 400) = 0.0249, sqrt(0.09 / 400) = 0.015.
    # A: 0.1 apart, 1.96 x 0.035 = 0.0686; 0.05 apart is inside. One task: the mean's error is the mean of the two, 0.0247
    # beside 0.025, and 0.075 apart is more than 0.0688.
    assert rows == [
        "| Base | published | 0.500 ± 0.025 | 0.500 ± 0.025 | 0.500 ± 0.025 |",
        "|  | ours | 0.400 ± 0.050 | 0.300 ± 0.050 | 0.350 ± 0.040 |",
        "| A | published | 0.600 ± 0.024 | 0.550 ± 0.025 \\~ | 0.575 ± 0.025 |",
        "|  | ours | 0.600 ± 0.050 | 0.320 \\~ | 0.460 ± 0.030 |",
        "| B | published | 0.500 ± 0.025 \\~ | 0.900 ± 0.015 | 0.700 ± 0.020 |",
        "|  | ours | - | - | - |",
    ]
    # 0.575 - 0.7 with sqrt(0.0247^2 + 0.02^2) = 0.032; ours has no B.
    assert (
        "Difference (A - B), mean of 2: published -0.125, standard error at most 0.032, statistically significant."
        in text
    )
    assert "Examples of ours: piqa 100 of 1838." in text
    assert '<td style="text-align:right">' in (out / "report.html").read_text()


def test_the_mean_is_over_the_columns_of_the_table_alone(run: Path, tmp_path: Path) -> None:
    """With further columns scored, their mean is not that of the table: errors 0.05 and 0.03 of one task add to 0.04."""
    cells = {"piqa_acc": cell(0.4), "piqa_acc_norm": cell(0.3, 0.03), "arc_acc": cell(0.9), "mean": cell(0.53)}
    shots(run, {"base": cells})
    text = build({"zero_shot": SHOTS}, [Member("a", "A", run)], tmp_path / "out", {}).read_text()
    assert "|  | ours | 0.400 ± 0.050 | 0.300 ± 0.030 | 0.350 ± 0.040 |" in text


def test_tasks_are_independent_in_the_error_of_the_mean(run: Path, tmp_path: Path) -> None:
    columns = [{"task": task, "metric": "acc", "items": 100} for task in ("piqa", "arc")]
    rows = [{"name": "Base", "model": "base", "published": [0.5, 0.5]}]
    spec = {"run": "a", "tasks": ["piqa", "arc"], "columns": columns, "rows": rows}
    text = build({"zero_shot": spec}, [Member("a", "A", run)], tmp_path / "out", {}).read_text()
    assert "| Base | published | 0.500 ± 0.050 | 0.500 ± 0.050 | 0.500 ± 0.035 |" in text, "0.05 / sqrt(2)"


def test_without_scores_the_report_says_why(run: Path, tmp_path: Path) -> None:
    spec = {"zero_shot": SHOTS, "verdicts": [{"check": "merged_beats_mean", "run": "a"}]}
    told = build(spec, [Member("a", "A", run)], tmp_path / "one", {}, "lm-eval is not installed").read_text()
    assert "Ours: not scored (lm-eval is not installed)." in told
    assert "| A | published |" in told and "| ours |" not in told and "PASSED" in told
    open_ = build(spec, [Member("a", "A", run)], tmp_path / "two", {}).read_text()
    assert "no eval.json in the run; make it with: fedsim eval" in open_ and "--tasks piqa" in open_
    (run / "eval.json").write_text("{}")
    with pytest.raises(UserError, match="not the scores of fedsim eval"):
        build(spec, [Member("a", "A", run)], tmp_path / "three", {})


PUBLISHED_FORMS = {  # MiB of one message of 1,418.5M parameters: values, scales
    "fp32": ({"bits": 32}, 5411, 0.0),
    "fp16": ({"bits": 16}, 2706, 0.0),
    "8-bit": ({"bits": 8, "block": 4096, "table": 256}, 1353, 1.6),
    "4-bit": ({"bits": 4, "block": 64, "table": 16}, 676, 84.6),
}


@pytest.mark.parametrize("name", PUBLISHED_FORMS)
def test_message_sizes_are_the_published_ones(name: str) -> None:
    form, values, scales = PUBLISHED_FORMS[name]
    found = message_mib(1_418_500_000, 293, Form(name=name, values=values, **form))
    assert (round(found[0]), round(found[1], 1)) == (values, scales)


def test_messages_of_our_model_stand_beside_the_published(run: Path, tmp_path: Path) -> None:
    form = {"name": "8-bit", "bits": 8, "block": 64, "table": 256, "values": 4, "scales": 0.25}
    spec = {"messages": SENT | {"forms": [*SENT["forms"], form]}}
    (run / "model.json").write_text(json.dumps({"trained": 2**20, "parameters": 2**20}))
    row = {"round": 1, "step": 10, "scope": "federated", "client": "site-1", "split": "train", "weight": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        for name, value in (("bytes_up", 2.0**22), ("bytes_down", 2.0**21)):
            file.write(json.dumps(row | {"name": name, "value": value, "seconds": 1.0}) + "\n")
    text = build(spec, [Member("a", "A", run)], tmp_path / "out", {}).read_text()
    assert "| fp32 | 16 | 16 | 4 |" in text
    # 2^22 / 64 scales of 4 bytes are 0.25 MiB, four tables of 1 KiB 0.0039; ours 0.0625
    assert "| 8-bit | 4 + 0.25 | 4 + 0.254 | 1 + 0.0625 |" in text
    assert "Ours without the code tables" in text
    assert "Recorded in our run: 4 MiB up and 2 MiB down per client and round." in text
    (run / "model.json").write_text(json.dumps({"trained": 2**20, "tensors": 1024}))
    text = build(spec, [Member("a", "A", run)], tmp_path / "out", {}).read_text()
    assert "| 1 + 1.06 |" in text and "Ours without" not in text


def test_a_panel_of_each_site_is_a_figure_of_its_own(members: list[Member], tmp_path: Path) -> None:
    figures = [{"run": "b", "draw": "each_site", "title": "figure 3"}, "a"]
    text = build({**SPEC, "figures": figures}, members, tmp_path / "out", {}).read_text()
    assert "(figures/accuracy-sites.png)" in text and "(figures/accuracy.png)" in text
    assert imread(tmp_path / "out/figures/accuracy-sites.png").std() > 0.05


@pytest.mark.parametrize(
    ("value", "text"), [(2.0, "2.00"), (1.9, "1.90"), (1.855, "1.855"), (0.051, "0.051"), (5411, "5411")]
)
def test_published_values_are_shown_as_exact_as_they_were_given(value: float, text: str) -> None:
    assert as_given(value) == text


def test_a_row_that_a_page_has_no_room_for_is_set_tighter() -> None:
    narrow, wide = (to_html(Table(["a"] * 8, [["0.123 ± 0.456 ~"] * 8][:n], range(8)).markdown()) for n in (0, 1))
    assert '<table class="tight">' in wide and '<table class="tight">' not in narrow
