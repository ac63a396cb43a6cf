# SPDX-License-Identifier: Apache-2.0
"""`make test-lmms-eval`: lmms-eval itself, offline, replies and scores as `slowfast eval` does.

Runs in an environment that has lmms-eval; tests/eval/test_lmms.py is the part that needs none.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# lmms-eval brings a package that installs its own `tests`.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

from slowfast_jax.checkpoints.store import save_export  # noqa: E402
from slowfast_jax.eval import get_task, lmms_docs  # noqa: E402
from slowfast_jax.eval.runner import join, prediction_line, summarize  # noqa: E402
from tests.eval.tasks.releases import write_release  # noqa: E402
from tests.generate.tiny import make_export  # noqa: E402

TASKS = ("mlvu", "mvbench", "nextqa_mc")
# A random model's replies name no letter: these are scored too, out of predictions.
REPLIES = ("B", "The answer is B", "D. A book", "", "A", "Because it rains")
YAMLS = Path(lmms_docs.__file__).parent / "lmms_tasks"


def main() -> int:
  with tempfile.TemporaryDirectory(prefix="slowfast-lmms-") as name:
    work = Path(name)
    for task in TASKS:
      write_release(work / "data" / task, task)
    save_export(work / "export", make_export())
    for task in TASKS:
      _evaluate(work, task)
    checkpoint = f"pretrained={work / 'export'},dtype=float32,decode_cross_attention=False"
    for kind in ((), ("--force_simple",)):
      found, samples = _lmms_eval(work, TASKS, checkpoint, kind)
      for task in TASKS:
        _check_replies(task, _replies(work, task), samples[task])
        _check_scores(task, json.loads((work / f"runs/{task}/results.json").read_text()), found)
      print("checkpoint", *kind, "replies and scores are equal:", len(TASKS), "tasks")
    file, results = work / "replies.jsonl", {}
    for task in TASKS:
      results |= _write_replies(work, task, file)
    found, _ = _lmms_eval(work, TASKS, f"predictions={file}", ())
    for task in TASKS:
      _check_scores(task, results, found)
      print("predictions: scores are equal:", task, *_scores(task, results))
  return 0


def _evaluate(work: Path, task: str) -> None:
  command = [
    *("eval", f"--config={ROOT}/configs/eval_paper.py:{task}", "--config.dtype=float32"),
    *(f"--config.questions={work / 'data' / task}", f"--checkpoint={work / 'export'}"),
    *("--config.batch_size=4", f"--workdir={work / 'runs' / task}"),
  ]
  _run([sys.executable, "-m", "slowfast_jax.cli.main", *command], work)


def _lmms_eval(
  work: Path, tasks: tuple[str, ...], model: str, kind: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
  """lmms-eval's results, and its samples by task."""
  output = Path(tempfile.mkdtemp(dir=work))
  command = [
    *(sys.executable, "-m", "lmms_eval", "--model", "slowfast_jax", "--model_args", model),
    *("--tasks", ",".join(f"slowfast_{task}" for task in tasks), "--include_path", str(YAMLS)),
    *("--batch_size", "4", "--log_samples", "--output_path", str(output), *kind),
  ]
  log = _run([*_offline(), *command], work)
  files = list(output.rglob("*results.json"))
  if not files:  # Whatever happens, lmms-eval ends with 0.
    raise SystemExit(log[-6000:])
  samples = {}
  for task in tasks:
    (lines,) = output.rglob(f"*samples_slowfast_{task}.jsonl")
    samples[task] = [json.loads(line) for line in lines.read_text().splitlines()]
  return json.loads(files[0].read_text())["results"], samples


def _offline() -> list[str]:
  """A namespace without a network, where the system lets a user have one."""
  words = ["unshare", "--map-root-user", "--net"]
  able = shutil.which("unshare") and subprocess.run([*words, "true"]).returncode == 0
  return words if able else []


def _run(command: list[str], work: Path) -> str:
  """Both outputs of a command that ends with 0."""
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": str(work / "huggingface"),
    lmms_docs.VARIABLE: str(work / "data"),
  }
  done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
  return done.stdout + done.stderr


def _write_replies(work: Path, name: str, file: Path) -> dict[str, Any]:
  """Adds predictions with given replies; returns their scores."""
  task = get_task(name)
  docs = task.docs(str(work / "data" / name))
  # The fixtures ask the same of a video more than once, and one question has one reply.
  videos = list(dict.fromkeys(task.video(doc) for doc in docs))
  chosen = [REPLIES[videos.index(task.video(doc)) % len(REPLIES)] for doc in docs]
  lines = [prediction_line(task, doc, reply) for doc, reply in zip(docs, chosen)]
  with file.open("a", encoding="utf-8") as out:
    out.writelines(json.dumps(line) + "\n" for line in lines)
  return {name: summarize(task, join(task, docs, {line["id"]: line for line in lines}))}


def _replies(work: Path, name: str) -> list[str]:
  """What `slowfast eval` got, in the order of the questions."""
  text = (work / "runs" / name / "predictions.jsonl").read_text()
  lines = {line["id"]: line["reply"] for line in map(json.loads, text.splitlines())}
  task = get_task(name)
  return [lines[task.doc_id(doc)].strip() for doc in task.docs(str(work / "data" / name))]


def _check_replies(task: str, ours: list[str], samples: list[dict[str, Any]]) -> None:
  theirs = [None] * len(ours)
  for sample in samples:
    reply = sample["filtered_resps"]
    theirs[sample["doc_id"]] = (reply[0] if isinstance(reply, list) else reply).strip()
  assert theirs == ours, (task, theirs, ours)


def _scores(task: str, results: dict[str, Any]) -> tuple[float, float]:
  metric = getattr(get_task(task), "metric")  # noqa: B009
  row = results[task]
  return row[metric], row.get("strict", row)[metric]


def _check_scores(task: str, results: dict[str, Any], found: dict[str, Any]) -> None:
  theirs = found[f"slowfast_{task}"]
  pair = (theirs["paper_score,none"], theirs["strict_score,none"])
  assert pair == _scores(task, results), (task, pair, results)


if __name__ == "__main__":
  sys.exit(main())
