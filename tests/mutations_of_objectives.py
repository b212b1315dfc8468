"""Faults of the self-supervised objectives; see tests/mutations.py."""

from tests.mutations import Mutation

MUTATIONS = {
  'HDC: keys of the other task': Mutation(
    'cover_jax/objectives/hdc.py',
    "TASKS = {'spatial': Task('spatial', False, False)",
    "TASKS = {'spatial': Task('temporal', False, False)",
    'test_hdc.py::test_loss_by_hand',
  ),
  'HDC: weights of the levels the other way round': Mutation(
    'cover_jax/objectives/hdc.py',
    'WEIGHTINGS[weighting] * jax.lax.stop_gradient(invariance_M) / temperature',
    '-WEIGHTINGS[weighting] * jax.lax.stop_gradient(invariance_M) / temperature',
    'test_hdc.py::test_weights_of_the_levels',
  ),
  'HDC: a margin that forgets the queue': Mutation(
    'cover_jax/objectives/hdc.py',
    "result.negatives[0] if estimator == 'margin' else 0.0",
    '0.0',
    'test_hdc.py::test_margin_is_less_the_queue',
  ),
  'HDC: colours of the temporal key stay': Mutation(
    'cover_jax/objectives/hdc.py',
    "strong(keys.of(rng, f'key {name}'), clip) if tasks[name].strong else clip",
    'clip',
    'test_hdc.py::test_strong_changes_reach_the_temporal_key_and_nothing_else',
  ),
  'HDC: a shuffled clip may be the clip': Mutation(
    'cover_jax/objectives/hdc.py',
    'jnp.where(either_B[:, None], jnp.roll(same, -1), order_BxT)',
    'order_BxT',
    'test_hdc.py::test_shuffled_is_neither_the_clip_nor_its_reverse',
  ),
  'HDC: the hard negatives are left out': Mutation(
    'cover_jax/objectives/hdc.py',
    'if hard and vectors_BxVxD.shape[1] > 1:',
    'if False:',
    'test_hdc.py::test_loss_by_hand',
  ),
  'statistics: ids from one': Mutation(
    'cover_jax/objectives/statistics.py',
    'jnp.maximum(id_BxN[:, i] - 1, 0)',
    'jnp.maximum(id_BxN[:, i], 0)',
    'test_statistics.py::test_loss_of_classes_by_hand',
  ),
  'statistics: entropies of unlike size': Mutation(
    'cover_jax/objectives/statistics.py',
    'axis=-1) / np.log(\n      np.array(self._counts, np.float32)\n    )',
    'axis=-1)',
    'test_statistics.py::test_loss_of_classes_by_hand',
  ),
  'statistics: what stands still is asked where it goes': Mutation(
    'cover_jax/objectives/statistics.py',
    'jnp.where(counts_BxN, entropy_BxN, 0)',
    'entropy_BxN',
    'test_statistics.py::test_labels_that_do_not_count_are_not_asked',
  ),
  'statistics: ids that start at 0': Mutation(
    'cover_jax/objectives/statistics.py',
    '(np.array(counts, np.float32) + 1) / 2',
    '0 * np.array(counts, np.float32)',
    'test_statistics.py::test_loss_of_ids_by_hand',
  ),
  'statistics: every flow is mirrored': Mutation(
    'cover_jax/objectives/statistics.py',
    'flow * np.array([-1.0, 1.0], np.float32), flow)',
    'flow, flow * np.array([-1.0, 1.0], np.float32))',
    'test_statistics.py::test_flow_as_the_release_has_it',
  ),
  'order: a reverse is another order': Mutation(
    'cover_jax/objectives/order_geometry.py',
    'min(tuple(p), tuple(p[::-1])) for p in',
    'tuple(p) for p in',
    'test_order_geometry.py::test_twelve_classes_of_two_orders_each',
  ),
  'order: still videos are asked': Mutation(
    'cover_jax/objectives/order_geometry.py',
    'order_weight * moving_B * entropy_B',
    'order_weight * entropy_B',
    'test_order_geometry.py::test_still_videos_have_no_gradient_of_their_order',
  ),
  'order: parts overlap': Mutation(
    'cover_jax/objectives/order_geometry.py',
    'min(max(low, least), most), min(max(high, least), most)',
    'min(low, most), min(max(high, least), most)',
    'test_order_geometry.py::test_parts',
  ),
  'order: differences have a sign': Mutation(
    'cover_jax/objectives/order_geometry.py',
    'jnp.abs(first - second)',
    'first - second',
    'test_order_geometry.py::test_differences_are_those_of_the_pair',
  ),
  'geometry: weight of the order': Mutation(
    'cover_jax/objectives/order_geometry.py',
    'geometry_weight * huber_B',
    'order_weight * huber_B',
    'test_order_geometry.py::test_weights_of_order_and_geometry',
  ),
  'geometry: rotation the other way': Mutation(
    'cover_jax/objectives/warps.py',
    'xp.stack([cos, cos * shear - sin], -1), xp.stack([sin, sin * shear + cos], -1)',
    'xp.stack([cos, cos * shear + sin], -1), xp.stack([-sin, cos - sin * shear], -1)',
    'test_order_geometry.py::test_signs_of_the_parameters',
  ),
  'geometry: the border repeats': Mutation(
    'cover_jax/objectives/warps.py',
    'jnp.clip(jnp.minimum(away, 2 * span - away), 0, span)',
    'jnp.clip(x - low, 0, span)',
    'test_order_geometry.py::test_warp_against_the_textbook',
  ),
  'V3S: every class from the corner': Mutation(
    'cover_jax/objectives/v3s.py',
    'place_BxN + jnp.minimum(start_B, free_B - 1)[:, None]',
    'place_BxN + 0 * start_B[:, None]',
    'test_v3s.py::test_places_reach_the_whole_window',
  ),
  'V3S: classes in time that have no room': Mutation(
    'cover_jax/objectives/v3s.py',
    'np.flatnonzero(self._needed_C <= video_frames)',
    'np.flatnonzero(self._needed_C <= video_frames + 1)',
    'test_v3s.py::test_classes_in_time_are_drawn_evenly_among_those_with_room',
  ),
  'V3S: time without its weight': Mutation(
    'cover_jax/objectives/v3s.py',
    "{'space': 1.0, 'time': time_weight * (possible_B > 1)}",
    "{'space': 1.0, 'time': 1.0}",
    'test_v3s.py::test_the_class_in_time_has_a_weight',
  ),
  'V3S: slowing down is speeding up': Mutation(
    'cover_jax/objectives/warps.py', 'mirrored[-1] - mirrored[::-1]', 'mirrored', 'test_v3s.py::test_steps'
  ),
  'MoDist: the partner is the clip itself': Mutation(
    'cover_jax/objectives/modist.py',
    "{'other': 'second', 'same': 'first'}",
    "{'other': 'first', 'same': 'first'}",
    'test_modist.py::test_loss_by_hand',
  ),
  'MoDist: motion and vision share a queue': Mutation(
    'cover_jax/objectives/modist.py',
    "state['queues'][term.key[0]]",
    "state['queues']['visual']",
    'test_modist.py::test_loss_by_hand',
  ),
  'MoDist: brighter is darker': Mutation(
    'cover_jax/objectives/modist.py',
    'jnp.stack([jnp.maximum(d, 0), jnp.maximum(-d, 0), jnp.abs(d)], axis=-1)',
    'jnp.stack([jnp.maximum(-d, 0), jnp.maximum(d, 0), jnp.abs(d)], axis=-1)',
    'test_modist.py::test_frame_difference',
  ),
  'MoDist: keys have gradients': Mutation(
    'cover_jax/objectives/modist.py',
    "jax.lax.stop_gradient(moving(teacher['motion'], moves[name], None)[0])",
    "moving(student['motion'], moves[name], None)[0]",
    'test_modist.py::test_gradients_go_where_they_belong',
  ),
  'MoDist: motion of the pictures that are shown': Mutation(
    'cover_jax/objectives/modist.py',
    'motion_shown(raw(batch, name))',
    "motion_shown(batch['views'][name])",
    'test_modist.py::test_motion_is_of_the_raw_pixels_and_without_cross_terms_this_is_moco',
  ),
}
