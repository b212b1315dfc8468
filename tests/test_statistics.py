"""Spatio-temporal statistics: labels against a slow reference of their own, by hand, and under a mirror."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import semi_supervised_digits, statistics_digits, statistics_ucf101
from cover_jax.experiment import build as experiments
from cover_jax.objectives import regions, statistics
from cover_jax.runtime import keys
from data_pipelines.contract import SourceInfo, UserError
from tests import tiny
from tests.pretext_runs import check_resumes, check_shards, first_losses
from tests.test_vtdl import start

RESNET = {'name': 'resnet3d', 'depths': (1, 1, 1, 1), 'widths': (4, 4, 8, 8), 'kind': 'r3d'}
SIZE = (112, 112)


def config(**changes):
  options = {k.removeprefix('own__'): changes.pop(k) for k in list(changes) if k.startswith('own__')}
  model = changes.pop('model', None)
  c = tiny.config(**changes)
  if model:
    c.model = model
  c.streams.video.objective = {'name': 'statistics', 'motion_source': 'normal_flow', **options}
  return c


# ---- A reference: pixels one by one, in double precision.


def places(pattern, number):
  """The pixels (y, x) of a region of 112 x 112, by counting; `number` from 1."""
  found = []
  for y in range(112):
    for x in range(112):
      if pattern == 1:
        inside = (y // 28) * 4 + x // 28 + 1 == number
      elif pattern == 2:
        edges = [(42, 70), (28, 84), (14, 98), (0, 112)]
        box = lambda low, high, y=y, x=x: low <= y < high and low <= x < high
        inside = box(*edges[number - 1]) and not (number > 1 and box(*edges[number - 2]))
      else:
        quadrant = (number - 1) // 2
        top, left = quadrant // 2 * 56, quadrant % 2 * 56
        row, column = y - top, x - left
        inside = 0 <= row < 56 and 0 <= column < 56
        first = number % 2 == 1
        if quadrant in (0, 3):
          inside = inside and (row >= column if first else row <= column)
        else:  # columns are counted from the right
          column = 55 - column
          inside = inside and (row <= column if first else row >= column)
      if inside:
        found.append((y, x))
  return found


PLACES = {p: [tuple(np.array(places(p, n + 1)).T) for n in range(count)] for p, count in regions.REGIONS.items()}


def reference_boundary(maps_TxHxW):
  """Along x and y, [T, H, W] each, by sums over the 9 neighbours of each pixel; a mirrored kernel."""
  padded = np.pad(maps_TxHxW.astype(np.float64), [(0, 0), (1, 1), (1, 1)], mode='symmetric')
  height, width = maps_TxHxW.shape[1:]
  dx, dy = np.zeros(maps_TxHxW.shape), np.zeros(maps_TxHxW.shape)
  kernel = np.array([[-1, 0, 1]] * 3)
  for i in range(3):
    for j in range(3):
      part = padded[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width]
      dx += kernel[i, j] * part
      dy += kernel.T[i, j] * part
  return dx, dy


def reference_motion(maps_TxHxWxC, used=None):
  """(14 or 7 ids) of one clip."""
  count = maps_TxHxWxC.shape[-1]
  changes = [reference_boundary(maps_TxHxWxC[..., c]) for c in range(count)]
  ids = []
  for pattern, all_places in PLACES.items():
    for dx, dy in changes:
      dx, dy = dx.sum(axis=0), dy.sum(axis=0)
      length, angle = np.hypot(dx, dy), np.degrees(np.arctan2(dy, dx)) % 360
      sums = [length[p].sum() / (len(p[0]) if pattern == 2 else 1) for p in all_places]
      if pattern == 1 and max(sums) == 0:
        ids += [0, 0]
        continue
      best = int(np.argmax(sums))
      histogram = [0.0] * 8
      for m, a in zip(length[all_places[best]], angle[all_places[best]], strict=True):
        low = int(a // 45) % 8
        histogram[low] += m * (1 - a % 45 / 45)
        histogram[(low + 1) % 8] += m * (a % 45 / 45)
      ids += [best + 1, int(np.argmax(histogram)) + 1]
  for dx, dy in changes:
    ids.append(int(np.argmax([np.hypot(*xy).sum() for xy in zip(dx[:used], dy[:used], strict=True)])) + 1)
  return ids


def octant(r, g, b):
  table = [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
  return table.index((r >= 128, g >= 128, b >= 128)) + 1


def reference_colour(pixels, exact):
  """Of pixels [N, 3]."""
  if exact:
    counts = collections.Counter((b, g, r) for r, g, b in pixels.tolist())
    b, g, r = min(counts, key=lambda code: (-counts[code], code))
    return octant(r, g, b)
  counts = collections.Counter(octant(*p) for p in pixels.tolist())
  return min(counts, key=lambda k: (-counts[k], k))


def ring_pixels(clip):
  """The pixels that the release counts for the second ring: the lower strip has the early frames instead."""
  block = clip[:, 28:84, 28:84].copy()
  block[:, 14:42, 14:42] = 0
  parts = [block[:, :14], block[:, 14:42, :14], block[:, 14:42, -14:], block[:-14]]
  return np.concatenate([p.reshape(-1, 3) for p in parts])


def reference_appearance(clip, exact=False, ring=False, bins=256):
  """13 ids of one clip [T, 112, 112, 3]."""
  ids = []
  for pattern, all_places in PLACES.items():
    overlaps = []
    for y, x in all_places:
      ratio = 0
      for c in range(3):
        counts = np.array([np.bincount(f[y, x, c] // (256 // bins), minlength=bins) for f in clip])
        ratio += counts.min(axis=0).sum() / counts.max(axis=0).sum() / 3
      overlaps.append(round(ratio, 12))
    for best in (int(np.argmin(overlaps)), int(np.argmax(overlaps))):
      y, x = all_places[best]
      pixels = ring_pixels(clip) if ring and (pattern, best) == (2, 1) else clip[:, y, x].reshape(-1, 3)
      ids += [best + 1, reference_colour(pixels, exact)]
  return [*ids, reference_colour(clip.reshape(-1, 3), exact)]


def random_clip(seed, frames=4):
  """Blocks of random colours, of which some change: uint8 [T, 112, 112, 3]."""
  rng = np.random.default_rng(seed)
  small = np.repeat(rng.integers(0, 256, (1, 28, 28, 3)), frames, axis=0)
  change = rng.random((frames, 28, 28, 1)) < rng.random((1, 28, 28, 1)) ** 3
  small = np.where(change, rng.integers(0, 256, small.shape), small)
  return small.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)


# ---- Regions.


def test_regions():
  mask = regions.masks(SIZE)
  own = np.zeros((28, *SIZE), bool)
  for r, p in enumerate(p for all_places in PLACES.values() for p in all_places):
    own[r][p] = True
  np.testing.assert_array_equal(mask, own)
  assert mask[:16].sum(axis=(1, 2)).tolist() == [784] * 16 and mask[20:].sum(axis=(1, 2)).tolist() == [1596] * 8
  np.testing.assert_array_equal(regions.masks((224, 224)), mask.repeat(2, axis=1).repeat(2, axis=2))
  for size in ((8, 8), (16, 24), (32, 32), (100, 60)):
    other = regions.masks(size)
    assert other.any(axis=(1, 2)).all() and other[:16].sum(axis=0).tolist() == np.ones(size, int).tolist()
    assert (other[16:20].sum(axis=0) == 1).all() and (other[20:].sum(axis=0) >= 1).all()


# ---- Labels of motion.

jit_motion = jax.jit(regions.motion_labels, static_argnames='one_more')
jit_appearance = jax.jit(regions.appearance_labels, static_argnames=('bins', 'most_frequent', 'other_ring'))


@pytest.mark.parametrize(('components', 'one_more'), [(2, False), (1, False), (2, True)])
def test_motion_is_that_of_the_reference(components, one_more):
  rng = np.random.default_rng(components)
  small = rng.integers(0, 256, (6, 3, 14, 14, components)) * (rng.random((6, 1, 14, 14, 1)) < 0.3)
  maps = small.repeat(8, axis=2).repeat(8, axis=3).astype(np.float32)
  ids, moves = jit_motion(maps, one_more=one_more)
  assert ids.shape == moves.shape == (6, 7 * components) and moves.all()
  expected = [reference_motion(m, used=2 if one_more else 3) for m in maps]
  np.testing.assert_array_equal(ids, expected)
  assert len(np.unique(expected, axis=0)) > 3


def test_boundaries_are_mirrored_and_nothing_where_motion_is_one():
  ramp = np.broadcast_to(np.arange(16.0, dtype=np.float32), (1, 2, 16, 16))[..., None]
  inner = np.asarray(regions.boundaries(ramp))[:, :, 2:-2, 2:-2, 0]
  assert (inner == [-6, 0]).all()
  assert (np.asarray(regions.boundaries(np.swapaxes(ramp, 2, 3)))[:, :, 2:-2, 2:-2, 0] == [0, -6]).all()
  ids, moves = jit_motion(np.full((1, 3, *SIZE, 2), 140.0, np.float32))
  assert ids.tolist() == [[0] * 4 + [1] * 10] and not moves.any()  # as the release has them
  # A flow that grows to the right has the direction of the release, turned by 180 degrees: the fifth of 8.
  zoom = np.broadcast_to(np.arange(112.0, dtype=np.float32)[:, None], (1, 3, *SIZE, 1))
  ids, _ = jit_motion(zoom)
  assert ids[0, 1] == ids[0, 3] == ids[0, 5] == 5
  ids, _ = jit_motion(np.swapaxes(zoom, 2, 3))
  assert ids[0, 1] == 7  # 270 degrees


def test_camera_motion_and_motion_that_takes_turns_cancel():
  """The sum over time is of changes with their signs."""
  rng = np.random.default_rng(0)
  still = rng.integers(0, 9, (1, 1, *SIZE, 2)).astype(np.float32)
  ids, moves = jit_motion(np.concatenate([still, -still], axis=1))
  assert ids[0, :12].tolist() == [0] * 4 + [1] * 8 and not moves[0, :12].any() and moves[0, 12:].all()


def square(frames=5, step=2, top=32, left=28):
  ground = np.random.default_rng(1).integers(20, 80, (*SIZE, 1))  # flow spreads over what has no texture
  clip = np.broadcast_to(ground, (1, frames, *SIZE, 3)).astype(np.uint8)
  texture = np.random.default_rng(0).integers(120, 256, (20, 20, 1))
  for t in range(frames):
    clip[0, t, top : top + 20, left + step * t : left + step * t + 20] = texture
  return clip


@pytest.mark.parametrize('source', [pytest.param('flow', marks=pytest.mark.slow), 'normal_flow', 'frame_difference'])
def test_a_square_that_moves(source):
  """In the second cell of the second row: id 6; the third ring has it, and the upper triangle of the first quadrant."""
  maps = jax.jit(statistics.motion_maps, static_argnums=1)(square(), source)
  ids, moves = jax.device_get(jit_motion(maps))
  assert ids[0, 0] == 6 and moves[0, 0]
  if source != 'frame_difference':
    assert np.abs(np.asarray(maps)[0, :, :20]).max() <= 1  # nothing moves there
  still, moves = jit_motion(jax.jit(statistics.motion_maps, static_argnums=1)(square(step=0), source))
  assert still.tolist() == [([0, 0] * (still.shape[1] // 7) + [1] * 99)[: still.shape[1]]] and not moves.any()


# Ids of a mirrored clip: columns of the grid, triangles (in the upper quadrants and the lower ones), angles.
CELL = [0] + [4 * ((i - 1) // 4) + 4 - (i - 1) % 4 for i in range(1, 17)]
TRIANGLE = [0, 4, 3, 2, 1, 8, 7, 6, 5]


def test_a_mirror_mirrors_labels():
  """u is negated and its x derivative is not, v the other way round: angles a become -a and 180 - a."""
  rng = np.random.default_rng(3)
  maps = (rng.integers(-100, 100, (50, 2, 14, 14, 2)) * (rng.random((50, 1, 14, 14, 1)) < 0.3)).astype(np.float32)
  maps = maps.repeat(8, axis=2).repeat(8, axis=3)
  ids, other = (np.asarray(jit_motion(m)[0]) for m in (maps, maps[:, :, :, ::-1] * np.float32([-1, 1])))
  flip_u = [0] + [(8 - k) % 8 + 1 for k in range(8)]
  flip_v = [0] + [(4 - k) % 8 + 1 for k in range(8)]
  for pattern, at in ((1, 0), (2, 4), (3, 8)):
    table = {1: CELL, 2: range(5), 3: TRIANGLE}[pattern]
    for c, flip in enumerate((flip_u, flip_v)):
      where, angle = ids[:, at + 2 * c], ids[:, at + 2 * c + 1]
      assert np.mean(other[:, at + 2 * c] == np.take(table, where)) > 0.95  # triangles share a line: a tie may turn
      same = other[:, at + 2 * c] == np.take(table, where)
      assert np.mean(other[same, at + 2 * c + 1] == np.take(flip, angle[same])) > 0.95
  np.testing.assert_array_equal(ids[:, 12:], other[:, 12:])


def test_flow_as_the_release_has_it():
  flow = np.array([-30, -20, -0.07, 0, 0.07, 0.09, 1, 20, 30], np.float32)
  assert np.asarray(regions.steps_of_flow(flow))[2:7].tolist() == [0, 0, 0, 1, 6]
  assert np.abs(np.asarray(regions.steps_of_flow(flow)) * 40 / 255 - np.clip(flow, -20, 20)).max() <= 20 / 255 + 1e-5
  clip = square()
  of = lambda x, mirrored=None: np.asarray(statistics.motion_maps(x, 'normal_flow', mirrored))
  # With 'flip', a mirrored clip has the flow of the clip, mirrored in place alone.
  mirrored = of(clip[:, :, :, ::-1], jnp.array([True]))
  assert np.abs(mirrored - of(clip)[:, :, :, ::-1]).max() <= 1
  assert np.abs(of(clip[:, :, :, ::-1]) - of(clip)[:, :, :, ::-1])[..., 0].max() > 3


# ---- Labels of appearance.


@pytest.mark.parametrize('options', [
  {'bins': 32}, {'most_frequent': True, 'other_ring': True},
  pytest.param({}, marks=pytest.mark.slow), pytest.param({'most_frequent': True}, marks=pytest.mark.slow),
  pytest.param({'other_ring': True}, marks=pytest.mark.slow),
])  # fmt: skip
def test_appearance_is_that_of_the_reference(options):
  frames = 16 if 'other_ring' in options else 4
  clips = np.stack([random_clip(seed, frames) for seed in range(3)])
  if 'other_ring' in options:  # the second ring differs most and least
    clips[0, :, :28], clips[0, :, 84:] = clips[0, :1, :28], clips[0, :1, 84:]
    clips[1, :, 28:42, 28:84] = clips[1, :1, 28:42, 28:84]
    clips[1, :, 42:84, 28:84] = clips[1, :1, 42:84, 28:84]
    clips[1, :, 42:70, 42:70] = np.random.default_rng(0).integers(0, 256, (frames, 28, 28, 3))
    clips[1, :, 70:84, 28:84] = [250, 250, 250]  # the strip that the release leaves out
  expected = [
    reference_appearance(c, options.get('most_frequent', False), 'other_ring' in options, options.get('bins', 256))
    for c in clips
  ]
  ids = jit_appearance(clips, **options)
  np.testing.assert_array_equal(ids, expected)
  if 'other_ring' in options:
    assert 2 in np.array(expected)[:, [4, 6]]
    without = jit_appearance(clips, **{**options, 'other_ring': False})
    assert not np.array_equal(without, expected)


def test_octants():
  colours = [
    (0, 0, 200),
    (0, 200, 200),
    (200, 0, 200),
    (200, 200, 200),
    (0, 0, 0),
    (0, 200, 0),
    (200, 0, 0),
    (200, 200, 0),
  ]
  for i, colour in enumerate(colours):
    for exact in (False, True):
      clip = np.broadcast_to(np.array(colour, np.uint8), (1, 3, 16, 16, 3))
      ids = np.asarray(jit_appearance(clip, most_frequent=exact))
      # Nothing changes: all regions are equal, and the first has the lowest id.
      assert ids.tolist() == [[1, i + 1] * 6 + [i + 1]]
  assert np.asarray(regions.colour_of(np.array([[127, 128, 127], [128, 127, 128]]))).tolist() == [5, 2]


def test_black_counts_as_a_colour():
  clip = np.zeros((1, 3, 16, 16, 3), np.uint8)
  clip[:, :, :, 0] = 255
  assert jit_appearance(clip, most_frequent=True)[0, 12] == 5


# ---- The objective.


def stepped(c):
  """(experiment, params, output of the loss of one batch, the batch)."""
  experiment, _, batches, state, _ = start(c)
  batch = next(batches(0))['video']
  out = jax.jit(experiment.objectives['video'].loss)(state.params, {}, batch, jax.random.key(3))
  return experiment, state.params, jax.device_get(out), batch


def outputs_of(experiment, params, clip):
  """{task: [B, outputs]} by hand."""
  encode = jax.jit(lambda p, x: experiment.encode(p, x, rng=keys.of(jax.random.key(3), 'encode')))
  feature = np.asarray(encode(params['encoder'], clip).tokens_BxTxHxWxD).mean(axis=(1, 2, 3))
  own = params['objectives']['video']
  return {n: feature @ np.asarray(h['Dense_0']['kernel']) + np.asarray(h['Dense_0']['bias']) for n, h in own.items()}


def test_labels_that_do_not_count_are_not_asked():
  """Three clips: one label of two counts, none does (its ids are 0), both do."""
  head = statistics.Classes('flow', ('region', 'direction'), (4, 8))
  logits = np.random.default_rng(0).normal(size=(3, head.outputs)).astype(np.float32)
  ids = np.array([[2, 0], [0, 0], [4, 8]])
  counts = np.array([[True, False], [False, False], [True, True]])
  entropy = lambda z, k: math.log(np.exp(z - z[k - 1]).sum()) / math.log(len(z))
  expected = [entropy(logits[0, :4], 2), 0, (entropy(logits[2, :4], 4) + entropy(logits[2, 4:], 8)) / 2]
  loss_B, measures = head.judge(jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(counts), jnp.ones(3, bool))
  np.testing.assert_allclose(loss_B, expected, rtol=1e-5)
  np.testing.assert_allclose(measures['flow_moves'], [0.5, 0, 1])
  own = np.where(counts, logits[np.arange(3)[:, None], np.maximum(ids - 1, 0) + np.array([0, 4])], np.inf)
  best = np.stack([logits[:, :4].max(axis=1), logits[:, 4:].max(axis=1)], axis=1)
  for i, kind in enumerate(('region', 'direction')):
    np.testing.assert_allclose(measures[f'flow_{kind}_top1'], own[:, i] == best[:, i])


@pytest.mark.parametrize('model', [None, RESNET], ids=['timesformer', 'resnet3d'])
def test_loss_of_classes_by_hand(model):
  c = config(model=model) if model else config(model__drop_path=0.0)
  experiment, params, out, batch = stepped(c)
  clip = jnp.asarray(batch['views']['clip'])
  ids, moves = jax.device_get(jit_motion(jax.jit(statistics.motion_maps, static_argnums=1)(clip, 'normal_flow')))
  target = {'motion': ids, 'appearance': np.asarray(jit_appearance(clip))}
  counts = {
    'motion': [16, 8, 16, 8, 4, 8, 4, 8, 8, 8, 8, 8, 3, 3],
    'appearance': [16, 8, 16, 8, 4, 8, 4, 8, 8, 8, 8, 8, 8],
  }
  outputs = outputs_of(experiment, params, clip)
  total, right = 0, {}
  for name, weight in (('motion', 1), ('appearance', 0.1)):
    assert outputs[name].shape[1] == sum(counts[name])
    parts = np.split(outputs[name].astype(np.float64), np.cumsum(counts[name])[:-1], axis=1)
    used = moves if name == 'motion' else np.ones_like(target[name], bool)
    loss = np.zeros(len(clip))
    right[name] = np.zeros(used.shape)
    for b in range(len(clip)):
      for i, part in enumerate(parts):
        if used[b, i]:
          z, y = part[b], target[name][b, i] - 1
          loss[b] += math.log(np.exp(z - z[y]).sum()) / math.log(len(z)) / used[b].sum()
          right[name][b, i] = z.argmax() == y
    shown = {'motion': 'normal_flow', 'appearance': 'appearance'}[name]
    np.testing.assert_allclose(out.measures[f'{shown}_loss'], loss, rtol=1e-3)
    total = total + weight * loss
  np.testing.assert_allclose(out.measures['loss'], total, rtol=1e-3)
  np.testing.assert_allclose(out.loss, total.mean(), rtol=1e-3)
  by_hand = {
    'normal_flow_region_top1': right['motion'][:, 0:12:2],
    'normal_flow_direction_top1': right['motion'][:, 1:12:2],
    'normal_flow_frame_top1': right['motion'][:, 12:],
    'normal_flow_moves': moves,
    'appearance_region_top1': right['appearance'][:, 0:12:2],
    'appearance_colour_top1': right['appearance'][:, [1, 3, 5, 7, 9, 11, 12]],
  }
  for name, value in by_hand.items():
    np.testing.assert_allclose(out.measures[name], value.mean(axis=1), atol=1e-6)
  assert out.measures.keys() == {*by_hand, 'loss', 'normal_flow_loss', 'appearance_loss'}
  assert (out.statistics is None) == (model is None)


@pytest.mark.parametrize('released', [(), ('start',)])
def test_loss_of_ids_by_hand(released):
  c = config(own__target_mode='regress', own__released=released, model__drop_path=0.0)
  experiment, params, out, batch = stepped(c)
  clip = jnp.asarray(batch['views']['clip'])
  maps = jax.jit(statistics.motion_maps, static_argnums=1)(clip, 'normal_flow')
  target = {'motion': np.asarray(jit_motion(maps)[0]), 'appearance': np.asarray(jit_appearance(clip))}
  start_ = {
    'motion': np.array([8.5, 4.5, 8.5, 4.5, 2.5, 4.5, 2.5, 4.5, 4.5, 4.5, 4.5, 4.5, 2, 2]),
    'appearance': np.array([8.5, 4.5, 8.5, 4.5, 2.5, 4.5, 2.5, 4.5, 4.5, 4.5, 4.5, 4.5, 4.5]),
  }
  outputs = outputs_of(experiment, params, clip)
  loss = {}
  for name, shown in (('motion', 'normal_flow'), ('appearance', 'appearance')):
    told = outputs[name] + (0 if released else start_[name])
    loss[name] = ((told - target[name]) ** 2).mean(axis=1)
    np.testing.assert_allclose(out.measures[f'{shown}_loss'], loss[name], rtol=1e-3)
    spread = ((target[name] - target[name].mean(axis=0)) ** 2).mean(axis=1)
    np.testing.assert_allclose(out.measures[f'{shown}_spread'], spread, rtol=1e-4)
  np.testing.assert_allclose(out.loss, (loss['motion'] + 0.1 * loss['appearance']).mean(), rtol=1e-3)


def test_mean_ids_of_even_labels_have_the_known_loss():
  """(n ** 2 - 1) / 12 a label: 8.88 for the 14 and 7.10 for the 13."""
  expected = {'motion': 8.88, 'appearance': 7.10}
  tasks = {'motion': statistics._motion_classes(2, 15), 'appearance': statistics._appearance_classes()}
  for name, (kinds, counts) in tasks.items():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(np.arange(24 * 15 * 8) % n) + 1 for n in counts], axis=1)
    task = statistics.Ids(name, kinds, counts)
    loss, _ = task.judge(jnp.zeros(ids.shape), jnp.asarray(ids), None, jnp.ones(len(ids), bool))
    assert float(loss.mean()) == pytest.approx(expected[name], abs=0.01)


@pytest.mark.slow
def test_labels_are_of_the_raw_pixels():
  plain, changed = config(), config()
  changed.streams.video.augment = {'color_jitter': {'brightness': 0.9, 'hue': 0.5}, 'random_erasing': {}}
  found = []
  for c in (plain, changed):
    c.streams.video.objective.target_mode = 'regress'
    out = stepped(c)[2]
    found.append([out.measures[f'{n}_spread'] for n in ('normal_flow', 'appearance')])
  np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize(('options', 'heads'), [
  ({'motion_weight': 0.0}, {'appearance': 112}), ({'appearance_weight': 0.0}, {'motion': 110}),
  ({'motion_source': 'frame_difference'}, {'appearance': 112, 'motion': 55}),
  ({'target_mode': 'regress', 'motion_source': 'flow'}, {'appearance': 13, 'motion': 14}),
])  # fmt: skip
def test_heads_are_of_what_is_asked(options, heads):
  _, params, out, _ = stepped(config(**{f'own__{k}': v for k, v in options.items()}))
  own = params['objectives']['video']
  assert {n: h['Dense_0']['kernel'].shape[1] for n, h in own.items()} == heads and np.isfinite(out.loss)
  source = options.get('motion_source', 'normal_flow')
  assert (f'{source}_loss' in out.measures) == ('motion' in heads)


def all_released(**changes):
  return config(
    own__target_mode='regress',
    own__released=statistics.RELEASED,
    streams__video__num_frames=3,
    model__num_frames=3,
    **changes,
  )


def test_the_releases_departures_together():
  run = experiments.build(all_released(), infos())
  objective = run.objectives['video']
  assert objective.targets == ('flip',) and objective.encoded == {'clip': (3, *run.streams['video'].size)}
  starts = set()
  for seed in range(60):
    frames = objective.views(6, np.random.default_rng(seed))['clip']
    assert np.diff(frames).tolist() == [1, 1, 1] and frames.min() >= 0
    starts.add(int(frames[0]))
  assert starts == {0, 1, 2} and objective.views(6, None)['clip'].tolist() == [1, 2, 3, 4]
  with pytest.raises(UserError, match=r'the video has 3 frames, .* need 4 one after the other'):
    objective.views(3, None)
  *_, out, batch = stepped(all_released())
  assert batch['views']['clip'].shape[1] == 4 and np.isfinite(out.loss)


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['classify', 'regress'])
def test_it_learns_one_batch(mode):
  losses = first_losses(config(model__drop_path=0.0, own__target_mode=mode), 60)
  assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize('model', [None, RESNET])
def test_sharded_is_unsharded(model):
  check_shards(lambda **changes: config(model=model, **changes))


@pytest.mark.slow
def test_departures_sharded_are_unsharded():
  check_shards(lambda **changes: all_released(own__motion_source='flow', **changes))


@pytest.mark.slow
def test_resumed_is_uninterrupted(tmp_path):
  text = check_resumes(config(total_steps=6, checkpoint_every=3, log_every=2), tmp_path)
  assert 'train/video/acts/normal_flow_region_top1' in text and 'train/video/moves/appearance_loss' in text


# ---- Mistakes.


def infos():
  return [SourceInfo(s.name, s.modality, s.num_examples, s.class_names) for s in tiny.sources()]


@pytest.mark.parametrize(('options', 'message'), [
  ({'target_mode': 'both'}, 'target_mode'), ({'motion_source': 'lucas'}, 'motion_source'), ({'bins': 100}, 'bins'),
  ({'motion_weight': -1.0}, 'motion_weight'), ({'released': ('speed',)}, 'released'), ({'pool': 'max'}, 'pool'),
  ({'motion_weight': 0.0, 'appearance_weight': 0.0}, 'nothing is asked'),
  ({'released': ('ring',)}, "has 'ring', a slip .* add 'colour'"),
  ({'released': ('flip',), 'motion_source': 'frame_difference'}, 'have no direction'),
  ({'released': ('frames',), 'motion_weight': 0.0}, "has 'frames', but motion_weight is 0"),
  ({'released': ('colour',), 'appearance_weight': 0.0}, "has 'colour', but appearance_weight is 0"),
  ({'released': ('start',)}, "'start', which is about ids"),
])  # fmt: skip
def test_mistakes_in_options(options, message):
  with pytest.raises(UserError, match=message):
    experiments.build(config(**{f'own__{k}': v for k, v in options.items()}), infos())


def test_images_and_small_frames_are_refused():
  c = config()
  c.streams.image.objective = {'name': 'statistics'}
  with pytest.raises(UserError, match=r'streams.image.num_frames is 1: the statistics .* not images'):
    experiments.build(c, infos())
  c = config(model__patch_size=4, streams__video__size=4)
  with pytest.raises(UserError, match='size is 4 x 4: the 28 regions'):
    experiments.build(c, infos())


@pytest.mark.parametrize('variant', ['', 'debug'])
@pytest.mark.parametrize('module', [statistics_digits, statistics_ucf101])
def test_configs_build(module, variant):
  c = module.get_config(variant)
  run = experiments.build(c, [SourceInfo(name, 'video', 500, ()) for name in c.sources])
  assert [type(o).__name__ for o in run.objectives.values()] == ['Objective']
  if module is statistics_ucf101:
    assert c.optimizer.learning_rate_rules[0] == ('bias$', 2.0)


def test_beside_labels_it_is_one_line():
  c = semi_supervised_digits.get_config()
  name, options = next((n, s) for n, s in c.streams.items() if s.objective.name != 'classification')
  c.streams[name] = statistics_digits.stream(options.sources[0])
  known = [SourceInfo(s, 'video', 500, () if s in options.sources else ('a', 'b')) for s in c.sources]
  assert len(experiments.build(c, known).objectives) == len(c.streams)
