"""Zero-shot scores of a run's models by lm-evaluation-harness: HellaSwag, PIQA, WinoGrande and any other task it knows.

Prompts, scoring and standard errors are the harness's (`lm-eval`, the extra `eval`). What is done here: finding the
models of a run and putting them, one after another, on a base that is loaded once (`models.py`); handing the harness
local files in place of the hub's data sets (`tasks.py`); comparing models on the same items, so that differences inside
the noise are marked (`scores.py`).
"""

from fedsim.zero_shot.evaluate import evaluate_zero_shot
from fedsim.zero_shot.scores import Evaluation

__all__ = ["Evaluation", "evaluate_zero_shot"]
