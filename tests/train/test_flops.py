# SPDX-License-Identifier: Apache-2.0
"""FLOPs by formula are those that XLA counts in the program; MFU knows its chips."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from slowfast_jax.data.packing import collate, empty_row
from slowfast_jax.models.lora import LoraConfig
from slowfast_jax.models.presets import PRESETS, build_config
from slowfast_jax.models.slowfast import abstract_params, graphdef_of
from slowfast_jax.train.flops import model_flops, peak_flops, training_flops
from slowfast_jax.train.plan import geometry_of

DATA = {"num_frames": 8, "decoder_length": 256, "text_bound": 64}
EVERYTHING = ("vision", "projector", "decoder", "adapters")


def model(vision):
  """Every scan over layers has one layer, for XLA counts the body of a loop once."""
  decoder = {
    "vocab_size": 512, "width": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 32, "mlp_width": 256,
  }  # fmt: skip
  hybrid = {"every": 2, "min_depth": 0, "max_depth": 2}
  return build_config("demo", {"vision": vision, "decoder": decoder, "hybrid": hybrid})


VIT = {"image_size": 64, "patch_size": 8, "width": 128, "num_layers": 1, "num_heads": 4}
CONVNEXT = {"family": "convnext", "image_size": 64, "depths": (1, 1), "widths": (64, 128)}
MODELS = {
  "vit": model(VIT | {"mlp_width": 256}),
  "clip": model(VIT | {"mlp_width": 256, "family": "clip"}),
}
MODELS["lora"] = dataclasses.replace(MODELS["vit"], lora=LoraConfig(rank=64, alpha=1.0))


def flops_of(cfg):
  geometry = geometry_of(cfg, DATA)
  return geometry, model_flops(cfg, fast_frames=geometry.max_fast_frames, **DATA)


def counted_by_xla(cfg, geometry, wrap):
  row = jax.tree.map(jnp.asarray, collate([empty_row(geometry)]))
  params = abstract_params(cfg)

  def loss(params):
    merged = nnx.merge(graphdef_of(cfg), params)
    return jnp.sum(merged.decoder.logits(merged(row)))

  return jax.jit(wrap(loss)).lower(params).cost_analysis()["flops"]


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_what_xla_counts(name):
  geometry, flops = flops_of(MODELS[name])
  # XLA also counts norms, softmax and activations: some per cent where the model is this narrow.
  counted = counted_by_xla(MODELS[name], geometry, lambda loss: loss)
  assert sum(flops.values()) == pytest.approx(counted, rel=0.06)


def test_training_is_what_xla_counts():
  geometry, flops = flops_of(MODELS["vit"])
  counted = counted_by_xla(MODELS["vit"], geometry, jax.grad)
  assert sum(training_flops(flops, EVERYTHING).values()) == pytest.approx(counted, rel=0.06)


def test_parts_that_stay_as_they_are_cost_less():
  flops = dict.fromkeys(flops_of(MODELS["vit"])[1], 1.0)
  assert set(training_flops(flops, EVERYTHING).values()) == {3.0}
  # The encoder needs no gradient at all, the language model only that of its inputs.
  first_stage = training_flops(flops, ("projector", "adapters"))
  assert first_stage == {
    "vision": 1.0, "projector": 3.0, "compressor": 3.0, "decoder": 2.0, "cross_attention": 3.0,
    "vocabulary": 2.0,
  }  # fmt: skip
  assert training_flops(flops, ("adapters",))["projector"] == 1.0


def test_adapters_save_the_gradient_of_the_decoder():
  flops = training_flops(flops_of(MODELS["lora"])[1], ("lora", "adapters"))
  all_learn = training_flops(flops_of(MODELS["vit"])[1], EVERYTHING)
  assert flops["decoder"] == pytest.approx(all_learn["decoder"] * 2 / 3)
  assert flops["lora"] > 0


def test_slow_frames_cost_cross_attention_and_no_decoder():
  cfg = MODELS["vit"]
  few = flops_of(cfg)[1]
  many = model_flops(cfg, fast_frames=2, **DATA | {"num_frames": 16})
  assert many["decoder"] == few["decoder"]
  assert many["cross_attention"] == pytest.approx(2 * few["cross_attention"], rel=0.01)
  assert (
    model_flops(dataclasses.replace(cfg, hybrid=None), fast_frames=2, **DATA)["cross_attention"]
    == 0
  )


def test_the_released_model_reads_128_frames_for_two_per_cent_of_prefill():
  """19.00 and 19.37 TFLOP of the language model: what compiled programs have."""
  name = next(name for name in PRESETS if "7b" in name and "128" in name)
  cfg = PRESETS[name]
  flops = model_flops(cfg, num_frames=128, decoder_length=1396, text_bound=100, fast_frames=16)
  language = flops["decoder"]
  assert language == pytest.approx(19.0e12, rel=0.03)
  assert flops["cross_attention"] / language == pytest.approx(0.0192, abs=0.002)


@pytest.mark.parametrize(
  ("kind", "tera"),
  [
    ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v6 lite", 918),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989),
  ],
)  # fmt: skip
def test_known_chips_have_a_peak(kind, tera):
  assert peak_flops(kind) == tera * 1e12


def test_a_cpu_has_none():
  assert peak_flops("cpu") is None
