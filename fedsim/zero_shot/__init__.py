"""Zero-shot evaluation of a run's models by lm-evaluation-harness: HellaSwag, PIQA, WinoGrande and all its other tasks.

Prompts, scores and standard errors are the harness's (`lm-eval`, the extra `eval`). Here the models of a run are found and
put, one after another, on a base that is loaded once (`models.py`); local files replace the hub's data sets (`tasks.py`);
models are compared on the same examples, and differences that are not statistically significant are marked (`scores.py`).
"""

from fedsim.zero_shot.evaluate import evaluate_zero_shot
from fedsim.zero_shot.scores import Evaluation

__all__ = ["Evaluation", "evaluate_zero_shot"]
