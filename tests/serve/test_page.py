# SPDX-License-Identifier: Apache-2.0
"""The web page in a real browser: upload, ask, read, click a moment; at a desk and on a phone."""

import json
import os
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from slowfast_jax.serve.decode import DecodedMedia
from slowfast_jax.serve.moments import render_moments

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Where the pictures are kept for who wants to look at them.
ARTEFACTS = os.environ.get("SLOWFAST_TEST_ARTEFACTS")
needs_chromium = pytest.mark.skipif(
  CHROMIUM is None, reason="there is no Chromium; Debian and Ubuntu: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser():
  with sync_playwright() as playwright:
    # Without a sandbox: containers, where tests run, seldom allow one.
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield browser
    browser.close()


@needs_chromium
@pytest.mark.parametrize(("name", "width", "height"), [("desk", 1280, 900), ("phone", 390, 844)])
def test_a_video_is_asked_and_its_moments_are_seen(
  browser, server, files, expected, tmp_path, name, width, height
):
  phone = name == "phone"
  context = browser.new_context(
    viewport={"width": width, "height": height}, is_mobile=phone, has_touch=phone
  )
  page = context.new_page()
  asked, failed = [], []
  page.on("request", lambda request: asked.append(request.url))
  page.on("pageerror", lambda error: failed.append(str(error)))
  page.goto(server.url)
  page.set_input_files("#clip input[type=file]", files.clips / "a.mp4")
  page.wait_for_selector("#clip video")
  page.fill("#question textarea", "What was it?")
  page.click("#ask")
  bars = page.locator("#moments .bars button")
  expect(bars).to_have_count(8, timeout=60_000)
  answer = page.input_value("#answer textarea")
  assert answer.startswith(expected("<image>\nWhat was it?", "a.mp4"))

  peak = page.locator("#moments .bars button[aria-pressed=true]")
  assert page.inner_text("#moments .at") == peak.get_attribute("data-at")
  for number in (2, 5):
    bars.nth(number).click()
    shown = page.get_attribute("#moments .large img", "src")
    assert shown == bars.nth(number).get_attribute("data-frame")
    assert page.inner_text("#moments .at") == bars.nth(number).get_attribute("data-at")
  page.click("#moments [data-step='1']")
  assert bars.nth(6).get_attribute("aria-pressed") == "true"
  seconds = float(bars.nth(6).get_attribute("data-seconds"))
  assert page.evaluate("document.querySelector('#clip video').currentTime") == pytest.approx(
    seconds, abs=0.01
  )
  folder = Path(ARTEFACTS) if ARTEFACTS else tmp_path
  page.screenshot(path=folder / f"page_{name}.png", full_page=True)

  assert page.evaluate("document.documentElement.scrollWidth") <= width
  own = (server.url, "blob:", "data:")
  assert [url for url in asked if not url.startswith(own)] == []
  assert failed == []
  context.close()


@needs_chromium
def test_a_question_without_a_video_is_told(browser, server):
  page = browser.new_page()
  page.goto(server.url)
  page.fill("#question textarea", "What was it?")
  page.click("#ask")
  expect(page.get_by_text("Drop a video first.")).to_be_visible(timeout=30_000)
  page.close()


@pytest.mark.parametrize("path", ["/etc/passwd", "http://example.com/a.mp4"])
def test_the_page_takes_uploads_only(server, path):
  """What its own script would never send."""
  clip = {"path": path, "meta": {"_type": "gradio.FileData"}}
  body = {"fn_index": 0, "session_hash": "x", "data": [clip, "What was it?"]}
  with httpx.Client(base_url=server.url, timeout=30) as client:
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data?session_hash=x") as stream:
      events = [json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:")]
  (ended,) = [event for event in events if event["msg"] == "process_completed"]
  assert not ended["success"]
  assert "root:" not in json.dumps(events)


def test_moments_of_a_long_video_stay_few_thumbnails():
  images = np.zeros((100, 8, 8, 3), np.uint8)
  times = np.arange(100, dtype=np.float32) * 40
  profile = np.full(100, 0.005, np.float32)
  profile[40] = 0.51
  page = render_moments(DecodedMedia(images, times, 4000.0), profile)
  assert page.count("data-first=") == 12
  assert page.count("data-frame=") == 100
  assert page.count('aria-pressed="true"') == 1
  assert '<div class="at">26:40.0</div>' in page
  assert "51% of what" in page
  assert "1:06:40.0" in page
