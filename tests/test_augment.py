"""Photometric augmentation: parity with Pillow and with formulas, one draw a clip, the same on many devices."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cover_jax.augment import colour, photometric, rand_augment
from cover_jax.objectives import LossOutput, Objective, augmented
from cover_jax.runtime import sharding
from data_pipelines.clips import affine
from data_pipelines.contract import UserError

B, T, H, W = 4, 3, 24, 20
LEVELS = np.random.default_rng(0).integers(0, 256, (B, T, H, W, 3), np.uint8)
CLIP = LEVELS.astype(np.float32) / 255
EVERYTHING = {
  'color_jitter': {'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.1},
  'grayscale': {'probability': 0.5},
  'gaussian_blur': {'probability': 0.5},
  'rand_augment': {'num_ops': 4, 'magnitude': 9},
  'random_erasing': {'probability': 0.5},
}


def stills(clip=CLIP):
  return np.repeat(clip[:, :1], T, axis=1)


@pytest.mark.parametrize('name', EVERYTHING)
def test_a_clip_that_stands_still_goes_on_standing_still(name):
  change = jax.jit(photometric.make({name: EVERYTHING[name]}, 'here').photometric)
  changed = 0
  for seed in range(2):
    out = np.asarray(change(jax.random.key(seed), stills(LEVELS)))
    assert out.min() >= 0 and out.max() <= 255.001
    np.testing.assert_array_equal(out, np.repeat(out[:, :1], T, axis=1))
    changed += sum(np.abs(out[i] - stills(LEVELS)[i]).max() > 1 for i in range(B))
  assert changed


def test_no_strength_changes_nothing():
  key = jax.random.key(0)
  still = {
    'jitter': photometric.color_jitter(key, CLIP, brightness=0, contrast=0, saturation=0, hue=0),
    'jitter never': photometric.color_jitter(key, CLIP, brightness=0.9, hue=0.5, probability=0),
    'grey never': photometric.grayscale(key, CLIP, 0.0),
    'blur never': photometric.gaussian_blur(key, CLIP, probability=0.0),
    'erase never': photometric.random_erasing(key, CLIP, probability=0.0),
    'no operations': rand_augment.photometric(key, CLIP, num_ops=0),
  }
  for name, out in still.items():
    np.testing.assert_array_equal(out, CLIP, err_msg=name)
  assert photometric.make({}, 'here').photometric is None


def test_each_clip_has_its_own_draw_and_the_key_decides():
  same = np.repeat(CLIP[:1], B, axis=0)
  change = photometric.make({'color_jitter': EVERYTHING['color_jitter']}, 'here').photometric
  out = np.asarray(change(jax.random.key(1), same))
  assert all(np.abs(out[i] - out[j]).max() > 0.01 for i in range(B) for j in range(i))
  np.testing.assert_array_equal(out, change(jax.random.key(1), same))
  assert np.abs(out - np.asarray(change(jax.random.key(2), same))).max() > 0.01


def test_many_devices_draw_what_one_draws():
  change = jax.jit(photometric.make(EVERYTHING | {'rand_augment': {'num_ops': 1}}, 'here').photometric)
  levels = np.concatenate([LEVELS, LEVELS[::-1]])
  one = change(jax.random.key(3), levels)
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1})
  many = change(jax.random.key(3), sharding.to_global(levels, mesh))
  np.testing.assert_allclose(one, many, atol=0.01)
  assert not many.sharding.is_fully_replicated


def pil(clip, enhance):
  return np.stack([[np.asarray(enhance(Image.fromarray(frame))) for frame in frames] for frames in clip])


def one_op(name, level, sign=1.0, clip=CLIP):
  op = np.full(len(clip), rand_augment.PHOTOMETRIC.index(name))
  ones = np.ones(len(clip), np.float32)
  return np.asarray(rand_augment.apply(clip, op, level * ones, sign * ones)) * 255


# One frame a clip, so that the statistics of a clip are those of Pillow's image. Pillow rounds; contrast rounds twice.
FRAMES, FRAME_LEVELS = CLIP[:, :1] * 0.7 + 0.1, np.rint((CLIP[:, :1] * 0.7 + 0.1) * 255).astype(np.uint8)


@pytest.mark.parametrize(
  ('name', 'level', 'reference', 'within'),
  [
    ('autocontrast', 0.5, ImageOps.autocontrast, 1),
    ('equalize', 0.5, ImageOps.equalize, 0.01),
    ('invert', 0.5, ImageOps.invert, 0.01),
    ('posterize', 0.5, lambda x: ImageOps.posterize(x, 2), 0.01),
    ('solarize', 0.75, lambda x: ImageOps.solarize(x, 64), 0.01),
    ('solarize_add', 0.5, lambda x: Image.eval(x, lambda v: min(v + 55, 255) if v < 128 else v), 0.01),
    ('color', 0.5, lambda x: ImageEnhance.Color(x).enhance(1.45), 1.5),
    ('contrast', 0.5, lambda x: ImageEnhance.Contrast(x).enhance(1.45), 1.5),
    ('brightness', 0.5, lambda x: ImageEnhance.Brightness(x).enhance(1.45), 1.01),
    ('sharpness', 0.5, lambda x: ImageEnhance.Sharpness(x).enhance(1.45), 1.5),
  ],
)
def test_operations_are_those_of_pillow(name, level, reference, within):
  levels = FRAME_LEVELS
  found = one_op(name, level, clip=levels.astype(np.float32) / 255)
  expected = pil(levels, reference).astype(float)
  assert np.abs(found - expected).max() <= within
  assert np.abs(expected - levels).max() > 10


def test_enhancements_go_both_ways_and_nothing_happens_for_other_numbers():
  for name, reference in (('color', ImageEnhance.Color), ('brightness', ImageEnhance.Brightness)):
    expected = pil(FRAME_LEVELS, lambda x, make=reference: make(x).enhance(0.55))
    assert np.abs(one_op(name, 0.5, -1.0, FRAME_LEVELS / np.float32(255)) - expected).max() <= 1.5
  for op in (-1, len(rand_augment.PHOTOMETRIC), len(rand_augment.PHOTOMETRIC + rand_augment.GEOMETRIC) - 1):
    np.testing.assert_array_equal(rand_augment.apply(CLIP, np.full(B, op), np.ones(B), np.ones(B)), CLIP)


@pytest.mark.parametrize('bits', range(5))
def test_posterize_is_pillows_for_every_number_of_bits(bits):
  expected = ImageOps.posterize(Image.fromarray(LEVELS[0, 0]), bits) if bits else np.zeros((H, W, 3))
  np.testing.assert_allclose(
    np.asarray(rand_augment.posterize(CLIP[0, 0], bits)) * 255, np.asarray(expected), atol=0.01
  )


@pytest.mark.parametrize('kind', ['few levels', 'one level', 'two levels', 'dark'])
def test_equalize_is_pillows_in_its_special_cases(kind):
  rng = np.random.default_rng(1)
  levels = {
    'few levels': rng.choice([3, 90, 91, 255], (B, 1, H, W, 3)),
    'one level': np.full((B, 1, H, W, 3), 77),
    'two levels': rng.choice([0, 255], (B, 1, H, W, 3), p=[0.01, 0.99]),
    'dark': rng.integers(0, 9, (B, 1, H, W, 3)),
  }[kind].astype(np.uint8)
  found = np.asarray(rand_augment.equalize(levels.astype(np.float32) / 255)) * 255
  np.testing.assert_allclose(found, pil(levels, ImageOps.equalize), atol=0.01)


def test_smooth_is_pillows_filter():
  expected = pil(LEVELS, lambda x: x.filter(ImageFilter.SMOOTH)).astype(float)
  assert np.abs(np.asarray(rand_augment.smooth(CLIP)) * 255 - expected).max() <= 0.51


def test_statistics_are_of_the_clip_not_of_the_frame():
  dark_then_bright = np.stack([CLIP[:, 0] * 0.3, CLIP[:, 1] * 0.3 + 0.7], axis=1)
  for name in ('autocontrast', 'equalize', 'contrast'):
    out = one_op(name, 1.0, clip=dark_then_bright)
    assert out[:, 0].mean() < out[:, 1].mean() - 60, name


def test_operations_come_evenly_and_half_of_them_apply():
  count, changed = 600, CLIP[:1, :1, :6, :6]
  clips = np.repeat(changed, count, axis=0)
  out = np.asarray(rand_augment.photometric(jax.random.key(0), clips, num_ops=1, magnitude=9, magnitude_std=0))
  moved = np.abs(out - clips).max(axis=(1, 2, 3, 4)) > 1e-4
  assert moved.mean() == pytest.approx(0.5 * 10 / 15, abs=0.06)
  assert len({o.tobytes() for o in out[moved]}) in (13, 14)  # ten operations, four of them in both directions


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.floats(0, 1)] * 3), st.floats(-0.5, 0.5))
def test_hue_is_that_of_hsv(rgb, turns):
  hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
  expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
  np.testing.assert_allclose(colour.shift_hue(jnp.asarray(rgb), jnp.asarray(turns)), expected, atol=2e-5)


def test_hue_holds_beyond_the_range_of_pixels():
  shifted = colour.shift_hue(CLIP, 0.2)
  np.testing.assert_allclose(colour.shift_hue(3 * CLIP - 1, 0.2), 3 * shifted - 1, atol=2e-5)


def test_jitter_draws_over_the_whole_range():
  grey = np.full((400, 1, 1, 1, 3), 0.5, np.float32)
  factor = np.asarray(photometric.color_jitter(jax.random.key(0), grey, brightness=0.4))[:, 0, 0, 0, 0] / 0.5
  assert factor.min() == pytest.approx(0.6, abs=0.02) and factor.max() == pytest.approx(1.4, abs=0.02)
  wide = np.asarray(photometric.color_jitter(jax.random.key(0), grey, brightness=1.5, clamp=False))
  assert wide.min() >= 0 and wide.max() == pytest.approx(1.25, abs=0.03)
  changed = np.asarray(photometric.color_jitter(jax.random.key(0), grey, brightness=0.4, probability=0.3)) != grey
  assert changed[:, 0, 0, 0, 0].mean() == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize('order', [1, 2])
def test_without_clamp_the_jitter_is_one_affine_map_for_all_frames(order):
  """Differences in time go through the linear part alone; with the mean of each frame they would not."""
  key, jitter = jax.random.key(5), {'brightness': 0.5, 'contrast': 0.5, 'saturation': 0.25, 'clamp': False}
  clip = CLIP * np.linspace(0.5, 1.5, T)[:, None, None, None].astype(np.float32)
  out = photometric.color_jitter(key, clip, **jitter)
  zero = photometric.color_jitter(key, np.zeros_like(clip), **jitter)
  np.testing.assert_allclose(zero, 0, atol=1e-6)
  found = np.diff(out, n=order, axis=1)
  # The linear part, from a clip whose mean grey is zero: contrast is then a factor.
  centred = np.diff(clip, n=order, axis=1)
  pad = np.concatenate([centred, -centred], axis=1)
  np.testing.assert_allclose(np.asarray(photometric.color_jitter(key, pad, **jitter))[:, : T - order], found, atol=1e-5)


def test_greyscale_and_blur():
  grey = np.asarray(photometric.grayscale(jax.random.key(0), CLIP, 1.0)) * 255
  assert np.abs(grey[..., 0] - pil(LEVELS, lambda x: x.convert('L'))).max() <= 1.01
  np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
  flat = np.full((B, T, H, W, 3), 0.3, np.float32)
  np.testing.assert_allclose(photometric.gaussian_blur(jax.random.key(0), flat, probability=1.0), flat, atol=1e-6)
  dot = np.zeros((1, 1, 15, 15, 3), np.float32)
  dot[:, :, 7, 7] = 1
  blurred = np.asarray(photometric.gaussian_blur(jax.random.key(0), dot, probability=1.0, sigma=(1.0, 1.0)))[
    0, 0, ..., 0
  ]
  weight = np.exp(-0.5 * np.arange(-2, 3) ** 2)
  np.testing.assert_allclose(blurred[5:10, 5:10], np.outer(weight, weight) / weight.sum() ** 2, rtol=1e-4)


def test_erasing_fills_one_box_of_the_size_asked_for():
  flat = np.full((200, 2, 40, 40, 3), -1.0, np.float32)
  out = np.asarray(
    photometric.random_erasing(jax.random.key(0), flat, probability=1.0, area=(0.1, 0.3), ratio=(0.5, 2.0))
  )
  np.testing.assert_array_equal(out[:, 0], out[:, 1])
  erased = (out[:, 0] >= 0).all(axis=-1)
  for mask in erased:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and mask.sum() == len(rows) * len(columns)
    assert 0.45 <= len(rows) / len(columns) <= 2.2
  share = erased.mean(axis=(1, 2))
  assert share.min() == pytest.approx(0.1, abs=0.01) and share.max() == pytest.approx(0.3, abs=0.02)
  assert erased[:, 0].any() and erased[:, -1].any() and erased[:, :, 0].any() and erased[:, :, -1].any()


def test_every_view_of_an_objective_is_augmented_by_itself_and_the_rest_is_left_alone():
  seen = {}

  def loss(params, state, batch, rng):
    seen.update(batch)
    return LossOutput(jnp.zeros(()), state, {})

  kind = photometric.make({'color_jitter': {'brightness': 0.5}}, 'here')
  batch = {'views': {'a': LEVELS, 'b': LEVELS}, 'label': np.arange(B), 'source': np.zeros(B, np.int32)}
  augmented(Objective(loss=loss), kind.photometric).loss({}, {}, batch, jax.random.key(0))
  assert seen['label'] is batch['label'] and seen['source'] is batch['source']
  assert np.abs(np.asarray(seen['views']['a']) - np.asarray(seen['views']['b'])).max() > 1
  plain = Objective(loss=loss)
  assert augmented(plain, photometric.make({'mixup': 0.5}, 'here').photometric) is plain


def test_what_belongs_to_whom():
  made = photometric.make({'rand_augment': {'num_ops': 3}, 'mixup': 0.8, 'cutmix': 0}, 'here')
  assert made.geometry == affine.RandAugment(3, 9.0, 0.5) and made.mixing == {'mixup': 0.8}
  assert photometric.make({}, 'here') == photometric.Augment(None, None, {})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'colour_jitter': {}}, "here has no key 'colour_jitter': did you mean 'color_jitter'"),
    ({'color_jitter': {'hues': 0.1}}, "here.color_jitter has no key 'hues': did you mean 'hue'"),
    ({'color_jitter': 0.4}, 'here.color_jitter is 0.4: expected a dict'),
    ({'color_jitter': {'hue': 0.6}}, 'here.color_jitter.hue is 0.6.*at most 0.5'),
    ({'color_jitter': {'brightness': '1'}}, 'brightness'),
    ({'color_jitter': {'clamp': 1}}, 'True or False'),
    ({'grayscale': {}}, "here.grayscale lacks 'probability'"),
    ({'rand_augment': {'magnitude': 11}}, 'magnitude is 11.*at most 10'),
    ({'rand_augment': {'num_ops': 1.5}}, 'num_ops.*whole'),
    ({'gaussian_blur': {'sigma': (2.0, 1.0)}}, 'sigma.*low <= high'),
    ({'random_erasing': {'area': 0.2}}, 'area'),
    ({'mixup': -1.0}, 'here.mixup is -1.0'),
    ({'cutmix': {'x': 1}}, 'here.cutmix'),
    ({'rand_augment': {}, 'color_jitter': {'hue': 0.1, 'clamp': False}}, r'here has color_jitter.*clamp=True'),
  ],
)
def test_mistakes_are_one_sentence(options, message):
  with pytest.raises(UserError, match=message) as error:
    photometric.make(options, 'here')
  assert '\n' not in str(error.value)
