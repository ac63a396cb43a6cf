# SPDX-License-Identifier: Apache-2.0
"""The page of an evaluation: scores, accuracy by group, and wrong answers with what was seen.

Made from the files of the run and the videos, so it can be made again at any time.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slowfast_jax.eval.pages import render, spread, strip
from slowfast_jax.eval.results import PREDICTIONS, REPORT, RESULTS, RUN, parse_lines
from slowfast_jax.eval.table import notes, score_rows
from slowfast_jax.eval.tasks.task import Doc, Task
from slowfast_jax.files import replace_text

# Of each of these the page shows at most so many, spread over the questions, and counts the rest.
WRONG, LISTED = 24, 60
_THREADS = 4

Line = Mapping[str, Any]


def write_report(task: Task, docs: Sequence[Doc], videos: Path, folder: Path) -> None:
  """Writes report.html into the folder of a finished evaluation.

  Args:
    task, docs: what was asked.
    videos: the folder that videos' paths start from. Those that cannot be read are told as such.
    folder: has the run's predictions, results and description.
  """
  run = json.loads((folder / RUN).read_text(encoding="utf-8"))
  row = json.loads((folder / RESULTS).read_text(encoding="utf-8"))[task.name]
  content = (folder / PREDICTIONS).read_bytes()
  lines = {line["id"]: line for line in parse_lines(content, folder / PREDICTIONS)}
  asked = [(doc, lines[task.doc_id(doc)]) for doc in docs]
  scored = any(line["gold"] for _, line in asked)
  failed = [line for _, line in asked if line["error"]]
  unparsed = [
    line for doc, line in asked if not line["error"] and not task.is_parsed(doc, line["answer"])
  ]
  wrong = [pair for pair in asked if scored and not pair[1]["right"] and not pair[1]["error"]]
  page = render(
    "report.html.j2",
    task=task.name,
    run=run,
    row=row,
    scores=score_rows(task.name, _without_groups(row)),
    notes=notes(task.name, row),
    groups=_groups(task, asked) if scored else [],
    strict=any(line["right"] != line["strict_right"] for _, line in asked),
    wrong=_cards(task, spread(wrong, WRONG), videos, run["frames"]),
    wrong_count=len(wrong),
    unparsed=spread(unparsed, LISTED),
    unparsed_count=len(unparsed),
    failed=spread(failed, LISTED),
    failed_count=len(failed),
  )
  replace_text(folder / REPORT, page)


def _without_groups(row: Line) -> Line:
  """Those are drawn."""
  return {k: v for k, v in row.items() if k in ("strict", "judge") or not isinstance(v, Mapping)}


def _groups(task: Task, asked: Sequence[tuple[Doc, Line]]) -> list[dict[str, Any]]:
  """Shares of right answers by each field that the questions are grouped by."""
  found = []
  for field in task.groups:
    parts: dict[str, list[Line]] = {}
    for doc, line in asked:
      if field in doc:
        parts.setdefault(str(doc[field]), []).append(line)
    if parts:
      found.append({"field": field.replace("_", " "), "parts": _shares(parts)})
  return found


def _shares(parts: Mapping[str, Sequence[Line]]) -> list[dict[str, Any]]:
  return [
    {
      "name": name,
      "count": len(lines),
      "right": sum(line["right"] for line in lines) / len(lines),
      "strict": sum(line["strict_right"] for line in lines) / len(lines),
    }
    for name, lines in parts.items()
  ]


def _cards(
  task: Task, wrong: Sequence[tuple[Doc, Line]], videos: Path, frames: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Wrong answers with the frames; a video of several questions is read once."""
  names = list(dict.fromkeys(line["video"] for _, line in wrong))
  with ThreadPoolExecutor(_THREADS) as pool:
    strips = dict(zip(names, pool.map(lambda name: strip(videos / name, frames), names)))
  return [
    {
      **line,
      "groups": [str(doc[field]) for field in task.groups if field in doc],
      "strip": strips[line["video"]],
    }
    for doc, line in wrong
  ]
