# SPDX-License-Identifier: Apache-2.0
"""MVBench: twenty tasks of 200 questions each, on clips of nine older data sets."""

from collections.abc import Sequence
from pathlib import Path

from slowfast_jax.errors import UserError
from slowfast_jax.eval.tasks import extract
from slowfast_jax.eval.tasks.benchmark import HEAD, TAIL, MultipleChoice, grouped, lettered
from slowfast_jax.eval.tasks.prompts import LETTERS
from slowfast_jax.eval.tasks.release import read_release, unique_ids
from slowfast_jax.eval.tasks.task import Doc, Prediction

_CLEVRER, _PERCEPTION = "clevrer/video_validation", "perception/videos"
# Where the videos of each task lie, whole.
FOLDERS = {
  "action_sequence": "star/Charades_v1_480",
  "moving_count": _CLEVRER,
  "action_prediction": "star/Charades_v1_480",
  "episodic_reasoning": "tvqa/frames_fps3_hq",
  "action_antonym": "ssv2_video",
  "action_count": _PERCEPTION,
  "scene_transition": "scene_qa/video",
  "object_shuffle": _PERCEPTION,
  "object_existence": _CLEVRER,
  "fine_grained_pose": "nturgbd",
  "unexpected_action": "FunQA_test/test",
  "moving_direction": _CLEVRER,
  "state_change": _PERCEPTION,
  "object_interaction": "star/Charades_v1_480",
  "character_order": _PERCEPTION,
  "action_localization": "sta/sta_video",
  "counterfactual_inference": _CLEVRER,
  "fine_grained_action": "Moments_in_Time_Raw/videos",
  "moving_attribute": _CLEVRER,
  "egocentric_navigation": "vlnqa",
}
# Today's tool has the asked part of a video cut out beforehand.
_CUT = {
  "star/Charades_v1_480": "star/Charades_segment",
  "tvqa/frames_fps3_hq": "tvqa/video_fps3_hq_segment",
  "ssv2_video": "ssv2_video_mp4",
  "nturgbd": "nturgbd_convert",
  "sta/sta_video": "sta/sta_video_segment",
}
# Its archive holds two of the data sets once more, the only copy where others are missing.
_ARCHIVE = "data0613"


class MVBench(MultipleChoice):
  """MVBench."""

  name = "mvbench"
  subset = "mvbench"
  split = "train"
  fields = ("video", "question", "candidates", "answer")
  id_fields = ("sub_task", "video")
  metric = "mvbench_accuracy"
  groups = ("sub_task",)

  def docs(self, questions: str, videos: str = "") -> list[Doc]:
    """Reads all twenty files; what the tasks are called stands in `sub_task`."""
    if Path(questions).is_file():
      raise UserError(f"{questions}: MVBench is twenty files; name the folder that has them.")
    root = Path(videos or questions)
    docs: list[Doc] = []
    for task in FOLDERS:
      folder = self._folder(task)
      if not (root / folder).is_dir() and (root / _ARCHIVE / folder).is_dir():
        folder = f"{_ARCHIVE}/{folder}"
      rows = read_release(questions, task, self.split, self.fields)
      docs += [{**row, "sub_task": task, "folder": folder} for row in rows]
    return [
      {**doc, "doc_id": doc_id} for doc, doc_id in zip(docs, unique_ids(docs, self.id_fields))
    ]

  def video(self, doc: Doc) -> str:
    return f"{doc.get('folder') or self._folder(doc['sub_task'])}/{doc['video']}"

  def prompt(self, doc: Doc) -> str:
    question, options = doc["question"], doc["candidates"]
    if self.upstream:
      options = lettered(options, "({}) {}")
      return f"Question:{question}\nOption:\n{options}\nOnly give the best option.\n"
    ask = "Respond with only the letter (A, B, C, or D) of the correct option."
    return f"{HEAD} {ask}\n{question}\n{lettered(options)}\n{TAIL}"

  def options(self, doc: Doc) -> list[str]:
    return doc["candidates"]

  def read(self, doc: Doc, reply: str) -> str:
    return extract.lone_letter(reply)

  def gold(self, doc: Doc) -> str:
    return LETTERS[doc["candidates"].index(doc["answer"])]

  def score(self, predictions: Sequence[Prediction]) -> float:
    """The mean of the tasks by their sizes; in a task, an empty reply does not count at all."""
    total = 0.0
    for part in grouped(predictions, "sub_task").values():
      counted = [p for p in part if p.error or p.reply.strip()]
      total += len(part) * super().score(counted) if counted else 0.0
    return total / len(predictions)

  def _folder(self, task: str) -> str:
    folder = FOLDERS[task]
    return _CUT.get(folder, folder) if self.upstream else folder
