# SPDX-License-Identifier: Apache-2.0
"""The web page: drop a video, ask, read the answer as it comes, see which moments it was read from.

Everything comes from this server; the page works without the internet.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from anyio import to_thread
from starlette.applications import Starlette

from slowfast_jax.generate.engine import Engine
from slowfast_jax.serve.answers import Answer
from slowfast_jax.serve.app import Service
from slowfast_jax.serve.errors import ApiError, bad_request
from slowfast_jax.serve.media import Medium
from slowfast_jax.serve.moments import CSS, ON_LOAD, render_moments
from slowfast_jax.serve.scheduler import Ask, Scheduler

_LONGEST_QUESTION = 4000
# Seconds that an uploaded file is kept: the page's visitor may ask again.
_KEPT_SECONDS = 3600
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
_PAGE_CSS = """
.gradio-container { max-width: 960px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.35rem; margin: 0.4rem 0 0; }
#answer textarea { font-size: 1.1rem; }
/* Trimming would load a program from another site. */
#clip button[aria-label^="Trim"], #clip button[aria-label^="Reset"] { display: none; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""


def _never_fetch(clip: gr.Video) -> None:
  """Takes uploaded files only. By itself the component downloads any address that it is given."""
  move = clip.async_move_resource_to_block_cache

  async def uploaded_only(url_or_file_path: Any) -> Any:
    if "://" in str(url_or_file_path or ""):
      raise gr.Error("Addresses are not fetched; upload the video.", print_exception=False)
    return await move(url_or_file_path)

  # On the object: a subclass of a component makes Gradio write files beside its source.
  clip.async_move_resource_to_block_cache = uploaded_only  # type: ignore[method-assign]


def mount_page(app: Starlette, service: Service, engine: Engine) -> None:
  """Puts the page at `/`. Where there are API keys, they are its passwords."""
  keys = service.keys

  def may_enter(name: str, password: str) -> bool:
    del name
    found = [hmac.compare_digest(password.encode(), key.encode()) for key in keys]
    return any(found)

  gr.mount_gradio_app(
    app,
    _Page(service, engine).blocks,
    path="/",
    auth=may_enter if keys else None,
    auth_message="Any name; the password is an API key of this server.",
    max_file_size=service.limits.body_bytes,
    theme=gr.themes.Default(font=_FONTS, font_mono=_MONO),
    css=_PAGE_CSS,
    footer_links=[],
    run_history=False,
    ssr_mode=False,
    show_error=True,
    enable_monitoring=False,
  )


class _Page:
  """Its parts, and what happens between them."""

  def __init__(self, service: Service, engine: Engine):
    self._service, self._engine = service, engine
    with gr.Blocks(
      title=f"Ask a video: {service.model}",
      analytics_enabled=False,
      delete_cache=(_KEPT_SECONDS // 4, _KEPT_SECONDS),
    ) as self.blocks:
      gr.Markdown(f"# Ask a video\nAnswers by {service.model}", elem_id="title")
      with gr.Row():
        clip = gr.Video(label="Video", sources=["upload"], elem_id="clip", height=280)
        _never_fetch(clip)
        with gr.Column():
          question = gr.Textbox(
            label="Question",
            placeholder="What happens in the video?",
            lines=2,
            max_lines=4,
            max_length=_LONGEST_QUESTION,
            elem_id="question",
            submit_btn=False,
          )
          ask = gr.Button("Ask", variant="primary", elem_id="ask")
          answer = gr.Textbox(
            label="Answer", lines=3, interactive=False, elem_id="answer", buttons=["copy"]
          )
      moments = gr.HTML(
        css_template=CSS, js_on_load=ON_LOAD, elem_id="moments", apply_default_css=False
      )
      gr.on(
        [ask.click, question.submit],
        self._ask,
        [clip, question],
        [answer, moments],
        concurrency_limit=None,  # The scheduler has the line.
        api_visibility="private",
        show_progress="minimal",
      )
      clip.change(lambda: ("", ""), None, [answer, moments], api_visibility="private")

  async def _ask(self, clip: str | None, question: str) -> AsyncIterator[tuple[str, str]]:
    """Yields the answer so far, and then the moments too."""
    try:
      medium = await to_thread.run_sync(self._read, clip, question)
      async for text in self._stream(medium, question):
        yield text, ""
      yield text, await self._moments(medium, question)
    except ApiError as error:
      raise gr.Error(error.message, title="Not answered", print_exception=False) from None

  def _read(self, clip: str | None, question: str) -> Medium:
    if not clip:
      raise bad_request("Drop a video first.")
    if not question.strip():
      raise bad_request("Write a question first.")
    if "<image>" in question or "<video>" in question:
      raise bad_request("Leave <image> and <video> out of the question.")
    with self._service.metrics.decode.time():
      return self._service.reader.from_content(Path(clip).read_bytes(), "", None)

  async def _stream(self, medium: Medium, question: str) -> AsyncIterator[str]:
    answer = Answer(self._service.scheduler)
    finished = False
    try:
      await answer.start(Ask(_turns(question), [medium], stop=()))
      text = ""
      async for piece in answer:
        text += piece.text
        yield text
      finished = True
    finally:
      if not finished:
        answer.cancel()

  async def _moments(self, medium: Medium, question: str) -> str:
    """The timeline; of a model or an image without one, nothing."""
    if len(medium.frames.images) < 2 or not self._engine.export.model.hybrid_layers:
      return ""
    scheduler = self._service.scheduler
    profile = await asyncio.wrap_future(
      scheduler.call(lambda: _profile(self._engine, scheduler, medium, question))
    )
    return await to_thread.run_sync(render_moments, medium.frames, profile)


def _turns(question: str) -> list[dict[str, str]]:
  return [{"from": "human", "value": f"<image>\n{question}"}]


def _profile(engine: Engine, scheduler: Scheduler, medium: Medium, question: str) -> Any:
  """Runs on the model's thread."""
  session = scheduler.session(medium)
  ids = engine.prompt_ids(_turns(question), session)
  return engine.slow_attention(ids, session).profile()
