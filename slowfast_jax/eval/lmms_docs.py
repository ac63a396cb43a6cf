# SPDX-License-Identifier: Apache-2.0
"""Our tasks inside lmms-eval: the YAML files of lmms_tasks/ name the functions of this module.

Questions, prompts, the reading of replies and scores are those of `slowfast eval` with the prompt
set "paper". The environment variable SLOWFAST_EVAL_DATA names a folder that has a folder for each
benchmark: its release, as `slowfast eval` reads it.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slowfast_jax.errors import UserError
from slowfast_jax.eval.tasks import BENCHMARKS, Benchmark, Prediction
from slowfast_jax.eval.tasks.media import find_video

VARIABLE = "SLOWFAST_EVAL_DATA"
# EgoSchema's full set is scored by a server, so lmms-eval has nothing to show for it.
NAMES = tuple(name for name in BENCHMARKS if name != "egoschema")
_FOLDERS = {
  "videomme_w_subtitle": "videomme",
  "egoschema_subset": "egoschema",
  **{name: "tempcompass" for name in NAMES if name.startswith("tempcompass")},
}


def __getattr__(name: str) -> Callable[[Any], Any]:
  """`!function slowfast_jax.eval.lmms_docs.mlvu` reads the questions of MLVU."""
  if name not in NAMES:
    raise AttributeError(name)
  return functools.partial(read_docs, name)


def read_docs(name: str, placeholder: Any) -> Any:
  """The benchmark's questions as a data set; lmms-eval wants to have loaded one, so it may.

  Raises:
    UserError: the variable is not set, or the release is not there.
  """
  import datasets  # Comes with lmms-eval.

  if not os.environ.get(VARIABLE):
    raise UserError(f"Set {VARIABLE} to the folder that has the benchmarks' folders.")
  root = Path(os.environ[VARIABLE]) / _FOLDERS.get(name, name)
  task = BENCHMARKS[name]("paper")
  rows = [
    {
      "task": name,
      "id": task.doc_id(doc),
      "prompt": task.prompt(doc),
      "video": str(find_video(root / task.video(doc))),
      "gold": task.gold(doc),
      "doc": json.dumps(doc, default=str),
    }
    for doc in task.docs(str(root))
  ]
  return datasets.Dataset.from_list(rows)


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
  return [doc["video"]]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
  return doc["prompt"]


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, dict[str, str]]:
  """What both scores are computed from."""
  item = {"task": doc["task"], "doc": doc["doc"], "reply": results[0]}
  return {"paper_score": item, "strict_score": item}


def paper_score(items: Sequence[dict[str, str]]) -> float:
  """As the released evaluation computes it, in its unit."""
  task = _benchmark(items)
  return task.aggregate(_predictions(items))[task.metric]


def strict_score(items: Sequence[dict[str, str]]) -> float:
  """Without guesses; where replies can be read in one way only, the same."""
  task = _benchmark(items)
  metrics = task.aggregate(_predictions(items))
  return metrics.get("strict", metrics)[task.metric]


def _benchmark(items: Sequence[dict[str, str]]) -> Benchmark:
  return BENCHMARKS[items[0]["task"]]("paper")


def _predictions(items: Sequence[dict[str, str]]) -> list[Prediction]:
  task = _benchmark(items)
  docs = [json.loads(item["doc"]) for item in items]
  return [
    Prediction(doc, item["reply"], task.parse(doc, item["reply"])) for doc, item in zip(docs, items)
  ]
