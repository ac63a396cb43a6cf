# SPDX-License-Identifier: Apache-2.0
"""A real server under load, under attack, with keys, and at its end."""

import socket
import threading
import time

import httpx
import openai
import pytest

from benchmarks.serve_hostile import fuzzed, table
from benchmarks.serve_load import measure_load, questions, send_hostile
from benchmarks.serve_process import serving
from tests.serve.conftest import FLAGS


def test_what_is_wrong_is_refused_with_the_right_status(server):
  assert send_hostile(server, table()) == []


def test_damaged_requests_are_refused(server):
  """`slowfast bench serve` sends a thousand and watches the memory."""
  assert send_hostile(server, [fuzzed(seed) for seed in range(100)]) == []


def test_answers_under_load_are_those_of_one_client(server):
  """`slowfast bench serve` has 64 clients and measures."""
  load = measure_load(server, server, questions(24, tokens=12), clients=8)
  assert load.wrong == 0


def test_a_body_that_hides_its_length_is_refused_too(server):
  def endless():
    for _ in range(100):
      yield b'{"' + b"a" * 99_998

  headers = {"content-type": "application/json"}
  response = httpx.post(f"{server.url}/v1/chat/completions", content=endless(), headers=headers)
  assert response.status_code == 413
  assert response.json()["error"]["code"] == "too_large"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/", "/config"])
def test_other_sites_are_not_let_in(server, path):
  """No CORS: a page of another site may send a form, but not JSON, and reads no answer."""
  headers = {"origin": "https://example.com", "host": "gpu.example.net"}
  asked = {**headers, "access-control-request-method": "POST"}
  responses = [
    httpx.options(server.url + path, headers=asked),
    httpx.get(server.url + path, headers=headers),
  ]
  assert responses[0].status_code == 400
  assert not [r for r in responses if "access-control-allow-origin" in r.headers]


def test_broken_connections_harm_nobody(server):
  host, port = server.url.removeprefix("http://").split(":")
  for part in (b"", b"\x16\x03\x01\x02\x00", b"POST /v1/chat/completions HTTP/1.1\r\n"):
    with socket.create_connection((host, int(port))) as connection:
      connection.sendall(part)
  assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_keys_are_asked_for_and_sigterm_lets_all_streams_finish(files, monkeypatch):
  monkeypatch.setenv("SLOWFAST_API_KEY", "secret")
  flags = (*FLAGS, "--slots=4", "--no-page")
  with serving(files.export, *flags, log=files.folder / "last.log") as server:
    base = f"{server.url}/v1"
    for key in ("wrong", "secre", "secrets"):
      with (
        openai.OpenAI(base_url=base, api_key=key) as client,
        pytest.raises(openai.AuthenticationError),
      ):
        client.models.list()
    assert httpx.get(f"{server.url}/healthz").status_code == 200

    ended = []

    def stream(seed):
      with openai.OpenAI(base_url=base, api_key="secret", max_retries=0) as client:
        chunks = client.chat.completions.create(
          model="tiny",
          messages=[{"role": "user", "content": "What colour was the circle?"}],
          stream=True,
          max_tokens=96,
          temperature=2.0,
          seed=seed,
        )
        ended.append([chunk.choices[0].finish_reason for chunk in chunks][-1])

    clients = [threading.Thread(target=stream, args=(seed,)) for seed in range(8)]
    for client in clients:
      client.start()
    while server.metric("slots_in_use") + server.metric("queue_length") + len(ended) < 8:
      time.sleep(0.005)
    assert server.terminate() == 0
    for client in clients:
      client.join()
  assert len(ended) == 8
  assert set(ended) <= {"stop", "length"}
  assert "Stopped." in (files.folder / "last.log").read_text()
