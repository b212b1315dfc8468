"""Faults of the arithmetic, and the tests that must notice them: what tests/test_mutations.py puts into copies."""

from typing import NamedTuple


class Mutation(NamedTuple):
  """A fault: in `file` the only `text` becomes `mutated`, and then `test` must fail: 'file::test', or with '[case]'."""

  file: str
  text: str
  mutated: str
  test: str


_CHAIN, _OPTAX = 'test_optim.py::test_chain_is_what_is_written_out[{}]', 'test_optim.py::test_chain_is_optaxs'
_STEP = 'test_optim.py::test_step_is_what_is_written_out[{}]'

MUTATIONS = {
  # The optimizer.
  'decay negated': Mutation(
    'cover_jax/experiment/optim.py', 'u + config.weight_decay * f * p', 'u - config.weight_decay * f * p', _OPTAX
  ),
  'decay without its rules': Mutation(
    'cover_jax/experiment/optim.py', 'config.weight_decay * f * p', 'config.weight_decay * p', _OPTAX
  ),
  'decay before the scaler': Mutation(
    'cover_jax/experiment/optim.py',
    "chain.append(('decay', optax.stateless(decay)))",
    "chain.insert(-1, ('decay', optax.stateless(decay)))",
    _OPTAX,
  ),
  'no clipping': Mutation(
    'cover_jax/experiment/optim.py',
    'optax.clip_by_global_norm(config.clip_norm)',
    'optax.identity()',
    'test_optim.py::test_clipping_is_by_the_norm_of_all_gradients_and_leaves_short_ones_to_the_bit',
  ),
  'clipping by element': Mutation(
    'cover_jax/experiment/optim.py',
    'optax.clip_by_global_norm(config.clip_norm)',
    'optax.clip(config.clip_norm)',
    'test_optim.py::test_clipping_is_by_the_norm_of_all_gradients_and_leaves_short_ones_to_the_bit',
  ),
  'layer decay off by one': Mutation(
    'cover_jax/experiment/optim.py',
    'np.power(decay, behind)',
    'np.power(decay, behind - 1)',
    _CHAIN.format('sgd-options1'),
  ),
  'embeddings learn as the first block': Mutation(
    'cover_jax/experiment/optim.py',
    'return decay**behind',
    'return decay ** min(behind, 2)',
    _CHAIN.format('sgd-options1'),
  ),
  'no factors of the learning rate': Mutation(
    'cover_jax/experiment/optim.py',
    'lambda u, rate: u * rate, updates',
    'lambda u, rate: u, updates',
    _CHAIN.format('sgd-options1'),
  ),
  'options dropped': Mutation(
    'cover_jax/experiment/optim.py',
    '.make(**config.options)',
    '.make(**dict.fromkeys(config.options, 0.5))',
    _OPTAX,
  ),
  'rules only at the start of a name': Mutation(
    'cover_jax/experiment/optim.py',
    're.search(pattern, name)',
    're.match(pattern, name)',
    'test_train.py::test_weight_decay_and_rates_by_rule',
  ),
  'nothing is frozen': Mutation(
    'cover_jax/experiment/optim.py',
    '_value(rules, name) == 0',
    '_value(rules, name) < 0',
    _STEP.format('frozen parts and padding'),
  ),
  'warm-up one step longer': Mutation(
    'cover_jax/experiment/optim.py', 'main], [warmup])', 'main], [warmup + 1])', 'test_optim.py::test_cosine'
  ),
  'cosine as long as the run': Mutation(
    'cover_jax/experiment/optim.py', 'after = total_steps - warmup', 'after = total_steps', 'test_optim.py::test_cosine'
  ),
  'cosine to zero': Mutation(
    'cover_jax/experiment/optim.py', 'alpha=config.final_fraction', 'alpha=0.0', 'test_optim.py::test_cosine'
  ),
  'steps down counted from the warm-up': Mutation(
    'cover_jax/experiment/optim.py',
    'round(epoch * steps_per_epoch) - warmup',
    'round(epoch * steps_per_epoch)',
    'test_optim.py::test_steps_down_at_whole_epochs_whatever_the_warmup',
  ),
  # The step.
  'weights of the streams dropped': Mutation(
    'cover_jax/training/step.py',
    'experiment.streams[name].loss_weight * out.loss',
    'out.loss',
    _STEP.format('sgd, weighted streams'),
  ),
  'average warms up otherwise': Mutation(
    'cover_jax/training/step.py', '(10.0 + step)', '(11.0 + step)', _STEP.format('adam, shares of the mixture')
  ),
  'average the wrong way round': Mutation(
    'cover_jax/training/step.py',
    'averaged, 1.0 - decay',
    'averaged, decay',
    _STEP.format('adam, shares of the mixture'),
  ),
  'every step draws the same': Mutation(
    'cover_jax/training/step.py',
    'jax.random.fold_in(jax.random.key(config.seed), state.step)',
    'jax.random.key(config.seed)',
    'test_measures.py::test_every_step_stream_microbatch_and_seed_draws_its_own_numbers',
  ),
  'learning rate of the next step is logged': Mutation(
    'cover_jax/training/records.py',
    'schedule(step - 1)',
    'schedule(step)',
    'test_train.py::test_metrics_are_averages_over_the_interval',
  ),
  'gradients of the last microbatch only': Mutation(
    'cover_jax/training/accumulation.py',
    'jax.tree.map(jnp.add, gradients, more)',
    'more',
    _STEP.format('accumulation, frozen parts and padding'),
  ),
  'microbatches count alike': Mutation(
    'cover_jax/training/accumulation.py',
    'n / jnp.maximum(jnp.sum(n), 1)',
    'jnp.ones_like(n) / steps',
    _STEP.format('accumulation, frozen parts and padding'),
  ),
  'microbatches draw the same': Mutation(
    'cover_jax/training/accumulation.py',
    'jax.random.fold_in(rng, j)',
    'rng',
    'test_measures.py::test_every_step_stream_microbatch_and_seed_draws_its_own_numbers',
  ),
  # Mixing: clips on the device, sources in the order of examples.
  'label shares swapped': Mutation(
    'cover_jax/augment/mixing.py',
    'mix.share_B * own_B + (1.0 - mix.share_B) * partner_B',
    '(1.0 - mix.share_B) * own_B + mix.share_B * partner_B',
    'test_mixing.py::test_loss_is_the_mixture_of_both_labels_losses',
  ),
  'partners leave their group': Mutation(
    'cover_jax/augment/mixing.py',
    'jnp.where(place_B < after_B, place_B, first_B)',
    'jnp.where(place_B < len(group_B), place_B, 0)',
    'test_mixing.py::test_partners_are_a_permutation_within_the_group_without_the_clip_itself',
  ),
  'temperature the wrong way up': Mutation(
    'data_pipelines/loading/mixture.py',
    'weights.max()) ** (1 / temperature)',
    'weights.max()) ** temperature',
    'test_mixture.py::test_temperature_flattens',
  ),
  'passes drift': Mutation(
    'data_pipelines/loading/mixture.py',
    'turn // self._blocks.sum() *',
    'turn // (self._blocks.sum() + 1) *',
    'test_mixture.py::test_any_weights_see_each_example_once_per_pass',
  ),
  # Metrics and evaluation.
  'measures of all sources together': Mutation(
    'cover_jax/training/measuring.py',
    'mask_B & (source_B == index)',
    'mask_B',
    'test_measures.py::test_measures_are_means_over_the_examples_of_their_source',
  ),
  'measures of padding': Mutation(
    'cover_jax/training/measuring.py',
    'mask_B & (source_B == index)',
    'source_B == index',
    'test_measures.py::test_measures_are_means_over_the_examples_of_their_source',
  ),
  'measures of the last step only': Mutation(
    'cover_jax/training/measuring.py',
    'x.merge(y)',
    'y',
    'test_measures.py::test_measures_are_means_over_the_examples_of_their_source',
  ),
  'unlabelled examples are evaluated': Mutation(
    'cover_jax/evaluation/classify.py',
    "batch['mask'] & (label_B >= 0)",
    "batch['mask']",
    'test_measures.py::test_evaluation_counts_labelled_examples_once',
  ),
  'top-4 for top-5': Mutation(
    'cover_jax/evaluation/classify.py',
    'rank_B < 5',
    'rank_B < 4',
    'test_measures.py::test_evaluation_counts_labelled_examples_once',
  ),
  'confusion transposed': Mutation(
    'cover_jax/evaluation/classify.py',
    '.at[label_B, predicted_B]',
    '.at[predicted_B, label_B]',
    'test_measures.py::test_evaluation_counts_labelled_examples_once',
  ),
  'missing examples the other way': Mutation(
    'cover_jax/evaluation/classify.py',
    'self.expected if self.missing_wrong else self.examples',
    'self.examples if self.missing_wrong else self.expected',
    'test_evaluate.py::test_missing_examples_are_counted',
  ),
  'views averaged as logarithms': Mutation(
    'cover_jax/evaluation/classify.py',
    'jax.nn.logsumexp(views_BxVxK, axis=1) - jnp.log(count)',
    'jnp.mean(views_BxVxK, axis=1)',
    'test_evaluate.py::test_views_are_averaged_as_probabilities',
  ),
  # Heads.
  'logits of other heads are not masked': Mutation(
    'cover_jax/models/heads.py',
    'jnp.where(_own_columns(logits_BxK, source_B, columns), logits_BxK.astype(jnp.float32), _MASKED)',
    'logits_BxK.astype(jnp.float32)',
    'test_heads.py::test_cross_entropy_is_that_of_the_own_head',
  ),
  'a label one past the head': Mutation(
    'cover_jax/models/heads.py',
    'label_B < count_B',
    'label_B <= count_B',
    'test_heads.py::test_unlabelled_and_impossible_labels',
  ),
  'a broken model is right': Mutation(
    'cover_jax/models/heads.py',
    '~(logits_BxK <= true_Bx1)',
    '(logits_BxK > true_Bx1)',
    'test_heads.py::test_a_broken_model_is_never_right',
  ),
  'several labels reach another head': Mutation(
    'cover_jax/models/heads.py',
    '(label_BxK >= 0) & _own_columns(logits_BxK, source_B, columns)',
    'label_BxK >= 0',
    'test_several_labels.py::test_gradient_of_a_head_comes_from_its_own_samples_alone',
  ),
  'a class that nobody knows is a no': Mutation(
    'cover_jax/models/heads.py',
    'jnp.sum(entropy_BxK, axis=-1, where=known_BxK)',
    'jnp.sum(entropy_BxK, axis=-1)',
    'test_several_labels.py::test_the_loss_is_the_sum_of_the_own_classes_binary_cross_entropies[0.0]',
  ),
  'no label is not known': Mutation(
    'data_pipelines/sources/label_sets.py',
    'if -1 not in classes:',
    'if -1 not in classes and len(classes):',
    'test_several_labels.py::test_batches_say_every_label_and_tell_none_from_unknown',
  ),
  'each of equal scores is a threshold': Mutation(
    'cover_jax/evaluation/average_precision.py',
    'np.append(score_N[1:] != score_N[:-1], True)',
    'np.ones(len(score_N), bool)',
    'test_average_precision.py::test_average_precision_is_that_of_scikit_learn[0]',
  ),
  'labels are averaged over views before the sigmoid': Mutation(
    'cover_jax/evaluation/scoring.py',
    'yes_BxK - jax.nn.logsumexp(jax.nn.log_sigmoid(-views_BxVxK), axis=1)',
    'jnp.mean(views_BxVxK, axis=1)',
    'test_several_labels_run.py::test_evaluation_prediction_export_and_report_say_the_same',
  ),
  # From the config to the run.
  'device augmentation dropped': Mutation(
    'cover_jax/experiment/build.py',
    'objectives.augmented(task, augments.photometric)',
    'task',
    'test_wiring.py::test_augmentation_on_the_device_comes_before_the_objective',
  ),
  'mixup dropped': Mutation(
    'cover_jax/experiment/build.py',
    ', **augments.mixing}',
    '}',
    'test_wiring.py::test_clips_are_mixed_where_the_config_says',
  ),
  'geometry dropped in the plan': Mutation(
    'cover_jax/experiment/build.py',
    'rand_augment=geometry[name]',
    'rand_augment=None',
    'test_wiring.py::test_rand_augments_geometry_is_done_by_the_host',
  ),
  'no drop paths in training': Mutation(
    'cover_jax/models/encoder.py',
    'clip_BxTxHxWx3, train=True',
    'clip_BxTxHxWx3, train=False',
    'test_wiring.py::test_pixels_and_drop_paths_of_the_encoder',
  ),
  'pixels divided before the mean': Mutation(
    'cover_jax/experiment/build.py',
    '(pixels - mean) / std',
    'pixels / std - mean',
    'test_wiring.py::test_pixels_and_drop_paths_of_the_encoder',
  ),
  'weights of the config dropped': Mutation(
    'cover_jax/experiment/build.py',
    'explicit=explicit)',
    'explicit=None)',
    'test_wiring.py::test_weights_of_the_streams_losses',
  ),
  'geometry dropped on the way to the loader': Mutation(
    'cover_jax/experiment/wire.py',
    'rand_augment=stream.rand_augment',
    'rand_augment=None',
    'test_wiring.py::test_rand_augments_geometry_is_done_by_the_host',
  ),
  'one source a step dropped': Mutation(
    'cover_jax/experiment/wire.py',
    'one_source_a_step=experiment.config.mixture.one_source_a_step',
    'one_source_a_step=False',
    'test_wiring.py::test_one_source_a_step',
  ),
  'weights dropped on the way to the loader': Mutation(
    'cover_jax/experiment/wire.py',
    'experiment.weights[experiment.sources[i].name]',
    'experiment.sources[i].num_examples',
    'test_wiring.py::test_weights_of_the_mixture_choose_the_examples',
  ),
  'views of the objective dropped': Mutation(
    'cover_jax/experiment/wire.py',
    'views=experiment.objectives[name].views',
    'views=None',
    'test_wiring.py::test_an_objectives_views_are_loaded',
  ),
  'share of the labels dropped': Mutation(
    'cover_jax/jobs/opening.py',
    "subsets.few_labels(source, source_config['label_fraction'])",
    'source',
    'test_wiring.py::test_some_of_the_training_examples',
  ),
  'other parameters evaluated': Mutation(
    'cover_jax/jobs/evaluate.py',
    "{'raw': current.params, 'ema': current.ema}",
    "{'raw': current.ema, 'ema': current.params}",
    'test_wiring.py::test_parameters_that_are_evaluated',
  ),
  'always the same initial weights': Mutation(
    'cover_jax/experiment/state.py',
    'jax.random.key(experiment.config.seed)',
    'jax.random.key(0)',
    'test_wiring.py::test_seed_of_the_initial_weights',
  ),
  'streams draw by their place': Mutation(
    'cover_jax/training/step.py',
    'keys.of(rng, name)',
    'keys.of(rng, str(list(experiment.objectives).index(name)))',
    'test_keys.py::test_a_stream_draws_the_same_whatever_other_streams_there_are',
  ),
  # Encoders with batch statistics, and heads on tokens.
  'streams count alike in the statistics': Mutation(
    'cover_jax/training/step.py',
    'sum(w * x for w, x in',
    'sum(total / len(weights) * x for w, x in',
    'test_encoders.py::test_statistics_of_several_streams_are_weighted_as_their_losses',
  ),
  'average keeps the old statistics': Mutation(
    'cover_jax/training/step.py',
    'ema = with_statistics(ema, optax.incremental_update(statistics, old, 1.0 - decay))',
    'ema = with_statistics(ema, old)',
    'test_encoders.py::test_the_average_of_a_run_averages_statistics',
  ),
  'statistics stay as they were': Mutation(
    'cover_jax/training/step.py',
    'params = with_statistics(optim.join(learning, frozen), statistics)\n    step = state.step + 1',
    'params = optim.join(learning, frozen)\n    step = state.step + 1',
    'test_encoders.py::test_the_average_of_a_run_averages_statistics',
  ),
  'microbatches start from the same statistics': Mutation(
    'cover_jax/training/accumulation.py',
    '    states, statistics, total, gradients = carry\n',
    '    states, _, total, gradients = carry\n',
    'test_encoders.py::test_statistics_go_through_the_microbatches',
  ),
  'statistics are optimised': Mutation(
    'cover_jax/experiment/optim.py',
    'if is_statistic(name) or _value(rules, name) == 0',
    'if _value(rules, name) == 0',
    'test_encoders.py::test_the_average_of_a_run_averages_statistics',
  ),
  'attentive heads see one token': Mutation(
    'cover_jax/models/heads.py',
    'tokens_BxTxHxWxD.reshape(len(feature_BxD), -1, tokens_BxTxHxWxD.shape[-1])',
    'feature_BxD[:, None]',
    'test_encoders.py::test_an_attentive_head_looks_at_every_token',
  ),
  'weights of another function are evaluated': Mutation(
    'cover_jax/jobs/resume.py',
    "  'pixel_(mean|std)',\n)",
    ')',
    'test_encoders.py::test_weights_are_tested_as_the_function_that_was_trained',
  ),
  'a head of another kind is reshaped': Mutation(
    'cover_jax/weights/initialise.py',
    '(same or ours in mapped) and set(weights.heads[theirs]) != set(ours_flat)',
    'False',
    'test_encoders.py::test_another_function_of_the_same_weights_is_refused',
  ),
  # What is refused, and what a batch says.
  'a folder of checkpoints that is gone': Mutation(
    'cover_jax/jobs/resume.py',
    '  _check_metrics(workdir, before or config)\n',
    '',
    'test_resume.py::test_a_run_whose_folder_of_checkpoints_is_gone_is_not_started_anew',
  ),
  'a list of checksums that is gone': Mutation(
    'cover_jax/checkpoints/orbax_folder.py',
    '    if _raw_about(path).get(_SEALED):\n',
    '    if False:\n',
    'test_checkpoint_damage.py::test_a_lost_list_of_checksums_is_noticed',
  ),
  'boxes in pixels': Mutation(
    'data_pipelines/loading/views.py',
    'np.asarray(view.box) / np.tile(stored, 2)',
    'np.asarray(view.box)',
    'test_loader.py::test_targets_say_how_the_host_cut_each_clip',
  ),
  'padding has labels': Mutation(
    'data_pipelines/loading/fetch.py',
    'value if row.mask else np.full_like(value, -1)',
    'value',
    'test_loader.py::test_evaluation_gives_each_example_once_with_padding',
  ),
  'examples of the next step': Mutation(
    'data_pipelines/loading/loader.py',
    'r = rows(start + step)',
    'r = rows(start + step + 1)',
    'test_loader.py::test_batches_keep_the_contract_and_show_the_planned_frames',
  ),
  'targets dropped on the way to the loader': Mutation(
    'cover_jax/experiment/wire.py',
    'targets=experiment.objectives[name].targets',
    'targets=()',
    'test_experiment.py::test_views_have_the_lengths_that_the_objective_says',
  ),
}
