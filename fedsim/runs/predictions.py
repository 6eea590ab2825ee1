"""What each model makes of each row: predictions to read, scores by row to compare models with, paired row by row.

`scores.npz` of a run folder holds, for M models on n validation and t test rows: `names` (str `[M]`: "federated",
"central", "local <site>"); of the last models on the validation rows `validation_rows` and `validation_labels` (int64
`[n]`, -1 without classes), `tokens` (int64 `[n]`, answer tokens), `last_nll` (float64 `[M, n]`, nats, summed over the
answer), `last_predicted` (int16 `[M, n]`, -1 without classes); of the models that validation chose `test_rows`, `test_labels`,
`test_tokens`, `chosen_nll` and `chosen_predicted` on the test rows. NaN and -1 where a model was not scored. A loss is
the sum of `nll` over the sum of tokens.
"""

from __future__ import annotations

import csv
import io
import json

import numpy as np

from fedsim.core.types import Scores
from fedsim.data.sources import Source
from fedsim.data.tokens import Tokens
from fedsim.runs.folder import RunFolder

ByRow = dict[str, np.ndarray]
_KINDS = {"validation": "last", "test": "chosen"}


def by_row(split: str, scores: Scores) -> ByRow:
    """One model's scores on a split, as they are kept: `last_nll`, `last_predicted`, or `chosen_...` on the test rows."""
    out = {f"{_KINDS[split]}_nll": scores.nll}
    if scores.predictions is not None:
        out[f"{_KINDS[split]}_predicted"] = scores.predictions.astype(np.int16)
    return out


def save_by_row(folder: RunFolder, mode: str, found: dict[str, ByRow]) -> None:
    """Keep a finished mode's scores until the run is over."""
    arrays = {f"{key}/{i}": value for i, each in enumerate(found.values()) for key, value in each.items()}
    arrays["models"] = np.frombuffer(json.dumps(list(found)).encode(), np.uint8)  # a client's id can be any text
    folder.write_arrays(f"checkpoints/{mode}/by_row.npz", arrays)


def load_by_row(folder: RunFolder, mode: str) -> dict[str, ByRow]:
    """What `save_by_row` kept."""
    with np.load(folder.path / "checkpoints" / mode / "by_row.npz", allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    out: dict[str, ByRow] = {model: {} for model in json.loads(found.pop("models").tobytes())}
    for name, array in found.items():
        key, _, i = name.partition("/")
        list(out.values())[int(i)][key] = array
    return out


def write_predictions(
    folder: RunFolder, source: Source, tokens: dict[str, Tokens], columns: dict[str, str], found: dict[str, ByRow]
) -> None:
    """Write `scores.npz`; with classes also `predictions.csv`, `figures/examples.md` and `comparison.json`.

    Args:
        folder: the run's.
        source: rows and label words.
        tokens: split -> arrays.
        columns: template field -> column, where their names differ.
        found: by model: "federated", "central", "local <site>".
    """
    names = sorted(found, key=lambda n: (n != "federated", n != "central", n))
    if names:
        folder.write_arrays("scores.npz", _scores(tokens, names, found))
    words, test = source.labels, tokens["test"]
    predictions = {n: found[n]["chosen_predicted"] for n in names if "chosen_predicted" in found[n]}
    if not predictions or words is None:
        return
    rows, labels = test.kept(), test.labels.numpy()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "label", *predictions])
    for i, row in enumerate(rows):
        writer.writerow([int(row), words[labels[row]], *(words[p[i]] for p in predictions.values())])
    folder.write_text("predictions.csv", out.getvalue())
    if "federated" in predictions:
        folder.write_json("comparison.json", _paired(predictions, labels[rows]))
    folder.write_text("figures/examples.md", _examples(source, columns, rows, labels, words, predictions))


def _scores(tokens: dict[str, Tokens], names: list[str], found: dict[str, ByRow]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {"names": np.array(names)}
    for split, kind in _KINDS.items():
        rows = tokens[split].kept()
        out[f"{split}_rows"], out[f"{split}_labels"] = rows, tokens[split].labels.numpy()[rows]
        out["tokens" if split == "validation" else "test_tokens"] = tokens[split].answers_of(rows)
        out[f"{kind}_nll"] = np.stack([found[n].get(f"{kind}_nll", np.full(len(rows), np.nan)) for n in names])
        none = np.full(len(rows), -1, dtype=np.int16)
        out[f"{kind}_predicted"] = np.stack([found[n].get(f"{kind}_predicted", none) for n in names])
    return out


def _paired(predictions: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """The chosen merged model against every other, on the same test rows.

    Model -> difference in accuracy, its standard error (of the mean of the paired differences, each -1, 0 or 1), and the
    rows that only one of the two gets right.
    """
    merged = predictions["federated"] == labels
    out = {}
    for name, predicted in predictions.items():
        if name == "federated":
            continue
        difference = merged.astype(float) - (predicted == labels)
        n = len(difference)
        out[name] = {
            "rows": n,
            "difference": float(difference.mean()),
            "standard_error": float(difference.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
            "only_federated": int((difference > 0).sum()),
            "only_other": int((difference < 0).sum()),
        }
    return out


def _examples(
    source: Source,
    columns: dict[str, str],
    rows: np.ndarray,
    labels: np.ndarray,
    words: list[str],
    predictions: dict[str, np.ndarray],
) -> str:
    """A dozen test inputs, classes in turn, with what each model predicts."""
    split = source.splits["test"]
    by_class = [[i for i, r in enumerate(rows) if labels[r] == c] for c in range(len(words))]
    turns = [group[k] for k in range(12) for group in by_class if k < len(group)][:12]
    text = [c for c in split.columns if c not in ("label", columns.get("label"))]
    shown = (
        columns.get("sentence") or columns.get("text") or next((c for c in ("sentence", "text") if c in text), text[0])
    )
    names = list(predictions)[:6]
    lines = ["| input | label | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for i in turns:
        cell = " ".join(str(split.columns[shown][rows[i]]).replace("|", "\\|").split())
        guesses = [words[predictions[n][i]] for n in names]
        truth = words[labels[rows[i]]]
        lines.append(f"| {cell} | {truth} | " + " | ".join(g if g == truth else f"**{g}**" for g in guesses) + " |")
    return "\n".join(
        [*lines, "", "Test rows, each model as chosen on the validation rows; wrong predictions in bold.", ""]
    )
