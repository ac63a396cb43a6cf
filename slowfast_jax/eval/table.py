# SPDX-License-Identifier: Apache-2.0
"""Results for people: a task's scores, the strict ones beside them, and the paper's."""

from collections.abc import Mapping, Sequence
from typing import Any

from slowfast_jax.eval.tasks import BENCHMARKS

# Percentages of the released 7B models that see 64 and 96 frames of a video.
MODELS = ("paper, 64 frames", "paper, 96 frames")
PUBLISHED = {
  "videomme": (60.2, 60.3),
  "videomme_w_subtitle": (63.0, 63.4),
  "mlvu": (67.3, 68.1),
  "mvbench": (68.9, 68.6),
  "egoschema": (59.2, 59.8),
  "longvideobench": (56.6, 58.0),
  "perceptiontest": (70.3, 70.2),
  "nextqa_mc": (83.5, 83.1),
  "activitynetqa": (54.8, 54.5),
  "tempcompass_multi_choice": (68.9, 67.7),
}
# Without a judge or a server, these have no score that compares with the paper's.
UNSCORED = ("egoschema", "activitynetqa")
# Where those came about otherwise than the score here.
NOTES = {
  "egoschema": "The paper's scores come from the benchmark's server; send it submission.json.",
  "activitynetqa": "The paper's scores are gpt-3.5-turbo-1106's judgement, no word matching.",
  "tempcompass_multi_choice": (
    "The paper's scores most likely are this part's, with gpt-3.5-turbo-1106 judging replies that "
    "name no letter."
  ),
}


def summarize(task: str, row: Mapping[str, Any]) -> str:
  """A row of results.json as a table."""
  text = [f"{task} (prompts: {row['prompt_set']})", *_align(score_rows(task, row))]
  return "\n".join([*text, *(f"  {note}" for note in notes(task, row))])


def score_rows(task: str, row: Mapping[str, Any]) -> list[list[str]]:
  """The cells of that table, what the columns are called first; rows may be shorter."""
  scale = BENCHMARKS[task].scale / 100 if task in BENCHMARKS else 1
  published = [_number(score * scale) for score in PUBLISHED.get(task, ())]
  strict = row.get("strict", {})
  flat = _flat(row)
  main = _compared(task, flat)
  rows = [["", "here", *(["strict"] if strict else []), *MODELS[: len(published)]]]
  for name, value in (({} if main in flat else {main: ""}) | flat).items():
    cells = [name, _number(value)]
    cells += [_number(strict.get(name, ""))] if strict else []
    rows.append(cells + (published if name == main else []))
  return rows


def notes(task: str, row: Mapping[str, Any]) -> list[str]:
  """What a reader has to know before comparing these scores with the paper's."""
  if task in NOTES:
    return [NOTES[task]]
  if task in PUBLISHED and row["prompt_set"] != "paper":
    return ["These are not the paper's prompts: its scores do not compare with these."]
  return []


def _compared(task: str, flat: Mapping[str, Any]) -> str:
  """The line that the paper's scores stand in: the tool's own score, or one without a number."""
  if judged := [name for name in flat if name.startswith("judge ") and "accuracy" in name]:
    return judged[0]
  return "score" if task in UNSCORED else next(iter(flat))


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
  """All numbers by name; those of a group as "group value"."""
  flat: dict[str, Any] = {}
  for name, value in row.items():
    if isinstance(value, Mapping) and name != "strict":
      flat |= {f"{name} {part}": number for part, number in value.items()}
    elif name not in ("strict", "prompt_set"):
      flat[name] = value
  return flat


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
  """The first column to the left, numbers to the right."""
  columns = range(max(map(len, rows)))
  cells = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
  widths = [max(len(row[i]) for row in cells) for i in columns]
  lines = (
    "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in columns[1:])])
    for row in cells
  )
  return [f"  {line}".rstrip() for line in lines]


def _number(value: Any) -> str:
  return f"{value:.3f}" if isinstance(value, float) else str(value)
