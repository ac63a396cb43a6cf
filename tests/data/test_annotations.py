# SPDX-License-Identifier: Apache-2.0
"""Annotations: every form that LLaVA data comes in, and the line of everything that is wrong."""

import json

import pytest

from slowfast_jax.data.annotations import AnnotationError, read_annotations, scan_annotations
from slowfast_jax.errors import UserError

TURNS = [{"from": "human", "value": "<video>\nWhy?"}, {"from": "gpt", "value": "So."}]


def entry(**fields) -> dict:
  return {"id": "1", "video": "a.mp4", "conversations": TURNS} | fields


def write(tmp_path, content: str | bytes, name: str = "train.json"):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


@pytest.mark.parametrize("indent", [None, 2])
def test_json_and_jsonl_mean_the_same(tmp_path, indent):
  entries = [entry(), entry(id="2", video="b/c.mp4"), {"id": "3", "conversations": TURNS}]
  as_list = read_annotations(write(tmp_path, json.dumps(entries, indent=indent)))
  as_lines = read_annotations(write(tmp_path, "\n".join(map(json.dumps, entries))))
  strip = lambda items: [(i.id, i.media, i.kind, i.conversations) for i in items]  # noqa: E731
  assert strip(as_list) == strip(as_lines)
  assert [(item.media, item.kind) for item in as_list] == [
    ("a.mp4", "video"),
    ("b/c.mp4", "video"),
    (None, "text"),
  ]


def test_entries_know_their_line(tmp_path):
  text = json.dumps([entry(), entry(id="2")], indent=1)
  lines = [item.line for item in read_annotations(write(tmp_path, "\n\n" + text))]
  assert lines == [4, 4 + text[: text.index('"2"')].count("\n") - 2]
  text = f"\n{json.dumps(entry())}\n\n{json.dumps(entry(id='2'))}\n"
  assert [item.line for item in read_annotations(write(tmp_path, text))] == [2, 4]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_and_line_ends_of_other_systems(tmp_path, newline, mark):
  lines = newline.join(json.dumps(entry(id=i)) for i in "12") + newline
  assert [a.id for a in read_annotations(write(tmp_path, mark + lines.encode()))] == ["1", "2"]
  listed = json.dumps([entry()], indent=1).replace("\n", newline)
  assert [a.id for a in read_annotations(write(tmp_path, mark + listed.encode()))] == ["1"]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
  turns = [{"from": "human", "value": "a\u2028b\x85c"}]
  text = json.dumps(entry(conversations=turns), ensure_ascii=False)
  (item,) = read_annotations(write(tmp_path, text))
  assert item.conversations == turns


def test_other_fields_travel_along(tmp_path):
  extra = {"questions": [{"q": "Wer?", "score": 0.5}], "source": None, "é": "é"}
  (item,) = read_annotations(write(tmp_path, json.dumps([entry(**extra)])))
  assert item.extra == extra


def test_ids_may_be_numbers_or_missing(tmp_path):
  text = json.dumps(entry(id=7)) + "\n" + json.dumps({"video": "b.mp4", "conversations": TURNS})
  assert [item.id for item in read_annotations(write(tmp_path, text))] == ["7", "b.mp4:2"]


def test_a_list_on_one_line_tells_its_entries_apart(tmp_path):
  entries = [{"conversations": TURNS}, {"conversations": TURNS}, {}]
  *texts, problem = scan_annotations(write(tmp_path, json.dumps(entries)))
  assert [item.id for item in texts] == ["text:1", "text:2"]
  assert problem.line == 1
  assert problem.reason.startswith("entry 3: no field")


def test_paths_are_normalised(tmp_path):
  (item,) = read_annotations(write(tmp_path, json.dumps(entry(video="./a//b/./c.mp4"))))
  assert item.media == "a/b/c.mp4"


def test_one_id_may_name_several_conversations_of_a_video(tmp_path):
  other = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "Yes."}]
  entries = [entry(), entry(conversations=other)]
  assert len(read_annotations(write(tmp_path, json.dumps(entries)))) == 2


BAD_ENTRIES = {
  "no object": ([1], "expected an object"),
  "no conversations": ({"video": "a.mp4", "converstaions": []}, 'no field "conversations"'),
  "empty conversations": (entry(conversations=[]), "must be a list of turns"),
  "conversations as text": (entry(conversations="hi"), "must be a list of turns"),
  "turn as text": (entry(conversations=["hi"]), 'turn 1 must have "from" and "value"'),
  "unknown role": (entry(conversations=[{"from": "user", "value": ""}]), '"from" must be one of'),
  "role as list": (entry(conversations=[{"from": [], "value": ""}]), '"from" must be one of'),
  "number as value": (
    entry(conversations=[{"from": "human", "value": 3}]),
    "must be a text, got 3",
  ),
  "answer first": (entry(conversations=TURNS[::-1]), 'turns must go "human", "gpt"'),
  "two questions": (entry(conversations=TURNS[:1] * 2), 'turns must go "human", "gpt"'),
  "only system": (entry(conversations=[{"from": "system", "value": ""}]), "turns must go"),
  "video list": (entry(video=["a.mp4"]), 'path of one file, got ["a.mp4"]'),
  "empty path": (entry(video=" "), "path of one file"),
  "folder itself": (entry(video="./"), "path of one file"),
  "absolute": (entry(video="/etc/passwd"), "below the media folder"),
  "parent": (entry(video="a/../../b.mp4"), "below the media folder"),
  "parent with backslash": (entry(video="..\\b.mp4"), "below the media folder"),
  "drive": (entry(video="C:\\b.mp4"), "below the media folder"),
  "null byte": (entry(video="a\0.mp4"), "control characters"),
  "video and image": (entry(image="a.png"), "not both"),
  "id as list": (entry(id=[1]), '"id" must be a text or an integer'),
  "id as bool": (entry(id=True), '"id" must be a text or an integer'),
  "half a surrogate pair": (entry(note="\ud800"), "surrogate"),
}


@pytest.mark.parametrize(("value", "reason"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_names_its_line_and_spoils_no_other(tmp_path, value, reason):
  good = [entry(id=i) for i in "xy"]
  for text in (
    "\n".join(map(json.dumps, [good[0], value, good[1]])),
    "[" + ",\n".join(map(json.dumps, [good[0], value, good[1]])) + "]",
  ):
    path = write(tmp_path, text)
    first, problem, last = scan_annotations(path)
    assert (first.id, last.id) == ("x", "y")
    assert isinstance(problem, AnnotationError)
    assert str(problem).startswith(f"{path}:2: ")
    assert reason in problem.reason


@pytest.mark.parametrize(
  ("second", "reason"),
  [
    (entry(video="b.mp4"), 'the id "1" of "b.mp4" was used in line 1 for "a.mp4"'),
    (entry(), "repeats line 1"),
  ],
)
def test_duplicate_ids(tmp_path, second, reason):
  _, problem = scan_annotations(write(tmp_path, "\n".join(map(json.dumps, [entry(), second]))))
  assert problem.line == 2
  assert reason in problem.reason


BAD_LINES = {
  "cut off": ('{"id": "1", ', "not JSON"),
  "NaN": (json.dumps(entry(score=float("nan"))), "NaN is not a JSON number"),
  "infinity": (json.dumps(entry(score=-float("inf"))), "-Infinity is not a JSON number"),
  "overflow": (json.dumps(entry(score=5)).replace("5", "1e999"), "1e999 is too large"),
  "field twice": ('{"video": "a.mp4", "video": "b.mp4"}', '"video" appears twice'),
  "deep": ("[" * 100_000, "nested too deeply"),
  "two values": ("{} {}", "not JSON: Extra data"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_json_names_its_line(tmp_path, line, reason):
  good = json.dumps(entry())
  first, problem = scan_annotations(write(tmp_path, f"{good}\n{line}\n"))
  assert first.id == "1"
  assert (problem.line, reason in problem.reason) == (2, True), problem
  with pytest.raises(AnnotationError) as caught:
    read_annotations(write(tmp_path, f"[{good},\n{line}"))
  assert caught.value.line == 2


@pytest.mark.parametrize(
  ("text", "line", "reason"),
  [
    ("", 1, "no entries"),
    ("[]", 1, "no entries"),
    ("[{}\n{}]", 2, 'expected "," or "]"'),
    ("[{},\n]", 2, "Expecting value"),
    ("[{}]\n[]", 2, "after the end"),
    ("[{},\n", 2, "Expecting value"),
    (b"{}\n{\xff}", 2, "not UTF-8"),
    ("{}".encode("utf-16"), 1, "not UTF-8"),
  ],
)
def test_files_that_cannot_be_read_on(tmp_path, text, line, reason):
  path = write(tmp_path, text)
  with pytest.raises(AnnotationError) as caught:
    list(scan_annotations(path))
  assert caught.value.line == line
  assert reason in caught.value.reason
  assert str(caught.value).startswith(f"{path}:{line}: ")


def test_no_such_file(tmp_path):
  with pytest.raises(UserError, match=r"none\.json: cannot read annotations: No such file"):
    read_annotations(tmp_path / "none.json")


def test_the_first_problems_are_told_together(tmp_path):
  path = write(tmp_path, "1\n" * 6)
  with pytest.raises(AnnotationError) as caught:
    read_annotations(path)
  text = str(caught.value)
  assert text.startswith(f"{path}:1: ")
  assert "line 2: " in text
  assert "and 2 more" in text
