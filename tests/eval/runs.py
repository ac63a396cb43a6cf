# SPDX-License-Identifier: Apache-2.0
"""Finished evaluations without a model: the replies are given."""

import json

from slowfast_jax.eval.runner import join, prediction_line, summarize

FRAMES = {"num_frames": 6, "sampler": "uniform", "target_fps": 2.0, "policy": "siglip"}
RUN = {"max_new_tokens": 16, "zero_slow": False, "decode_cross_attention": False}
RUN |= {"dtype": "float32", "frames": FRAMES, "prompt_set": "paper"}


def write_run(folder, task, docs, replies):
  """A finished run whose replies are given; an exception is an error of its question."""
  folder.mkdir(parents=True)
  failed = [isinstance(reply, Exception) for reply in replies]
  lines = [
    prediction_line(task, doc, "" if bad else reply, str(reply) if bad else "")
    for doc, reply, bad in zip(docs, replies, failed)
  ]
  row = summarize(task, join(task, docs, {x["id"]: x for x in lines}))
  (folder / "run.json").write_text(json.dumps({"task": task.name, **RUN}))
  (folder / "results.json").write_text(json.dumps({task.name: row}))
  (folder / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  return folder
