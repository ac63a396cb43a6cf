# SPDX-License-Identifier: Apache-2.0
"""Annotations made to do harm: each is told with its line, and nothing outside the root is read."""

import json
import os
import subprocess
import sys

import pytest

from slowfast_jax.data.annotations import AnnotationError, scan_annotations
from slowfast_jax.data.prepare import prepare
from slowfast_jax.data.prepare_config import PrepareConfig
from slowfast_jax.data.records import RecordSource
from slowfast_jax.data.validate import validate_annotations
from tests.data.video_files import VideoSpec, write_video

TURNS = [{"from": "human", "value": "<video>\nWhy?"}, {"from": "gpt", "value": "So."}]
OUTSIDE = "path below the media folder"


def entry(**fields) -> dict:
  return {"id": "1", "video": "good.mp4", "conversations": TURNS} | fields


def with_text(text: str) -> str:
  return json.dumps(entry(note="HERE")).replace('"HERE"', text)


# Lines as an attacker writes them, and what is said of each. ROOT is the media folder's parent.
HOSTILE = {
  "parent": (entry(video="../secret.mp4"), OUTSIDE),
  "parent later": (entry(video="deep/../../secret.mp4"), OUTSIDE),
  "parent of nothing": (entry(video="none/../../secret.mp4"), OUTSIDE),
  "parent at the end": (entry(video="deep/.."), OUTSIDE),
  "backslashes": (entry(video="..\\secret.mp4"), OUTSIDE),
  "mixed slashes": (entry(video="deep\\../..\\secret.mp4"), OUTSIDE),
  "absolute": (entry(video="ROOT/secret.mp4"), OUTSIDE),
  "absolute twice": (entry(video="/ROOT/secret.mp4"), OUTSIDE),
  "drive": (entry(video="C:\\secret.mp4"), OUTSIDE),
  "null byte": (entry(video="good.mp4\0.png"), "control characters"),
  "newline": (entry(video="good.mp4\n"), "control characters"),
  "link out": (entry(id="a", video="link.mp4"), "outside of the folder"),
  "linked folder": (entry(id="b", video="up/secret.mp4"), "outside of the folder"),
  "url": (entry(id="c", video="http://localhost:1/a.mp4"), "no such file"),
  "file url": (entry(id="d", video="file:ROOT/secret.mp4"), "no such file"),
  "concat protocol": (entry(id="e", video="concat:good.mp4|ROOT/secret.mp4"), "no such file"),
  "home": (entry(id="f", video="~/secret.mp4"), "no such file"),
  "variable": (entry(id="g", video="$HOME/secret.mp4"), "no such file"),
  "escaped": (entry(id="h", video="%2e%2e/secret.mp4"), "no such file"),
  "playlist": (entry(id="i", video="list.m3u8"), "is not a video file"),
  "script": (entry(id="j", video="list.ffconcat"), "not one of single videos"),
  "pipe": (entry(id="k", video="pipe.mp4"), "is not a regular file"),
  "pattern": (entry(id="l", image="%d.png", video=None), "No such file"),
  "long path": (entry(video="a/" * 600), "has 1200 bytes, more than 1024"),
  "long name": (entry(id="m", video="a" * 1000), "name too long"),
  "long id": (entry(id="x" * 5000), '"id" has 5000 characters, more than 1024'),
  "ten megabytes": (entry(note="x" * 10_000_000), "has 9.5 MiB, more than the 4 MiB of an entry"),
  "ten megabytes said": (
    entry(conversations=[{"from": "human", "value": "y" * 10_000_000}, TURNS[1]]),
    "has 9.5 MiB",
  ),
  "role of ten megabytes": (entry(conversations=[{"from": "z" * 10**7, "value": ""}]), "has 9.5"),
  "NaN": (with_text("NaN"), "NaN is not a JSON number"),
  "infinity": (with_text("-Infinity"), "-Infinity is not a JSON number"),
  "too large a number": (with_text("1e999"), "1e999 is too large"),
  "endless digits": (with_text("7" * 5000), "a number has 5000 digits"),
  "deep list": (with_text("[" * 5000 + "]" * 5000), "nested too deeply"),
  "deep object": (with_text('{"a":' * 5000 + "1" + "}" * 5000), "nested too deeply"),
  "deep and open": ("[" * 1_000_000, "nested too deeply"),
  "half a character": (with_text('"\\ud800"'), "half of a surrogate pair"),
  "field twice": (with_text('1, "video": "../secret.mp4"'), '"video" appears twice'),
  "number as path": (entry(video=7), "path of one file, got 7"),
  "list as path": (entry(video=["good.mp4"]), "path of one file"),
  "object as path": (entry(video={"path": "good.mp4"}), "path of one file"),
  "false as path": (entry(video=False), "path of one file, got false"),
  "turns as object": (entry(conversations={"from": "human"}), "must be a list of turns"),
  "turn as null": (entry(conversations=[None]), 'must have "from" and "value"'),
  "value as list": (entry(conversations=[{"from": "human", "value": [1]}]), "must be a text"),
  "id as object": (entry(id={"a": 1}), '"id" must be a text or an integer'),
  "same id, other video": (entry(video="other.mp4"), 'the id "1" of "other.mp4" was used in line'),
  "the same again": (entry(), "repeats line"),
  "no object": ("null", "expected an object"),
  "text": ('"../secret.mp4"', "expected an object"),
  "empty object": ("{}", 'no field "conversations"'),
  "cut": ('{"id": "1", "video": "go', "not JSON"),
  "two on a line": (json.dumps(entry()) * 2, "not JSON: Extra data"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A media folder with traps in it, and a secret beside it."""
  root = tmp_path_factory.mktemp("root")
  media = root / "media"
  (media / "deep").mkdir(parents=True)
  write_video(root / "secret.mp4", VideoSpec(num_frames=7))
  write_video(media / "good.mp4", VideoSpec(num_frames=5))
  os.symlink("../secret.mp4", media / "link.mp4")
  os.symlink("..", media / "up")
  os.mkfifo(media / "pipe.mp4")
  playlist = f"#EXTM3U\n#EXTINF:1,\n{root}/secret.mp4\n#EXT-X-ENDLIST\n"
  (media / "list.m3u8").write_text(playlist)
  (media / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{root}/secret.mp4'\n")
  return root


@pytest.fixture(scope="module", params=["\n", "\r\n"], ids=["LF", "CRLF"])
def hostile(root, request):
  """A file with a byte order mark, a good entry, and everything above, a line each."""
  lines = [json.dumps(entry())]
  for value, _ in HOSTILE.values():
    line = value if isinstance(value, str) else json.dumps(value)
    lines.append(line.replace("ROOT", str(root)))
  file = root / "hostile.jsonl"
  file.write_bytes(b"\xef\xbb\xbf" + request.param.join(lines).encode())
  return file


def check(found: dict[int, str]) -> None:
  expected = {line: words for line, (_, words) in enumerate(HOSTILE.values(), start=2)}
  wrong = {line: found.get(line) for line, words in expected.items() if words not in found[line]}
  assert not wrong
  assert max(map(len, found.values())) < 2500, "a message repeats what it complains about"
  assert set(found) == set(range(2, 2 + len(HOSTILE)))


def test_every_hostile_line_is_told_and_only_the_good_one_prepared(root, hostile, tmp_path):
  config = PrepareConfig(num_frames=2, size=16, workers=1)
  report = prepare(root / "media", hostile, tmp_path / "records", config)
  lines = (tmp_path / "records" / "errors.jsonl").read_text().splitlines()
  check({error["line"]: error["reason"] for error in map(json.loads, lines)})
  (record,) = RecordSource(tmp_path / "records")
  assert (record.source, record.num_video_frames, report.records) == ("good.mp4", 5, 1)


def test_validation_tells_the_same(root, hostile):
  found = validate_annotations(hostile, root / "media", workers=1)
  check({int(p.place.rpartition(":")[2]): p.reason for p in found.problems})


def test_nothing_outside_of_the_root_is_opened(root, hostile):
  """Python's own audit hook hears every file that is opened; a dangling name costs no look-up."""
  code = (
    "import sys; from slowfast_jax.data import media, prepare_items, prepare_record as r\n"
    "from slowfast_jax.data.prepare_config import PrepareConfig\n"
    "import pathlib; m = media.Media(sys.argv[1]); seen = []\n"
    "items, _ = prepare_items.read_items(pathlib.Path(sys.argv[2]))\n"
    "hook = lambda e, a: seen.append(str(a[0])) if e == 'open' else None\n"
    "sys.addaudithook(hook)\n"
    "for item in prepare_items.place_items(items, m):\n"
    "  try: r.make(PrepareConfig(num_frames=2, size=16), item)\n"
    "  except Exception: pass\n"
    "print([name for name in seen if 'secret' in name or 'passwd' in name], len(seen) > 0)\n"
  )
  command = [sys.executable, "-c", code, str(root / "media"), str(hostile)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  assert done.stdout.strip() == "[] True"


@pytest.mark.parametrize("depth", [300, 480, 495, 900, 985, 1000, 3000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_no_depth_of_nesting_is_a_crash(tmp_path, depth, brackets):
  text = with_text(brackets[0] * depth + "1" + brackets[1] * depth)
  file = tmp_path / "deep.jsonl"
  file.write_text(text + "\n" + json.dumps(entry(id="2")))
  first, second = scan_annotations(file)
  assert isinstance(first, AnnotationError) or first.id == "1"
  assert second.id == "2"


def test_a_file_of_one_endless_line_is_told(tmp_path):
  file = tmp_path / "long.json"
  file.write_text("[" + ",".join([json.dumps(entry(note="x" * 5_000_000))] * 3) + "]")
  problems = list(scan_annotations(file))
  assert [problem.line for problem in problems] == [1, 1, 1]
  assert [problem.reason[:8] for problem in problems] == ["entry 1:", "entry 2:", "entry 3:"]
