# SPDX-License-Identifier: Apache-2.0
"""The official OpenAI client, unmodified, talks to a real server and gets the engine's answers."""

import base64
import threading
import time

import httpx
import openai
import pytest

QUESTION = "What colour was the circle?"


def part(path, kind="video", mime="video/mp4"):
  url = f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
  return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def user(*content):
  return {"role": "user", "content": list(content)}


def text(value):
  return {"type": "text", "text": value}


def ask(client, messages, **options):
  return client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, **options)


def test_text_an_image_and_a_video_are_answered_as_by_the_engine(client, files, expected):
  video, image = part(files.clips / "a.mp4"), part(files.clips / "c.png", "image", "image/png")
  replies = [
    ask(client, [user(text(QUESTION))]),
    ask(client, [user(video, text(QUESTION))]),
    ask(client, [user(image, text(QUESTION))]),
  ]
  names = [(), ("a.mp4",), ("c.png",)]
  assert [reply.choices[0].message.content for reply in replies] == [
    expected(QUESTION, *which) for which in names
  ]
  assert {reply.choices[0].finish_reason for reply in replies} <= {"stop", "length"}
  usage = replies[1].usage
  assert usage.completion_tokens <= 12
  assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
  assert usage.prompt_tokens > replies[0].usage.prompt_tokens


def test_a_stream_is_the_answer_in_pieces(client, files, expected):
  messages = [user(part(files.clips / "a.mp4"), text(QUESTION))]
  options = {"stream": True, "stream_options": {"include_usage": True}}
  chunks = list(ask(client, messages, **options))
  pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
  assert "".join(filter(None, pieces)) == expected(QUESTION, "a.mp4")
  assert sum(bool(piece) for piece in pieces) > 1
  assert chunks[-2].choices[0].finish_reason in ("stop", "length")
  assert chunks[-1].usage.completion_tokens <= 12
  assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_keeps_its_history_and_its_video(client, files, expected):
  turns = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "<image>\nWhat was it?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": QUESTION},
  ]
  messages = [
    {"role": "system", "content": "Be brief."},
    user(part(files.clips / "b.mp4"), text("What was it?")),
    {"role": "assistant", "content": "red"},
    user(text(QUESTION)),
  ]
  assert ask(client, messages).choices[0].message.content == expected(turns, "b.mp4")


def test_sampling_follows_its_seed_and_options(client, expected):
  options = {"temperature": 1.5, "top_p": 0.95, "seed": 7}
  reply = ask(client, [user(text(QUESTION))], **options)
  assert reply.choices[0].message.content == expected(QUESTION, **options)
  few = ask(client, [user(text(QUESTION))], **options, extra_body={"top_k": 2})
  assert few.choices[0].message.content == expected(QUESTION, **options, top_k=2)


def test_an_answer_ends_before_a_stop_string(client, expected):
  whole = expected(QUESTION)
  stop = whole[3:5]
  reply = ask(client, [user(text(QUESTION))], stop=[stop])
  assert reply.choices[0].message.content == whole[: whole.index(stop)]
  assert reply.choices[0].finish_reason == "stop"


def test_an_uploaded_file_is_named_by_its_id(client, server, files, expected):
  with (files.clips / "a.mp4").open("rb") as file:
    uploaded = client.files.create(file=file, purpose="user_data")
  assert uploaded.bytes == (files.clips / "a.mp4").stat().st_size
  named = {"type": "file", "file": {"file_id": uploaded.id}}
  reply = ask(client, [user(named, text(QUESTION))])
  assert reply.choices[0].message.content == expected(QUESTION, "a.mp4")
  assert uploaded.id in [file.id for file in client.files.list()]
  before = server.metric("sessions_bytes")
  client.files.delete(uploaded.id)
  assert server.metric("sessions_bytes") < before  # The video is forgotten, not only its file.
  with pytest.raises(openai.NotFoundError, match="There is no file"):
    ask(client, [user(named, text(QUESTION))])


def test_a_file_of_an_allowed_folder_is_named_by_its_path(client, files, expected):
  for url in (str(files.clips / "a.mp4"), (files.clips / "a.mp4").as_uri()):
    reply = ask(client, [user({"type": "video_url", "video_url": {"url": url}}, text(QUESTION))])
    assert reply.choices[0].message.content == expected(QUESTION, "a.mp4")


def test_the_model_is_listed(client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").id == "tiny"
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve("other")


def test_errors_are_those_of_the_client(client):
  with pytest.raises(openai.BadRequestError) as caught:
    ask(client, [user(text("a " * 2000))])
  assert caught.value.code == "context_length_exceeded"
  assert caught.value.param == "messages"
  with pytest.raises(openai.BadRequestError, match="one answer a request"):
    ask(client, [user(text("Hi"))], n=2)


def test_health_and_metrics(server, client, files):
  assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok", "model": "tiny"}
  before = server.metric("tokens_total")
  ask(client, [user(part(files.clips / "a.mp4"), text(QUESTION))])
  assert server.metric("tokens_total") > before
  assert server.metric("first_token_seconds_count") > 0
  assert server.metric("encode_seconds_count") > 0
  assert server.metric("sessions_bytes") > 0
  assert server.metric("slots_in_use") == server.metric("queue_length") == 0


def test_a_client_that_goes_frees_its_slot(server, client):
  """All slots are taken by streams that nobody reads to the end."""
  messages = [user(text(QUESTION))]
  streams = []
  for seed in range(12):
    options = {"max_tokens": 96, "stream": True, "temperature": 2.0, "seed": seed}
    streams.append(client.chat.completions.create(model="tiny", messages=messages, **options))
  for stream in streams:
    stream.close()
  server.wait_for("slots_in_use", 0)
  assert ask(client, messages).choices[0].message.content

  waiting = threading.Thread(target=lambda: _give_up(server.url))
  waiting.start()
  waiting.join()
  server.wait_for("slots_in_use", 0)
  server.wait_for("queue_length", 0)


def _give_up(url):
  body = {"model": "tiny", "messages": [user(text(QUESTION))], "max_tokens": 96, "temperature": 2}
  try:
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.05)
  except httpx.TimeoutException:
    time.sleep(0.05)
