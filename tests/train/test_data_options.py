# SPDX-License-Identifier: Apache-2.0
"""Training on mixtures, packed rows and steps of several shapes, as the config asks for them."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from slowfast_jax.checkpoints.trees import flatten
from slowfast_jax.data.packing import collate, empty_row
from slowfast_jax.errors import UserError
from slowfast_jax.models.slowfast import graphdef_of
from slowfast_jax.sharding import make_mesh
from slowfast_jax.train import plan
from slowfast_jax.train.lines import read_lines
from slowfast_jax.train.loop import train
from slowfast_jax.train.plan import geometry_of
from slowfast_jax.train.setup import open_setup
from tests.train.tiny_run import record, tiny_config, write_data, write_records

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Videos in `records`, texts in `texts`, and a mixture of both."""
  folder = write_data(tmp_path_factory.mktemp("data"))
  turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]
  text = dataclasses.replace(record(0, num_frames=0), conversations=[turns])
  write_records(folder / "texts", [dataclasses.replace(text, id=f"text{i}") for i in range(8)])
  sources = [{"path": "records", "weight": 1}, {"path": "texts", "weight": 3}]
  (folder / "mix.json").write_text(json.dumps(sources))
  return folder


def config_of(data, *overrides):
  return tiny_config(data, "data.records=", f"data.mixture={data / 'mix.json'}", *overrides)


def test_a_mixture_is_what_the_batches_hold(data):
  setup = open_setup(config_of(data))
  batches = list(itertools.islice(setup.pipeline.iterate(), 25))
  videos = np.concatenate([batch.frame_segments.any(axis=1) for batch in batches])
  assert videos.mean() == pytest.approx(0.25, abs=0.02)
  assert setup.fingerprint["weights"] == [1.0, 3.0]
  assert setup.fingerprint["records"] == setup.pipeline.num_samples == 20


def test_several_folders_are_one_by_size(data):
  both = f"data.records={data / 'records'},{data / 'texts'}"
  setup = open_setup(tiny_config(data, both))
  batches = list(itertools.islice(setup.pipeline.iterate(), 25))
  videos = np.concatenate([batch.frame_segments.any(axis=1) for batch in batches])
  assert videos.mean() == pytest.approx(12 / 20, abs=0.03)


def test_a_run_whose_steps_have_several_shapes(data, tmp_path):
  buckets = "data.buckets=((1,64,56,8),)"  # Texts fit into it, videos do not.
  config = config_of(data, "data.pack=true", buckets, "train.steps=6")
  setup = open_setup(config)
  batches = list(itertools.islice(setup.pipeline.iterate(), 6))
  shapes = {batch.frames.shape for batch in batches}
  assert {shape[1] for shape in shapes} == {1, 4}
  small = next(batch for batch in batches if batch.frames.shape[1] == 1)
  assert small.segments.max() > 1, "texts share rows"
  said = []
  assert train(config, tmp_path / "run", say=said.append) == 0
  assert sum("compiled in" in line for line in said) == 2
  losses = [line["loss"] for line in read_lines(epath.Path(tmp_path / "run/metrics.jsonl"))]
  assert len(losses) == 6
  assert np.isfinite(losses).all()


@pytest.mark.parametrize(
  ("override", "words"),
  [
    ("data.records=here", "data.records and data.mixture are both given"),
    ("data.mixture=/nowhere/mix.json", "mix.json: cannot be read"),
    ("data.mixture=", "data.records is empty"),
    ("data.buckets=((1,2),)", r"data.buckets\[0\] must be .*, got \(1, 2\)"),
  ],
)
def test_what_does_not_fit_is_named(data, override, words):
  with pytest.raises(UserError, match=words):
    open_setup(config_of(data, override))


def test_a_bucket_that_does_not_divide_is_named(data, monkeypatch):
  monkeypatch.setattr(plan, "make_mesh", make_mesh)
  with pytest.raises(UserError, match="must be a multiple of mesh.data x mesh.fsdp = 8, got 3"):
    open_setup(config_of(data, "data.buckets=((1,64,56,3),)"))


@pytest.mark.parametrize("pack", ["true", "false"])
def test_still_images_are_never_pooled_as_videos_are(data, tmp_path, pack):
  stills = [dataclasses.replace(record(i, num_frames=1), id=f"still{i}") for i in range(8)]
  write_records(tmp_path / "stills", stills)
  folders = f"data.records={data / 'records'},{tmp_path / 'stills'}"

  def shown(stride, *more):
    config = tiny_config(data, folders, f"data.pack={pack}", *more).unlock()
    config.model.compressor.update(video_pooling_stride=stride, spatial_stride=1)
    pipeline = open_setup(config).pipeline
    return list(itertools.islice(pipeline.iterate(), 10)), pipeline

  _, pipeline = shown(2)
  assert {failure.id for failure in pipeline.failures} == {one.id for one in stills}
  assert "still image has no place in a row of 4 frames" in pipeline.failures[0].reason

  batches, pipeline = shown(2, "data.buckets=((1,64,56,8),)")
  assert {batch.frames.shape[1] for batch in batches} == {1, 4}
  assert not pipeline.failures
  _, pipeline = shown(1)
  assert not pipeline.failures  # Without pooling one shape is enough.


def test_packed_samples_give_the_logits_and_gradients_that_they_give_alone(data):
  wide = ("data.num_frames=8", "data.decoder_length=320", "data.text_bound=300", "data.pack=true")
  setup = open_setup(config_of(data, *wide))
  pipeline, graphdef = setup.pipeline, graphdef_of(setup.model)
  geometry = geometry_of(setup.model, setup.config.data)
  loaded = [pipeline._load((0, i)).batch for i in range(8)]
  place = next(i for i in range(8) if loaded[i].frame_segments.max() > 1)  # Two videos or more.
  row, (source, numbers) = loaded[place], pipeline.schedule.row(0, place)
  alone = [pipeline._build([pipeline._load_sample(0, source, n)], geometry) for n in numbers]
  apart = collate([one.batch for one in alone])
  row = collate([row, *[empty_row(geometry)] * (len(numbers) - 1)])  # One shape: one program.
  assert row.segments.max() == len(numbers)

  rng = np.random.default_rng(0)  # Gates start shut: a test of them needs noise.
  params = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32),
    setup.abstract_state().params,
  )

  def loss(params, batch):
    model = nnx.merge(graphdef, params)
    logits = model.decoder.logits(model(batch, dtype=jnp.float32))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
    return -jnp.sum(picked[..., 0] * batch.loss_weights), logits

  run = jax.jit(jax.grad(loss, has_aux=True))
  (gradient, logits), (expected_gradient, expected) = run(params, row), run(params, apart)
  at = 0
  for i in range(len(numbers)):
    count = int((apart.segments[i] > 0).sum())
    np.testing.assert_allclose(logits[0, at : at + count], expected[i, :count], rtol=0, atol=1e-5)
    at += count
  ours, theirs = flatten(gradient), flatten(expected_gradient)
  for name, value in ours.items():
    scale = np.abs(theirs[name]).max()
    np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-5 * max(scale, 1), err_msg=name)
