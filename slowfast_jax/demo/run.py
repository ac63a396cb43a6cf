# SPDX-License-Identifier: Apache-2.0
"""The main job, small: video files, records, training, evaluation, a chat and a report.

Every stage writes into its own folder and is skipped when it is done, so a demo that was stopped
goes on with the same command.
"""

import contextlib
import dataclasses
import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from slowfast_jax.checkpoints.store import load_export, save_export
from slowfast_jax.config import load_config
from slowfast_jax.data.chat import SYSTEM_PROMPT
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.records import RecordSource
from slowfast_jax.data.tokenizer import Tokenizer, train_tokenizer
from slowfast_jax.demo.align import align
from slowfast_jax.demo.looks import Look, look_again, read_predictions
from slowfast_jax.demo.questions import Dialogues, QuestionSet, make_question_set
from slowfast_jax.demo.report import ChatExample, ReportData, write_report
from slowfast_jax.demo.scenes import COLOURS, PLACES, SHAPES
from slowfast_jax.demo.stills import write_stills
from slowfast_jax.demo.summary import clip_results, model_result, report_data
from slowfast_jax.errors import UserError
from slowfast_jax.eval.runner import evaluate
from slowfast_jax.eval.tasks import get_task
from slowfast_jax.files import replace_json
from slowfast_jax.generate.engine import Engine
from slowfast_jax.models.presets import PRESETS
from slowfast_jax.train.loop import train

# watch(title, unit) is a context whose value is called as progress(done, total, errors, text).
Watch = Callable[[str, str], contextlib.AbstractContextManager[Callable[..., Any]]]

MODELS = ("slow_fast", "fast_only")
STAGES = ("slow_fast_stills", "slow_fast", "fast_only_stills", "fast_only")


@dataclasses.dataclass(frozen=True)
class Size:
  """How much of everything a demo takes.

  Attributes:
    num_train, num_test: clips.
    num_stills: pictures that encoder and models start from.
    align_steps: of the encoder.
    stills_steps, steps: of each model, on stills and on videos.
  """

  num_train: int
  num_test: int
  num_stills: int
  align_steps: int
  stills_steps: int
  steps: int


FULL = Size(
  num_train=900, num_test=84, num_stills=4000, align_steps=300, stills_steps=900, steps=450
)
FAST = Size(num_train=48, num_test=8, num_stills=200, align_steps=60, stills_steps=20, steps=12)


class Demo:
  """The stages of a demo, in order; each is a method.

  Args:
    workdir: everything is written here.
    size: FULL, or FAST for the same path with hardly any training.
    seed: of the videos, the questions and the models.
    watch: shows progress.
  """

  def __init__(self, workdir: Path, size: Size, seed: int, watch: Watch):
    self.root, self.size, self.seed, self.watch = workdir, size, seed, watch
    self.root.mkdir(parents=True, exist_ok=True)
    self._clock = _Clock(self.root / "seconds.json")
    self._check_same()

  @property
  def seconds(self) -> dict[str, float]:
    """What each stage took, also in earlier runs of an interrupted demo."""
    return dict(self._clock.seconds)

  @property
  def questions(self) -> QuestionSet:
    return QuestionSet(self.root / "videos", self.root / "train.json", self.root / "test.jsonl")

  def make_data(self) -> None:
    """Writes the question set and the stills, and a tokenizer of their words."""
    if (self.root / "tokenizer").is_dir():
      return
    size = self.size
    with self._clock.stage("make videos"):
      with self.watch("Making videos", "videos") as progress:
        make_question_set(
          self.root, size.num_train, size.num_test, self.seed, progress=progress,
          dialogues=Dialogues(turns=3),
        )  # fmt: skip
      stills = write_stills(self.root / "stills", size.num_stills, self.seed, Dialogues(turns=1))
      texts = [turn["value"] for path in (self.questions.train, stills) for turn in _turns(path)]
      # As often as there are turns, so that the template's own words become single tokens too.
      texts += [f"system\n{SYSTEM_PROMPT}", "user\n", "assistant\n"] * len(texts)
      train_tokenizer(texts, PRESETS["demo"].decoder.vocab_size).save(self.root / "tokenizer")

  def prepare(self) -> None:
    """Turns videos and stills into records, as `slowfast prepare` does."""
    side = PRESETS["demo"].vision.image_size
    stills = self.root / "stills"
    sources = {
      "records": (self.questions.videos, self.questions.train),
      "stills/records": (stills / "pictures", stills / "stills.json"),
    }
    with self._clock.stage("prepare records"):
      for output, (media, annotations) in sources.items():
        config = PrepareConfig(num_frames=32, size=side)
        with self.watch(f"Preparing {output}", "files") as progress:
          prepare(media, annotations, self.root / output, config, progress)

  def align(self) -> None:
    """Teaches the vision encoder words."""
    if (self.root / "encoder").is_dir():
      return
    tokenizer = Tokenizer.from_dir(self.root / "tokenizer")
    source = RecordSource(self.root / "stills/records")
    words = COLOURS + SHAPES + PLACES
    with self._clock.stage("align encoder"), self.watch("Aligning encoder", "steps") as progress:
      export = align(
        self.config("slow_fast_stills"),
        source,
        tokenizer,
        words,
        self.size.align_steps,
        _with_text(progress),
      )
      save_export(self.root / "encoder", export)

  def train(self, stage: str) -> None:
    """Trains one of STAGES, from the stage before it."""
    if (self.root / stage / "export").is_dir():
      return
    clock = self._clock.stage(f"train {stage}")
    with clock, self.watch(f"Training {stage}", "steps") as progress:
      code = train(self.config(stage), str(self.root / stage), _with_text(progress))
    if code:
      raise UserError("The demo was asked to stop and has saved; the same command goes on.")

  def evaluate(self, model: str, zero_slow: bool = False) -> dict[str, Any]:
    """Asks a model all test questions; what `slowfast eval` writes."""
    folder = self.root / model / ("eval_zero_slow" if zero_slow else "eval")
    overrides = [
      f"--config.questions={self.questions.test}",
      f"--config.videos={self.questions.videos}",
      f"--config.zero_slow={zero_slow}",
    ]
    config = load_config("configs/eval_demo.py", overrides)
    with self._clock.stage("evaluate"), self.watch(f"Asking {model}", "questions") as progress:
      return evaluate(config, self.root / model / "export", folder, progress)["jsonl"]

  def report(self) -> ReportData:
    """Evaluates both models, looks where the answers came from, and writes the report."""
    evals = {model: self.evaluate(model) for model in MODELS}
    zeroed = self.evaluate("slow_fast", zero_slow=True)
    exports = {model: load_export(self.root / model / "export") for model in MODELS}
    task = get_task("jsonl", "text")
    docs = task.docs(str(self.questions.test))
    kinds = Counter(doc["kind"] for doc in docs)
    results = {
      model: model_result(
        model.replace("_", "-"), self.root / model, self.root / f"{model}_stills",
        exports[model], evals[model], kinds,
      )
      for model in MODELS
    }  # fmt: skip
    engine = Engine(exports["slow_fast"])
    answers = {model: read_predictions(self.root / model / "eval") for model in MODELS}
    with self._clock.stage("watch attention"), self.watch("Watching", "questions") as progress:
      looks = list(
        look_again(engine, task, docs, answers["slow_fast"], self.questions.videos, progress)
      )
    data = report_data(
      results,
      zeroed["accuracy"],
      evals["slow_fast"]["chance"],
      looks,
      clip_results(looks, answers["fast_only"], exports["slow_fast"]),
      self._chat(engine, looks),
      self.seconds,
      self.size.num_train,
      self._commands(),
    )
    write_report(data, self.root)
    return data

  def _chat(self, engine: Engine, looks: Sequence[Look]) -> ChatExample:
    """One question, asked as `slowfast chat` does."""
    look = next((look for look in looks if look.right), looks[0])
    question = look.doc["question"]  # Without options, as one would ask.
    session = engine.encode(look.frames.images)
    answer = "".join(engine.stream(question, session, max_new_tokens=8))
    video = self.questions.videos / look.doc["video"]
    command = self._chat_command(str(video), question)
    return ChatExample(look.doc["video"], question, answer, look.frames.images, command)

  def _chat_command(self, video: str, question: str) -> str:
    checkpoint = self.root / "slow_fast" / "export"
    return f"slowfast chat {video} {shlex.quote(question)} --checkpoint={checkpoint}"

  def _commands(self) -> list[tuple[str, str]]:
    export = self.root / "slow_fast" / "export"
    return [
      ("Ask about a file of your own", f"slowfast chat VIDEO.mp4 --checkpoint={export}"),
      ("Look at the training records", f"slowfast inspect {self.root / 'records'}"),
    ]

  def config(self, stage: str) -> ml_collections.ConfigDict:
    """configs/demo.py for a stage, with this demo's folders, steps and seed."""
    stills = stage.endswith("_stills")
    start = "encoder" if stills else f"{stage}_stills/export"
    records = "stills/records" if stills else "records"
    steps = self.size.stills_steps if stills else self.size.steps
    return load_config(
      f"configs/demo.py:{stage}",
      [
        f"--config.seed={self.seed}",
        f"--config.data.records={self.root / records}",
        f"--config.data.tokenizer={self.root / 'tokenizer'}",
        f"--config.train.steps={steps}",
        f"--config.train.init_from={self.root / start}",
      ],
    )

  def _check_same(self) -> None:
    """A folder holds one demo: another size or seed needs another folder."""
    path = self.root / "demo.json"
    now = {**dataclasses.asdict(self.size), "seed": self.seed}
    if not path.exists():
      replace_json(path, now)
    elif (before := json.loads(path.read_text())) != now:
      changed = [f"{k}: {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
      raise UserError(
        f"{self.root} holds another demo ({', '.join(changed)}); give another --workdir."
      )


def _with_text(progress: Callable[..., Any]) -> Callable[[int, int, str], Any]:
  return lambda done, total, text: progress(done, total, text=text)


class _Clock:
  """Seconds of each stage, kept in a file so that a resumed demo knows them all."""

  def __init__(self, path: Path):
    self._path = path
    self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    began = time.monotonic()
    try:
      yield
    finally:
      self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
      replace_json(self._path, self.seconds)


def _turns(annotations: Path) -> Iterator[dict[str, str]]:
  for entry in json.loads(annotations.read_text(encoding="utf-8")):
    yield from entry["conversations"]
