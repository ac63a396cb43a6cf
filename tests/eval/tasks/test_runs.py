# SPDX-License-Identifier: Apache-2.0
"""Every benchmark goes from its public release through `slowfast eval`, with a tiny model."""

import json

import pytest

from slowfast_jax.checkpoints.store import save_export
from slowfast_jax.cli.main import main
from slowfast_jax.eval import get_task
from slowfast_jax.eval.tasks import BENCHMARKS
from slowfast_jax.generate.engine import Engine
from tests.eval.tasks.releases import write_release
from tests.generate.tiny import make_export

pytestmark = pytest.mark.usefixtures("one_device")

# A random model says nothing that parses: what it says chooses one of these.
REPLIES = {
  "tempcompass_yes_no": ("Yes.", "no", "perhaps"),
  "tempcompass_captioning": ("It is eating.", "It runs.", "nothing"),
  "activitynetqa": ("Yes.", "Yes, he does", "no"),
}
LETTERS = ("B", "A", "The answer is B", "")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
  """A checkpoint, and one engine for all runs, whose programs are compiled once."""
  folder = tmp_path_factory.mktemp("export") / "export"
  save_export(folder, make_export())
  engines = []

  class Shared(Engine):
    def __new__(cls, *args, **options):
      return engines[0] if engines else super().__new__(cls)

    def __init__(self, *args, **options):
      if not engines:
        super().__init__(*args, **options)
        engines.append(self)

    def answer(self, questions, sessions, max_new_tokens, *, decode_cross_attention):
      assert not decode_cross_attention
      replies = super().answer(questions, sessions, max_new_tokens)
      return [f" {self.says[sum(map(ord, r)) % len(self.says)]}\n" for r in replies]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("slowfast_jax.eval.runner.Engine", Shared)
    yield folder, Shared


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_release_is_evaluated(name, export, tmp_path, capsys):
  checkpoint, engine = export
  engine.says = REPLIES.get(name, LETTERS)
  root, run = write_release(tmp_path / "copy", name), tmp_path / "run"
  command = [
    *("eval", f"--config=configs/eval_paper.py:{name}", f"--config.questions={root}"),
    *(f"--checkpoint={checkpoint}", f"--workdir={run}", "--config.max_new_tokens=4"),
    *("--config.batch_size=4", "--config.dtype=float32", "--config.read_threads=2"),
  ]
  assert main(command) == 0
  shown = capsys.readouterr().out
  assert f"{name} (prompts: paper)\n" in shown

  task, lines = get_task(name), read_lines(run)
  docs = {task.doc_id(doc): doc for doc in task.docs(str(root))}
  assert {line["id"] for line in lines} == set(docs)
  assert len(lines) == len(docs)
  for line in lines:
    doc = docs[line["id"]]
    assert line["error"] == ""
    assert line["reply"].strip() in engine.says
    assert line["answer"] == task.parse(doc, line["reply"])
    assert line["right"] == task.is_right(doc, line["answer"])
    assert line["gold"] == task.gold(doc)

  row = json.loads((run / "results.json").read_text())[name]
  assert (row["n"], row["errors"], row["prompt_set"]) == (len(docs), 0, "paper")
  assert row["unparsed"] == sum(not task.is_parsed(docs[x["id"]], x["answer"]) for x in lines)
  if name == "egoschema":
    assert set(json.loads((run / "submission.json").read_text())) == {"a", "b"}
  elif name != "mvbench":  # There, empty replies do not count.
    right = sum(line["right"] for line in lines) / len(lines)
    assert row[task.metric] == pytest.approx(task.scale * right, abs=1e-5)
    assert (run / "submission.json").exists() == (name == "egoschema_subset")
  if "strict" in row:
    strict = sum(line["strict_right"] for line in lines) / len(lines)
    micro = row["strict"].get("micro_average", row["strict"][task.metric])
    assert micro == pytest.approx(task.scale * strict)

  # Nothing is asked again.
  engine.says = ()
  assert main(command) == 0


def read_lines(run):
  return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
