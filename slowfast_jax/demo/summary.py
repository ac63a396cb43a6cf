# SPDX-License-Identifier: Apache-2.0
"""From the outcome of a demo's stages to the numbers and pictures of its report."""

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from slowfast_jax.checkpoints.store import Export
from slowfast_jax.demo.looks import Look, hit_rate
from slowfast_jax.demo.report import ChatExample, ClipResult, ModelResult, ReportData
from slowfast_jax.models.compressor import pooling_matrix

CLIPS = 6


def model_result(
  name: str,
  folder: Path,
  stills: Path,
  export: Export,
  results: Mapping[str, Any],
  kinds: Counter,
) -> ModelResult:
  """What the report says of one model."""
  return ModelResult(
    name=name,
    accuracy=results["accuracy"],
    accuracy_by_kind=dict(results["accuracy_by_kind"]),
    counts_by_kind=dict(kinds),
    loss_curve=loss_curve(folder),
    stills_curve=loss_curve(stills),
    num_params=sum(int(np.prod(x.shape)) for x in jax.tree.leaves(export.params)),
    llm_tokens=fast_tokens(export),
  )


def loss_curve(folder: Path) -> list[tuple[int, float]]:
  lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  return [(line["step"], _number(line["loss"])) for line in map(json.loads, lines)]


def _number(loss: float | None) -> float:
  """A step whose loss is not finite has null in the file, as JSON has no such numbers."""
  return math.nan if loss is None else float(loss)


def pooling_of(export: Export) -> Float[np.ndarray, "Q F"]:
  c = export.model.compressor
  return pooling_matrix(
    export.video.num_frames, c.sampling_stride, c.temporal_stride, c.min_fast_frames
  )


def fast_tokens(export: Export) -> int:
  """Visual tokens of a video in the decoder's sequence."""
  c = export.model.compressor
  side = export.model.vision.side // c.video_pooling_stride // c.spatial_stride
  return len(pooling_of(export)) * side**2


def clip_results(
  looks: Sequence[Look], fast_only: Mapping[str, Mapping[str, Any]], export: Export
) -> list[ClipResult]:
  """A few test clips: a right answer of each kind first, then whatever went wrong."""
  chosen: list[Look] = []
  for kind in dict.fromkeys(look.doc["kind"] for look in looks):
    chosen += [look for look in looks if look.right and look.doc["kind"] == kind][:1]
  chosen += [look for look in looks if not look.right][: CLIPS - len(chosen)]
  kept = np.flatnonzero(pooling_of(export).any(axis=0)).tolist()
  return [_clip(look, fast_only[look.doc["id"]], kept) for look in chosen]


def _clip(look: Look, other: Mapping[str, Any], kept: Sequence[int]) -> ClipResult:
  doc = look.doc
  return ClipResult(
    video=doc["video"],
    question=doc["question"],
    options=doc["options"],
    answer=doc["answer"],
    slow_fast_reply=look.reply,
    fast_only_reply=other["reply"],
    slow_fast_correct=look.right,
    fast_only_correct=other["answer"] == other["gold"],
    frames=look.frames.images,
    timestamps=look.frames.timestamps,
    profile=look.profile,
    windows=[(float(start), float(end)) for start, end in doc["windows"]],
    kept=kept,
  )


def report_data(
  results: Mapping[str, ModelResult],
  zeroed: float,
  chance: float,
  looks: Sequence[Look],
  clips: Sequence[ClipResult],
  chat: ChatExample,
  seconds: Mapping[str, float],
  num_train: int,
  commands: Sequence[tuple[str, str]],
) -> ReportData:
  slow_fast, fast_only = results["slow_fast"], results["fast_only"]
  return ReportData(
    title="slowfast_jax: from raw video to an answer",
    slow_fast=slow_fast,
    fast_only=fast_only,
    zeroed_slow_accuracy=zeroed,
    chance=chance,
    attention_hits=hit_rate(looks),
    clips=clips,
    chat=chat,
    seconds=dict(seconds),
    llm_tokens=slow_fast.llm_tokens,
    num_train_videos=num_train,
    num_questions=len(looks),
    commands=commands,
    machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
    f"JAX {jax.__version__} on {jax.default_backend()}",
  )
