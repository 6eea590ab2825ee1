"""The loop of post 1 in two scripts and the declared experiment, side by side: the same curve.

    FEDSIM_DATA=... python experiments/client_api/compare.py [--config smollm2.yaml]

Runs the declared experiment, then `client_hf.py` and `client_lightning.py` from its initial adapter, and compares the scores of the global
model after each round and its parameters at the end. Exits with 1 where they differ by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import fedsim

HERE = Path(__file__).resolve().parent
SCRIPTS = {  # script -> prefix of its names, and what it calls loss and accuracy
    "client_hf.py": ("", {"eval_answer_loss": "loss", "eval_accuracy": "accuracy"}),
    "client_lightning.py": ("model.", {"answer_loss": "loss", "accuracy": "accuracy"}),
}


def scores(run: Path, names: dict[str, str]) -> dict[tuple[int, str], float]:
    """(round, score) -> value of the global model on the validation examples."""
    lines = (run / "metrics" / "federated.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["client"] is None and row["name"] in names]
    return {(row["round"], names[row["name"]]): row["value"] for row in rows if row["split"] == "validation"}


def script_run(script: str, config: Path, init: Path, exp: Any, results: Path) -> Path:
    """Run a script with three sites; the folder of the run."""
    own = {"args": f"--experiment '{config}'", "init": str(init), "exchange": "torch"}
    name, mean = f"{exp.name}_{Path(script).stem}", {"name": "fedavg", "weights": "uniform"}
    more = {"name": name, "seed": exp.seed, "results": str(results), "algorithm": mean}
    return fedsim.run_script(HERE / script, clients=3, rounds=exp.rounds, **own, **more).path


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare scripts with the declared experiment.")
    parser.add_argument("--config", default="tiny.yaml", help="tiny.yaml or smollm2.yaml")
    parser.add_argument("--results", default="results", type=Path)
    parser.add_argument("--tolerance", default=1e-6, type=float)
    given = parser.parse_args()
    config = HERE / given.config
    exp = fedsim.Experiment.load(config, [f"results={given.results}"])
    declared = fedsim.run(exp).path
    first, last = (load_file(declared / part / "adapter_model.safetensors") for part in ("init", "global"))
    curves = {"declared": scores(declared, {"loss": "loss", "accuracy": "accuracy"})}
    apart = {}
    with tempfile.TemporaryDirectory() as folder:
        for script, (prefix, names) in SCRIPTS.items():
            init = Path(folder) / f"{script}.safetensors"
            save_file({prefix + name: tensor for name, tensor in first.items()}, init)
            run = script_run(script, config, init, exp, given.results.resolve())
            end = load_file(run / "global" / "model.safetensors")
            curves[script] = scores(run, names)
            apart[script] = max((end[prefix + name] - tensor).abs().max().item() for name, tensor in last.items())
    common = sorted(set.intersection(*map(set, curves.values())))
    print("\nround  score     " + "  ".join(f"{name:>19}" for name in curves))
    for round, score in common:
        print(f"{round:>5}  {score:<8}  " + "  ".join(f"{curve[round, score]:19.9f}" for curve in curves.values()))
    worst = max(abs(curve[key] - curves["declared"][key]) for curve in curves.values() for key in common)
    print(f"\nlargest difference of a score: {worst:.1e}; of a parameter at the end: {max(apart.values()):.1e}")
    return int(not common or max(worst, *apart.values()) > given.tolerance)


if __name__ == "__main__":
    sys.exit(main())
