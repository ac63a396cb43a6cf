# SPDX-License-Identifier: Apache-2.0
"""What docs/serving.md shows is what works: its requests are sent to a real server."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
  ("language", "block"), [block for block in BLOCKS if "localhost:8000" in block[1]]
)
def test_a_request_of_the_page_is_answered(language, block, server, files, tmp_path):
  shutil.copy(files.clips / "a.mp4", tmp_path / "clip.mp4")
  address = server.url.removeprefix("http://")
  block = block.replace("localhost:8000", address).replace('"slow_fast"', '"tiny"')
  shell = [sys.executable, "-c"] if language == "python" else ["bash", "-euc"]
  outcome = subprocess.run([*shell, block], cwd=tmp_path, capture_output=True, text=True)
  assert outcome.returncode == 0, outcome.stderr
  assert outcome.stdout
  if language == "bash":
    reply = json.loads(outcome.stdout)
    assert reply["object"] in ("chat.completion", "file"), reply


def test_every_status_of_the_table_is_one_that_the_code_gives():
  folder = Path(__file__).parents[2] / "slowfast_jax/serve"
  source = "".join(file.read_text() for file in folder.glob("*.py"))
  given = {401, 400, 503} | {int(n) for n in re.findall(r"ApiError\(\s*(\d{3})", source)}
  told = {int(n) for n in re.findall(r"^\| (\d{3}) \|", PAGE, re.MULTILINE)}
  assert told | {500} == given


def test_metrics_that_the_page_names_are_there(server):
  text = httpx.get(f"{server.url}/metrics").text
  for name in re.findall(r"`(slowfast_\w+)`", PAGE):
    assert re.search(rf"^{name}(_count)?[ {{]", text, re.MULTILINE), name
