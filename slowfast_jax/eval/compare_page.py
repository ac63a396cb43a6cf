# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison: how two runs differ, and every question whose answer flipped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slowfast_jax.eval.compare import Difference, read_pairs
from slowfast_jax.eval.pages import render, spread
from slowfast_jax.files import replace_text

# Of each direction the page shows at most so many questions, and counts the rest.
FLIPPED = 200


def write_comparison(
  first: Path, second: Path, differences: Mapping[str, Difference], file: Path
) -> None:
  """Writes the page of what `compare.compare_runs` found.

  Args:
    first, second: the folders of the runs.
    differences: by the name of the scoring.
    file: where to.

  Raises:
    UserError: as of `compare_runs`.
  """
  pairs = read_pairs(first, second)
  gained = [pair for pair in pairs if pair[1]["right"] and not pair[0]["right"]]
  lost = [pair for pair in pairs if pair[0]["right"] and not pair[1]["right"]]
  reworded = sum(a["right"] == b["right"] and a["reply"] != b["reply"] for a, b in pairs)
  page = render(
    "compare.html.j2",
    first=str(first),
    second=str(second),
    count=len(pairs),
    differences=differences,
    flips=[_flips("Right in B only", gained), _flips("Right in A only", lost)],
    reworded=reworded,
  )
  file.parent.mkdir(parents=True, exist_ok=True)
  replace_text(file, page)


def _flips(title: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
  return {"title": title, "count": len(pairs), "pairs": spread(pairs, FLIPPED)}
