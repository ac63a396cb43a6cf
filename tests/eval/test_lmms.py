# SPDX-License-Identifier: Apache-2.0
"""The plug-in against stand-ins of what lmms-eval documents; lmms_proof.py runs the real one."""

import functools
import importlib
import importlib.metadata
import json
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from slowfast_jax.checkpoints.store import save_export
from slowfast_jax.config import load_config
from slowfast_jax.errors import UserError
from slowfast_jax.eval import get_task, lmms, lmms_docs
from slowfast_jax.eval.runner import evaluate, join, prediction_line, summarize
from slowfast_jax.eval.tasks import BENCHMARKS
from slowfast_jax.generate.engine import Engine
from tests.data.video_files import VideoSpec, write_video
from tests.eval.tasks.releases import VIDEOS, write_release
from tests.generate.tiny import make_export

ROOT = Path(__file__).parents[2]
YAMLS = Path(lmms_docs.__file__).parent / "lmms_tasks"


def part(content):
  return types.SimpleNamespace(**{"text": None, "url": None, **content})


class ChatMessages:
  """As lmms-eval's: messages of typed contents, whose media it lists."""

  def __init__(self, messages):
    self.messages = [
      types.SimpleNamespace(role=m["role"], content=[part(c) for c in m["content"]])
      for m in messages
    ]

  def extract_media(self):
    parts = [p for message in self.messages for p in message.content]
    return tuple([p.url for p in parts if p.type == kind] for kind in ("image", "video", "audio"))


class Lmms:
  def __init__(self):
    self.task_dict = {}


@pytest.fixture
def model(monkeypatch):
  """The module of the classes, which imports lmms-eval."""
  stands = {
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.model": {"lmms": Lmms},
    "lmms_eval.protocol": {"ChatMessages": ChatMessages},
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": types.SimpleNamespace},
  }
  for name, values in stands.items():
    module = types.ModuleType(name)
    vars(module).update(values)
    monkeypatch.setitem(sys.modules, name, module)
  monkeypatch.delitem(sys.modules, "slowfast_jax.eval.lmms_model", raising=False)
  yield importlib.import_module("slowfast_jax.eval.lmms_model")
  sys.modules.pop("slowfast_jax.eval.lmms_model", None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Two videos with three questions each, answered by `slowfast eval`, and an export."""
  folder = tmp_path_factory.mktemp("lmms")
  (folder / "videos").mkdir()
  for name in "ab":
    write_video(folder / f"videos/{name}.mp4", VideoSpec(num_frames=8))
  docs = [
    {"video": f"{'ab'[i % 2]}.mp4", "question": f"Is {i}?", "options": ["x", "y"], "answer": "A"}
    for i in range(6)
  ]
  (folder / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
  save_export(folder / "export", make_export())
  words = {"questions": folder / "test.jsonl", "videos": folder / "videos"}
  words |= {"batch_size": 2, "max_new_tokens": 6}
  config = load_config(
    "configs/eval_jsonl.py", [f"--config.{name}={value}" for name, value in words.items()]
  )
  evaluate(config, folder / "export", folder / "run")
  return folder


def lines_of(files):
  lines = map(json.loads, (files / "run/predictions.jsonl").read_text().splitlines())
  return sorted(lines, key=lambda line: int(line["id"]))


def ask(model_object, files, settings, chat=False):
  """All questions as lmms-eval asks them, videos in turns; and replies by `slowfast eval`."""
  lines = lines_of(files)
  model_object.task_dict = {"t": {"test": lines}}

  def visual(doc):
    return [str(files / "videos" / doc["video"])]

  def messages(doc):
    video = {"type": "video", "url": visual(doc)[0]}
    return [{"role": "user", "content": [video, {"type": "text", "text": doc["prompt"]}]}]

  requests = []
  for i, line in enumerate(lines):
    words = (messages, settings) if chat else (settings, visual)
    args = (line["prompt"], *words, i, "t", "test")
    requests.append(types.SimpleNamespace(args=args))
  return model_object.generate_until(requests), [line["reply"] for line in lines]


@pytest.mark.parametrize("kind", ["Simple", "Chat"])
def test_a_checkpoint_replies_as_in_our_own_evaluation(kind, model, files, monkeypatch):
  encoded, encode = [], Engine.encode
  monkeypatch.setattr(Engine, "encode", lambda *a, **k: encoded.append(1) or encode(*a, **k))
  plugin = getattr(model, kind)(
    pretrained=str(files / "export"), batch_size="2", dtype="float32", device="cuda"
  )
  assert plugin.is_simple == (kind == "Simple")
  settings = {"max_new_tokens": 6, "until": [], "temperature": 0}
  replies, ours = ask(plugin, files, settings, chat=kind == "Chat")
  assert replies == ours
  assert len(encoded) == 2  # Each video once.
  if kind == "Chat":
    return
  settings["until"] = [ours[0][2:4]]
  assert ask(plugin, files, settings)[0][0] == ours[0].split(ours[0][2:4])[0]

  # What cannot be read costs its own question only.
  plugin.task_dict["t"]["test"][1]["video"] = "gone.mp4"
  request = types.SimpleNamespace(
    args=("Is?", {"max_new_tokens": 6}, lambda _: ["gone.mp4"], 0, "t", "test")
  )
  picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
  still = types.SimpleNamespace(
    args=("Is?", {"max_new_tokens": 6}, lambda _: [picture], 0, "t", "test")
  )
  gone, seen = plugin.generate_until([request, still])
  assert (gone, bool(seen)) == ("", True)

  # The likeliest continuation is the reply, and costs less than another.
  visual = lambda _: [str(files / "videos/a.mp4")]  # noqa: E731
  prompt = lines_of(files)[0]["prompt"]
  tokenizer = make_export().tokenizer
  first = tokenizer.decode(tokenizer.encode(ours[0])[:1])
  options = [types.SimpleNamespace(args=(prompt, o, visual, 0, "t", "test")) for o in (first, "z")]
  (loss, greedy), (other, not_greedy) = plugin.loglikelihood(options)
  assert 0 < loss < other
  assert (greedy, not_greedy) == (True, False)


def test_predictions_reply_what_they_replied(model, files):
  file = files / "run/predictions.jsonl"
  for kind in (model.Simple, model.Chat):
    replies, ours = ask(kind(predictions=str(file)), files, {}, chat=kind is model.Chat)
    assert replies == ours
  plugin = model.Simple(predictions=str(file))
  plugin.task_dict = {"t": {"test": [{}]}}
  request = types.SimpleNamespace(args=("Other?", {}, lambda _: ["a.mp4"], 0, "t", "test"))
  with pytest.raises(UserError, match="0 replies to 'Other\\?'"):
    plugin.generate_until([request])


def test_wrong_arguments_are_named(model, tmp_path):
  with pytest.raises(UserError, match="either pretrained=CHECKPOINT or predictions=FILE"):
    model.Simple()
  with pytest.raises(UserError, match="there is no num_frame"):
    model.Simple(predictions="x", num_frame=3)
  with pytest.raises(UserError, match="there is no such file"):
    model.Chat(predictions=str(tmp_path / "none.jsonl"))


def test_the_entry_point_names_classes_that_are_there(model):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert project["entry-points"]["lmms_eval.models"] == {
    "slowfast_jax": "slowfast_jax.eval.lmms:manifests"
  }
  manifest = lmms.manifests()
  for path, simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
    module, _, name = path.rpartition(".")
    assert module == model.__name__
    assert getattr(model, name).is_simple == simple


def read_yaml(file):
  """As lmms-eval does: `include` first, `!function` by import."""

  class Loader(yaml.SafeLoader):
    pass

  def function(loader, node):
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(importlib.import_module(module), name)

  Loader.add_constructor("!function", function)
  values = yaml.load(file.read_text(), Loader)
  included = values.pop("include", None)
  return {**(read_yaml(file.with_name(included)) if included else {}), **values}


@pytest.mark.parametrize("name", lmms_docs.NAMES)
def test_a_task_file_asks_and_scores_as_we_do(name, tmp_path, monkeypatch):
  config = read_yaml(YAMLS / f"{name}.yaml")
  assert config["task"] == f"slowfast_{name}"
  assert (YAMLS / config["dataset_kwargs"]["data_files"]["test"]).is_file()
  folder = {"videomme_w_subtitle": "videomme", "egoschema_subset": "egoschema"}.get(name, name)
  folder = "tempcompass" if name.startswith("tempcompass") else folder
  root = write_release(tmp_path / folder, name)
  monkeypatch.setitem(
    sys.modules, "datasets", types.SimpleNamespace(Dataset=types.SimpleNamespace(from_list=list))
  )
  monkeypatch.delenv(lmms_docs.VARIABLE, raising=False)
  with pytest.raises(UserError, match="Set SLOWFAST_EVAL_DATA"):
    config["process_docs"](None)
  monkeypatch.setenv(lmms_docs.VARIABLE, str(tmp_path))
  rows = config["process_docs"](None)

  task = get_task(name)
  docs = task.docs(str(root))
  assert [config["doc_to_text"](row) for row in rows] == [task.prompt(doc) for doc in docs]
  assert all(Path(video).exists() for row in rows for video in config["doc_to_visual"](row))
  if name in VIDEOS:
    assert {row["video"] for row in rows} == {str(root / path) for path in VIDEOS[name][2]}

  replies = ["B", "The answer is A", "", "yes", "D. A book", "Because"]
  replies = [replies[i % len(replies)] for i in range(len(docs))]
  items = [config["process_results"](row, [reply]) for row, reply in zip(rows, replies)]
  lines = [prediction_line(task, doc, reply) for doc, reply in zip(docs, replies)]
  row = summarize(task, join(task, docs, {line["id"]: line for line in lines}))
  for metric in config["metric_list"]:
    score = metric["aggregation"]([item[metric["metric"]] for item in items])
    expected = row if metric["metric"] == "paper_score" else row.get("strict", row)
    assert score == expected[task.metric]


def test_there_is_a_task_file_for_every_benchmark_that_can_be_scored_here():
  assert {file.stem for file in YAMLS.glob("*.yaml")} == set(BENCHMARKS) - {"egoschema"}
  with pytest.raises(AttributeError):
    functools.partial(getattr, lmms_docs, "egoschema")()
