# SPDX-License-Identifier: Apache-2.0
"""VideoMME: 2,700 questions on 900 videos of seconds to an hour, without and with subtitles."""

from pathlib import Path

from slowfast_jax.eval.tasks import extract
from slowfast_jax.eval.tasks.benchmark import HEAD, TAIL, MultipleChoice
from slowfast_jax.eval.tasks.choices import unlettered
from slowfast_jax.eval.tasks.subtitles import subtitle_text
from slowfast_jax.eval.tasks.task import Doc

# The tool's words for both tasks, also where there are no subtitles.
_UPSTREAM_HEAD = (
  "Select the best answer to the following multiple-choice question based on the video and the "
  "subtitles. Respond with only the letter (A, B, C, or D) of the correct option."
)


class VideoMME(MultipleChoice):
  """VideoMME without subtitles."""

  name = "videomme"
  subset = "videomme"
  fields = (
    *("videoID", "question_id", "duration", "domain", "sub_category", "task_type"),
    *("question", "options", "answer"),
  )
  id_fields = ("question_id",)
  groups = ("duration", "domain", "sub_category", "task_type")

  def __init__(self, prompt_set: str = "paper"):
    super().__init__(prompt_set)
    # The released tool's name has a letter less.
    self.metric = "videomme_perception_score" if self.upstream else "videomme_percetion_score"

  def video(self, doc: Doc) -> str:
    return f"data/{doc['videoID']}.mp4"

  def prompt(self, doc: Doc) -> str:
    if self.upstream:
      return f"{_UPSTREAM_HEAD}\n{_question(doc)}\n\n{TAIL}"
    return f"{HEAD}\n{_question(doc)}\n{TAIL}"

  def options(self, doc: Doc) -> list[str]:
    return [unlettered(option) for option in doc["options"]]

  def read(self, doc: Doc, reply: str) -> str:
    return extract.ranked_letter(reply, "ABCD") if self.upstream else extract.first_capital(reply)

  def gold(self, doc: Doc) -> str:
    return doc["answer"]


class VideoMMESubtitles(VideoMME):
  """VideoMME with the subtitles of 32 moments in the prompt."""

  name = "videomme_w_subtitle"

  def docs(self, questions: str, videos: str = "") -> list[Doc]:
    """Reads the release; subtitles are chosen by frame numbers, so videos are opened too."""
    root = Path(videos or questions)
    texts: dict[str, str | None] = {}
    docs = super().docs(questions, videos)
    for doc in docs:
      video = doc["videoID"]
      if video not in texts:
        texts[video] = subtitle_text(root / f"subtitle/{video}.srt", root / self.video(doc))
    return [{**doc, "subtitles": texts[doc["videoID"]]} for doc in docs]

  def prompt(self, doc: Doc) -> str:
    text = doc.get("subtitles")
    text = "No subtitles available" if text is None else text
    head, tail = (
      (_UPSTREAM_HEAD, "The best answer is:")
      if self.upstream
      else (f"{HEAD[:-1]} and the subtitles.", TAIL)
    )
    return f"This video's subtitles are listed below: \n{text}\n{head}\n{_question(doc)}\n{tail}"


def _question(doc: Doc) -> str:
  return "\n".join([doc["question"], *doc["options"]])
