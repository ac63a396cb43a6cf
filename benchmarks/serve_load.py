# SPDX-License-Identifier: Apache-2.0
"""Loads a real server with questions of many clients, and with what it must refuse.

Every answer is compared with the one that a single client got for the same question.
"""

import base64
import dataclasses
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.serve_hostile import Hostile, fuzzed, table, wrong_answer
from benchmarks.serve_process import ServerProcess
from slowfast_jax.checkpoints.store import Export, VideoConfig
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.slowfast import CompressorConfig, SlowFast, SlowFastConfig
from slowfast_jax.models.vit import ViTConfig

_WORDS = ("circle", "square", "red", "blue", "before", "after", "where", "when", "what", "colour")
_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Load:
  """What became of a load.

  Attributes:
    lone: requests a second of one client on a server for one.
    single: of one client on the server for many, whose empty slots cost time too.
    together: of all clients on the server for many.
    requests: how many were sent by all.
    wrong: how many answers were not those of the single client.
  """

  lone: float
  single: float
  together: float
  requests: int
  wrong: int


def random_export(width: int, num_layers: int) -> Export:
  """A random model whose answers depend on everything that it is asked and shown.

  Heads of 64, a key for every fourth of them, and an MLP of four times the width, as in small
  published models; few words, or half of the answers would be empty.
  """
  config = SlowFastConfig(
    vision=ViTConfig("siglip", _SIZE, 8, width=64, num_layers=2, num_heads=4, mlp_width=128),
    decoder=DecoderConfig(
      vocab_size=512,
      width=width,
      num_layers=num_layers,
      num_heads=width // 64,
      num_kv_heads=max(1, width // 256),
      head_dim=64,
      mlp_width=4 * width,
    ),
    compressor=CompressorConfig(
      video_pooling_stride=2, sampling_stride=2, temporal_stride=2, min_fast_frames=2
    ),
    hybrid=HybridConfig(every=2, min_depth=0, max_depth=num_layers),
  )

  def init() -> nnx.State:
    model = SlowFast(config, rngs=nnx.Rngs(0))
    if model.adapters is not None and model.adapters.warm_up is not None:
      model.adapters.warm_up[...] = jnp.ones_like(model.adapters.warm_up[...])
    return nnx.state(model)

  tokenizer = train_tokenizer([" ".join(_WORDS)], 300)
  return Export(config, jax.jit(init)(), tokenizer, VideoConfig(8), "Be brief.")


def questions(count: int, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
  """Bodies that all differ; half of them about one of four videos."""
  rng = random.Random(seed)
  clips = [_data_url(_clip(i)) for i in range(4)]
  bodies = []
  for i in range(count):
    text = " ".join(rng.choices(_WORDS, k=rng.randint(2, 12))) + f" {i}?"
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if i % 2:
      content.insert(0, {"type": "video_url", "video_url": {"url": clips[i // 2 % len(clips)]}})
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    bodies.append({**body, "max_tokens": tokens, "temperature": 0.5 * (i % 3), "seed": i})
  return bodies


def measure_load(
  lone: ServerProcess, server: ServerProcess, bodies: Sequence[dict[str, Any]], clients: int
) -> Load:
  """All questions by one client to a server of its own, then by many at once to another."""
  for warm in (lone, server):
    _send(warm, bodies[:8])  # The videos are encoded before it counts.
  began = time.monotonic()
  alone = _send(lone, bodies)
  lone_rate = len(bodies) / (time.monotonic() - began)
  part = bodies[: min(len(bodies), 32)]
  began = time.monotonic()
  _send(server, part)
  single = len(part) / (time.monotonic() - began)
  # Which client asks what, and beside whom, is another order.
  order = list(range(len(bodies)))
  random.Random(1).shuffle(order)
  parts = [order[i::clients] for i in range(clients)]
  barrier = threading.Barrier(clients + 1)

  def client(part: Sequence[int]) -> list[str]:
    barrier.wait()
    return _send(server, [bodies[i] for i in part])

  with ThreadPoolExecutor(clients) as pool:
    running = [pool.submit(client, part) for part in parts]
    barrier.wait()
    began = time.monotonic()
    answers = [future.result() for future in running]
    together = len(bodies) / (time.monotonic() - began)
  pairs = zip(itertools.chain(*parts), itertools.chain(*answers))
  wrong = sum(answer != alone[i] for i, answer in pairs)
  return Load(lone_rate, single, together, len(bodies), wrong)


def _send(server: ServerProcess, bodies: Sequence[dict[str, Any]]) -> list[str]:
  """The answers, one after the other."""
  with httpx.Client(base_url=server.url, timeout=300) as client:
    found = []
    for body in bodies:
      response = client.post("/v1/chat/completions", json=body)
      response.raise_for_status()
      found.append(response.json()["choices"][0]["message"]["content"])
    return found


def measure_hostile(server: ServerProcess, count: int) -> tuple[list[str], float]:
  """What was refused wrongly, and the megabytes by which the server grew."""
  known = table()
  # Once in full before it counts: what is first used then stays.
  wrong = send_hostile(server, known)
  before = server.memory()
  fuzz = [fuzzed(seed) for seed in range(count - len(known))]
  mixed = [*itertools.islice(itertools.cycle(known), min(count, 2 * len(known))), *fuzz][:count]
  wrong += send_hostile(server, mixed)
  return wrong, server.memory() - before


def send_hostile(server: ServerProcess, requests: Sequence[Hostile]) -> list[str]:
  """What was refused wrongly, and whether the server lives."""
  found = []
  with httpx.Client(timeout=60) as client:
    for hostile in requests:
      found.append(wrong_answer(hostile, hostile.send(client, server.url)))
    if client.get(f"{server.url}/healthz").status_code != 200:
      found.append("the server is no longer well")
  return [line for line in found if line is not None]


def _clip(seed: int) -> bytes:
  rng = np.random.default_rng(seed)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "clip.mp4"
    with av.open(str(path), "w") as container:
      stream = container.add_stream("libx264", rate=8)
      stream.width = stream.height = _SIZE
      stream.pix_fmt = "yuv420p"
      for _ in range(16):
        pixels = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
      container.mux(stream.encode())
    return path.read_bytes()


def _data_url(content: bytes) -> str:
  return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
