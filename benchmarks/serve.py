# SPDX-License-Identifier: Apache-2.0
"""`slowfast bench serve`: many clients beside one; hostile requests; both against a real server.

Every answer of the load is compared with the one that a single client got for the same question.
"""

import argparse
import base64
import dataclasses
import itertools
import json
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
from benchmarks.serve_process import ServerProcess, serving
from slowfast_jax.checkpoints.store import Export, VideoConfig, save_export
from slowfast_jax.data.tokenizer import train_tokenizer
from slowfast_jax.errors import UsageError
from slowfast_jax.models.decoder import DecoderConfig
from slowfast_jax.models.hybrid import HybridConfig
from slowfast_jax.models.slowfast import CompressorConfig, SlowFast, SlowFastConfig
from slowfast_jax.models.vit import ViTConfig

HELP = "clients at once beside one client, and hostile requests, against a real server"

_WORDS = ("circle", "square", "red", "blue", "before", "after", "where", "when", "what", "colour")
_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Load:
  """What became of a load.

  Attributes:
    single: requests a second of one client.
    together: requests a second of all.
    requests: how many were sent by all.
    wrong: how many answers were not those of the single client.
  """

  single: float
  together: float
  requests: int
  wrong: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the benchmark's flags."""
  add = parser.add_argument
  add("--clients", type=int, default=64, help="at once (%(default)s)")
  add("--requests", type=int, default=4, help="of each client (%(default)s)")
  add("--tokens", type=int, default=64, help="of an answer, at most (%(default)s)")
  add("--slots", type=int, default=32, help="of the server (%(default)s)")
  add("--width", type=int, default=256, help="of the random model's decoder (%(default)s)")
  add("--hostile", type=int, default=1000, help="requests to refuse (%(default)s)")
  add("--json", metavar="FILE", help="also write the numbers here")


def run(args: argparse.Namespace) -> int:
  """Prints the figures; 1 where an answer or a refusal was wrong."""
  for name in ("clients", "requests", "tokens", "slots"):
    if getattr(args, name) < 1:
      raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}.")
  with tempfile.TemporaryDirectory(prefix="slowfast-bench-") as name:
    folder = Path(name)
    save_export(folder / "export", random_export(args.width))
    flags = (
      f"--slots={args.slots}",
      f"--max-queue={args.clients + 1}",
      "--context=256",
      "--max-body-mb=4",
      "--no-page",
    )
    with serving(folder / "export", *flags, log=folder / "log") as server:
      load = measure_load(
        server, questions(args.clients * args.requests, args.tokens), args.clients
      )
      wrong, grown = measure_hostile(server, args.hostile)
  ratio = load.together / load.single
  print(f"one client           {load.single:8.1f} requests/s")
  print(f"{args.clients:<3} clients at once   {load.together:8.1f} requests/s, {ratio:.1f} times")
  print(f"answers that differ  {load.wrong:8d} of {load.requests}")
  print(f"refused wrongly      {len(wrong):8d} of {args.hostile}")
  print(f"memory after that    {grown:+8.1f} MB")
  for line in wrong[:20]:
    print(f"  {line}")
  if args.json:
    values = dataclasses.asdict(load) | {"refused_wrongly": len(wrong), "megabytes": grown}
    Path(args.json).write_text(json.dumps(values, indent=2))
  return 1 if load.wrong or wrong else 0


def random_export(width: int) -> Export:
  """A random model whose answers depend on everything that it is asked and shown."""
  config = SlowFastConfig(
    vision=ViTConfig("siglip", _SIZE, 8, width=64, num_layers=2, num_heads=4, mlp_width=128),
    decoder=DecoderConfig(
      vocab_size=512,
      width=width,
      num_layers=4,
      num_heads=4,
      num_kv_heads=2,
      head_dim=width // 4,
      mlp_width=2 * width,
    ),
    compressor=CompressorConfig(
      video_pooling_stride=2, sampling_stride=2, temporal_stride=2, min_fast_frames=2
    ),
    hybrid=HybridConfig(every=2, min_depth=0, max_depth=4),
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


def measure_load(server: ServerProcess, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
  """All questions by one client, then by many at once."""
  _send(server, bodies[:8])  # Both find the videos encoded and the connections warm.
  began = time.monotonic()
  alone = _send(server, bodies)
  single = len(bodies) / (time.monotonic() - began)
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
  return Load(single, together, len(bodies), wrong)


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
