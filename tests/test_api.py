# SPDX-License-Identifier: Apache-2.0
"""`load`, `save` and `VLM`: samples of all kinds in one call, against NumPy and training."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import slowfast_jax as sf
from slowfast_jax.checkpoints.store import flatten
from slowfast_jax.data.packing import Sample, build_row
from slowfast_jax.errors import UserError
from slowfast_jax.generate.video import read_video
from slowfast_jax.sharding import make_mesh
from tests.data.video_files import VideoSpec, write_video
from tests.generate.tiny import (
  CONFIG,
  batch_logits,
  frames,
  full_logits,
  geometry,
  make_export,
)
from tests.models import oracle

V, NEW = -200, 32
# What a random model ends with is chance: it goes on to the last token.
NEVER = (-1,)


def words(count, seed):
  return np.random.default_rng(seed).integers(0, 320, count).tolist()


# Of different kinds and lengths: a video, a short one in front, a still image, text alone, a single
# token, two videos and an image, a long text with two images.
IDS = [
  [*words(9, 0), V, *words(20, 1)],
  [V, *words(4, 2)],
  [*words(3, 3), V, *words(11, 4)],
  words(30, 5),
  [7],
  [*words(2, 6), V, V, *words(5, 7), V, *words(6, 8)],
  [*words(10, 9), V, *words(40, 10), V, *words(9, 11)],
]
PIXELS = [
  [frames(8, 1)],
  [frames(5, 2)],
  [frames(1, 3)],
  [],
  [],
  [frames(4, 4), frames(7, 5), frames(1, 6)],
  [frames(1, 7), frames(1, 8)],
]


def normalised(pixels):
  """What a sample hands in: stills have no axis of time."""
  arrays = [(x / 127.5 - 1).astype(np.float32) for x in pixels]
  arrays = [x[0] if len(x) == 1 else x for x in arrays]
  return None if not arrays else arrays[0] if len(arrays) == 1 else arrays


FRAMES = [normalised(pixels) for pixels in PIXELS]


def make_vlm(export, *arguments):
  vlm = sf.VLM(export, *arguments)
  vlm.engine.stop_ids = NEVER
  return vlm


@pytest.fixture(scope="module")
def vlm():
  return make_vlm(make_export())


@pytest.fixture(scope="module")
def together(vlm):
  """Scores of all samples in one call."""
  return vlm.logits(IDS, FRAMES)


@pytest.mark.parametrize("i", range(len(IDS)))
def test_every_kind_of_sample_is_what_the_equations_give(vlm, together, i):
  leaves = flatten(vlm.export.params)
  weights = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
  slow = [oracle.slow_tokens(weights, CONFIG, pixels) for pixels in PIXELS[i]]
  expected = oracle.logits(weights, CONFIG, IDS[i], slow, length=1000)
  assert together[i].dtype == np.float32
  np.testing.assert_allclose(together[i], expected, rtol=1e-5, atol=1e-5)


def test_samples_of_a_call_do_not_touch_each_other(vlm, together):
  for i, (ids, media) in enumerate(zip(IDS, FRAMES)):
    (alone,) = vlm.logits([ids], [media])
    np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-5, err_msg=f"sample {i}")
  backwards = vlm.logits(IDS[::-1], FRAMES[::-1])
  for one, other in zip(together, backwards[::-1]):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_training(vlm, together):
  """Packed with another sample into one row of a `Batch`."""
  samples = [Sample(IDS[i], None, tuple(len(x) for x in PIXELS[i])) for i in (1, 3)]
  samples[0] = dataclasses.replace(samples[0], frames=PIXELS[1][0])
  batch = build_row(samples, geometry(CONFIG))
  scores = np.asarray(batch_logits(CONFIG)(vlm.export.params, batch))[0]
  for segment, i in enumerate((1, 3), start=1):
    own = scores[batch.segments[0] == segment]
    np.testing.assert_allclose(own, together[i], rtol=1e-5, atol=1e-5)


def test_text_alone_is_the_plain_language_model(together):
  plain = make_vlm(make_export(hybrid=False))
  (scores,) = plain.logits([IDS[3]], [None])
  # Another initialisation has the same decoder, whose key does not depend on the adapters.
  np.testing.assert_allclose(scores, together[3], rtol=1e-5, atol=1e-5)


def test_calls_of_text_alone(vlm, together):
  scores = vlm.logits([IDS[4], IDS[3]], [None, None])
  np.testing.assert_allclose(scores[1], together[3], rtol=1e-5, atol=1e-5)
  (reply,) = vlm.generate_ids([IDS[3]], [None], 4)
  both = vlm.generate_ids([IDS[4], IDS[3]], [None, None], 4)
  assert both[1] == reply
  assert len(reply) == 4


def test_one_frame_is_a_still_and_is_not_pooled(vlm):
  image, ids = normalised([frames(1, 3)]), [5, V, 6]
  still, one_frame, video = vlm.logits([ids] * 3, [image, image[None], np.stack([image] * 2)])
  assert (len(still), len(video)) == (2 + 16, 2 + 2 * 4)
  np.testing.assert_allclose(still, one_frame, rtol=1e-5, atol=1e-5)


# --- Generation ---


def test_greedy_generation_is_the_argmax_of_the_scores(vlm):
  replies = vlm.generate_ids(IDS, FRAMES, NEW)
  scores = vlm.logits([ids + reply for ids, reply in zip(IDS, replies)], FRAMES)
  for i, reply in enumerate(replies):
    assert len(reply) == NEW
    assert len(set(reply)) > 2
    likeliest = np.argmax(scores[i][-NEW - 1 : -1], axis=-1)
    np.testing.assert_array_equal(likeliest, reply, err_msg=f"sample {i}")
  for i in (3, 5):
    assert vlm.generate_ids([IDS[i]], [FRAMES[i]], NEW) == [replies[i]]


def test_greedy_generation_token_by_token(vlm):
  ids = list(IDS[0])
  for _ in range(NEW):
    (scores,) = vlm.logits([ids], [FRAMES[0]])
    ids.append(int(np.argmax(scores[-1])))
  assert vlm.generate_ids(IDS[:1], FRAMES[:1], NEW) == [ids[len(IDS[0]) :]]


def test_without_cross_attention_only_the_prompt_reads(vlm):
  options = {"max_new_tokens": NEW, "decode_cross_attention": False}
  replies = vlm.generate_ids(IDS[:5], FRAMES[:5], **options)
  for i in (0, 2, 3):
    pixels = PIXELS[i][0] if PIXELS[i] else None
    ids = [*IDS[i], *replies[i]]
    scores = full_logits(vlm.export, ids, pixels, silent_from=len(IDS[i]))
    np.testing.assert_array_equal(np.argmax(scores[-NEW - 1 : -1], axis=-1), replies[i])
  reading = vlm.generate_ids(IDS[:5], FRAMES[:5], NEW)
  assert replies[0] != reading[0]
  assert replies[3] == reading[3]


def test_it_stops_behind_the_stop_token(vlm):
  replies = vlm.generate_ids(IDS, FRAMES, NEW)
  stop = replies[0][5]
  stopping = sf.VLM(dataclasses.replace(vlm.export, tokenizer=None, stop_ids=(stop,)))
  cut = [r[: r.index(stop) + 1] if stop in r else r for r in replies]
  assert len({len(reply) for reply in cut}) > 1
  assert stopping.generate_ids(IDS, FRAMES, NEW) == cut


def test_the_tokenizer_ends_a_turn(vlm):
  tokenizer = vlm.export.tokenizer
  stops = sf.VLM(dataclasses.replace(vlm.export, stop_ids=(7,))).engine.stop_ids
  assert set(stops) == {tokenizer.im_end_id, tokenizer.eos_id, 7}


def test_seeds_reproduce(vlm):
  def draw(seed, **options):
    return vlm.generate_ids(IDS[:3], FRAMES[:3], NEW, temperature=1.0, seed=seed, **options)

  greedy = vlm.generate_ids(IDS[:3], FRAMES[:3], NEW, seed=1)
  assert draw(1) == draw(1)
  assert draw(1) != draw(2)
  assert draw(1) != greedy
  assert draw(1)[1] == draw([5, 1, 6])[1]
  assert draw(3, top_p=1e-6) == greedy
  assert vlm.generate_ids(IDS[:3], FRAMES[:3], NEW, temperature=1e-5, seed=3) == greedy


# --- Slow tokens ---


@pytest.fixture
def change_slow(vlm, monkeypatch):
  """Lets a test change the slow keys and values [A, B, S, K, H] of every batch."""
  build = vlm.engine._visual

  def set_change(change):
    def changed(media, built):
      visual = build(media, built)
      valid = np.arange(visual.kv.k.shape[2]) < np.asarray(visual.num_slow)[:, None]
      return change(visual, valid)

    monkeypatch.setattr(vlm.engine, "_visual", changed)

  return set_change


def with_kv(visual, change):
  kv = type(visual.kv)(change(visual.kv.k), change(visual.kv.v))
  return dataclasses.replace(visual, kv=kv)


def test_slow_tokens_are_a_set(vlm, together, change_slow):
  def permute(visual, valid):
    rng = np.random.default_rng(0)
    order = np.stack(
      [np.r_[rng.permutation(row.sum()), np.arange(row.sum(), len(row))] for row in valid]
    )
    index = order[None, :, :, None, None]
    return with_kv(visual, lambda x: jnp.take_along_axis(x, index, axis=2))

  replies = vlm.generate_ids(IDS, FRAMES, NEW)
  change_slow(permute)
  for one, other in zip(together, vlm.logits(IDS, FRAMES)):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
  assert vlm.generate_ids(IDS, FRAMES, NEW) == replies


def test_padding_is_never_read(vlm, together, change_slow):
  def poison(visual, valid):
    visual = with_kv(visual, lambda x: jnp.where(valid[None, :, :, None, None], x, 1e3))
    num_text = [sum(token != V for token in ids) for ids in IDS]
    num_fast = [len(scores) - n for scores, n in zip(together, num_text)]
    behind = np.arange(visual.fast.shape[1]) >= np.array([*num_fast, 0])[:, None]
    return dataclasses.replace(visual, fast=jnp.where(behind[..., None], 1e3, visual.fast))

  replies = vlm.generate_ids(IDS, FRAMES, NEW)
  change_slow(poison)
  for one, other in zip(together, vlm.logits(IDS, FRAMES)):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
  assert vlm.generate_ids(IDS, FRAMES, NEW) == replies


def test_text_reads_the_slow_tokens_of_all_videos_of_its_sample(vlm, together, change_slow):
  """Without those of any one of them the scores behind are others."""
  starts = np.cumsum([0, 4 * 4, 7 * 4, 16])

  def hide(part):
    def change(visual, valid):
      slots = np.arange(valid.shape[1])
      hidden = (slots >= starts[part]) & (slots < starts[part + 1])
      return with_kv(visual, lambda x: jnp.where(hidden[None, None, :, None, None], 0.0, x))

    return change

  for part in range(3):
    change_slow(hide(part))
    (scores,) = vlm.logits(IDS[5:6], FRAMES[5:6])
    assert np.abs(scores[:2] - together[5][:2]).max() > 1e-4
    assert np.abs(scores[-1] - together[5][-1]).max() > 1e-4


# --- The model's maximum length ---


def test_samples_are_cut_on_the_right(vlm, together):
  """Sample 6 within its first image; slow tokens of the second are read all the same."""
  cut = make_vlm(dataclasses.replace(vlm.export, max_length=20))
  for i, scores in enumerate(cut.logits(IDS, FRAMES)):
    assert len(scores) == min(20, len(together[i]))
    np.testing.assert_allclose(scores, together[i][:20], rtol=1e-5, atol=1e-5)


def test_without_its_videos_a_cut_sample_is_text(vlm, monkeypatch):
  monkeypatch.setattr(vlm.engine, "max_length", 9)
  text, ids = IDS[0][:9], IDS[0]
  for a, b in zip(vlm.logits([ids, text], [FRAMES[0], None]), vlm.logits([text], [None]) * 2):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  one, other = vlm.generate_ids([ids, text], [FRAMES[0], None], NEW)
  assert one == other


# --- What does not fit ---


@pytest.mark.parametrize(
  ("ids", "media", "message"),
  [
    ([[1], []], [None, None], "Sample 1 is empty"),
    ([[1], [1, V]], [None, None], r"Sample 1 has 1 placeholder\(s\) .* 0 video"),
    ([[1, V, V]], [FRAMES[0]], r"Sample 0 has 2 placeholder\(s\) .* 1 video"),
    ([[1]], [FRAMES[0]], r"Sample 0 has 0 placeholder\(s\) .* 1 video"),
    ([[1], [2, -1]], [None, None], "Sample 1 has the id -1 at place 1; expected 0 to 319"),
    ([[320]], [None], "Sample 0 has the id 320 at place 0"),
    ([[2**40]], [None], "Sample 0 has the id 1099511627776"),
    ([[1.5]], [None], "Sample 0 must be a list of token ids, got float64"),
    ([[[1, 2]]], [None], r"Sample 0 must be a list of token ids, got int64 of shape \(1, 2\)"),
    ([1, 2], [None, None], "Sample 0 must be a list of token ids"),
    ([[1], [2]], [None], "got 1 for 2 samples"),
    ([[1], [V]], [None, frames(4, 0)], "Sample 1, video or image 0: .* float32 .* got uint8"),
    ([[V]], [np.zeros((4, 8, 8, 3), np.float32)], r"\[T, 16, 16, 3\].* got \[4, 8, 8, 3\]"),
    ([[V]], [np.zeros((4, 3, 16, 16), np.float32)], r"got \[4, 3, 16, 16\]"),
    ([[V]], [np.zeros((0, 16, 16, 3), np.float32)], r"got \[0, 16, 16, 3\]"),
    ([[V]], [np.zeros((1, 2, 16, 16, 3), np.float32)], r"got \[1, 2, 16, 16, 3\]"),
    ([[V, V]], [[FRAMES[0], FRAMES[2][0]]], "Sample 0, video or image 1: "),
  ],
)
def test_what_does_not_fit_is_named(vlm, ids, media, message):
  for call in (vlm.logits, vlm.generate_ids):
    with pytest.raises(UserError, match=message):
      call(ids, media)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"temperature": -1.0}, "temperature must be 0"),
    ({"top_p": 0.0}, "top_p must lie above 0"),
    ({"seed": [1, 2]}, "one number or one a prompt"),
  ],
)
def test_options_out_of_range(vlm, options, message):
  with pytest.raises(UserError, match=message):
    vlm.generate_ids([[1]], [None], **options)


def test_nothing_gives_nothing(vlm):
  assert vlm.logits([], []) == []
  assert vlm.generate_ids([], []) == []


# --- Folders, and text ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("api")
  for name, count in (("a.mp4", 8), ("b.mp4", 20)):
    write_video(folder / name, VideoSpec(num_frames=count))
  sf.save(sf.VLM(make_export()), folder / "model")
  return folder


@pytest.mark.parametrize("format", ["orbax", "huggingface"])
def test_a_saved_model_is_the_same(vlm, together, tmp_path, format):
  sf.save(vlm, tmp_path / "model", format=format)
  again = sf.load(tmp_path / "model")
  assert again.config == vlm.config == CONFIG
  assert again.config.num_params == sum(x.size for x in flatten(vlm.export.params).values())
  for one, other in zip(together, again.logits(IDS, FRAMES)):
    np.testing.assert_array_equal(one, other)


def test_a_mesh_changes_nothing(together, folder):
  wide = sf.load(folder / "model", mesh=make_mesh({"fsdp": 2, "tensor": 2, "data": 2}))
  for one, other in zip(together, wide.logits(IDS, FRAMES)):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_half_precision_is_near(vlm, folder):
  half = sf.load(folder / "model", dtype="bfloat16")
  (scores,), (expected,) = half.logits(IDS[:1], FRAMES[:1]), vlm.logits(IDS[:1], FRAMES[:1])
  assert scores.dtype == np.float32
  assert 1e-4 < np.abs(scores - expected).max() < 0.1 * np.abs(expected).max()


def test_a_format_that_there_is_not(vlm, tmp_path):
  with pytest.raises(UserError, match="format must be one of .* got 'onnx'"):
    sf.save(vlm, tmp_path, format="onnx")


def test_chat_about_files(folder):
  vlm = sf.load(folder / "model")
  question, videos = "What was it?", [folder / "a.mp4", folder / "b.mp4"]
  pieces = list(vlm.stream(videos[0], question, 12))
  assert len(pieces) > 1
  reply = vlm.chat(videos[0], question, 12)
  assert reply == "".join(pieces)
  session = vlm.engine.encode(read_video(videos[0], vlm.export).images)
  assert reply == vlm.engine.answer([question], [session], 12)[0]
  about_both = vlm.chat(videos, "First <video> and then <video>?", 12)
  assert about_both not in (reply, vlm.chat(None, "First and then?", 12))
  assert vlm.chat(videos[0], question, 12, temperature=1.0, seed=1) == vlm.chat(
    videos[0], question, 12, temperature=1.0, seed=1
  )
  vlm.engine.max_length = 30
  with pytest.raises(UserError, match="positions, 16 of them for videos .* has 30"):
    vlm.chat(videos[0], question)


def test_without_a_tokenizer_ids_work(vlm, together, folder):
  mute = sf.VLM(dataclasses.replace(make_export(), tokenizer=None))
  mute.engine.stop_ids = NEVER
  np.testing.assert_array_equal(mute.logits(IDS, FRAMES)[0], together[0])
  assert mute.generate_ids(IDS[:1], FRAMES[:1], 4) == vlm.generate_ids(IDS[:1], FRAMES[:1], 4)
  with pytest.raises(UserError, match="no tokenizer"):
    mute.chat(folder / "a.mp4", "What was it?")


def test_importing_the_package_does_not_import_jax():
  code = "import sys, slowfast_jax; assert 'jax' not in sys.modules; slowfast_jax.load"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
