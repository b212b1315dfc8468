"""Builds a dataset from local files: `python -m data_pipelines.build DATASET --manual_dir=FOLDER [--data_dir=DIR]`.

DATASET is `builder/config`, such as kinetics/400, ucf101_videos/split1 or video_folder/mine, where `mine` is any name
of your own. It is `tfds build` (which works on these datasets, too: `tfds build -i data_pipelines.builders ...`) with
options for how frames are stored. Options other than the config's own make a variant, which needs a name: `kinetics/400
--name=400_10fps --fps=10` is found as kinetics/400_10fps from then on.

A build that was stopped goes on when it is started again. Exit code 2 is a mistake in the command or the files.
"""

import argparse
import dataclasses
import difflib
import os
import re
import shutil
import sys
from collections.abc import Sequence

from data_pipelines import flags, installed
from data_pipelines.contract import UserError


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  to = flags.parser('data_pipelines.build', __doc__)
  to.add_argument('dataset', help='builder/config: kinetics/400, video_folder/mine, ...')
  to.add_argument('--manual_dir', required=True, type=flags.path, help='folder with the files and their annotations')
  what = 'folder of all built datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets'
  to.add_argument('--data_dir', type=flags.path, help=what)
  to.add_argument('--name', help='of this variant of the config')
  to.add_argument('--short_side', type=int, help='pixels of the shorter side; 0: as it is')
  to.add_argument('--fps', type=float, help='frames a second; 0: as they are')
  to.add_argument('--jpeg_quality', type=int, help='1 to 95')
  to.add_argument('--storage', choices=('jpeg', 'mp4'), help='of videos; mp4: less disk, slower to read')
  what = 'several: lists have `path label label ...` lines (video_folder and image_folder)'
  to.add_argument('--labels', choices=('one', 'several'), help=what)
  to.add_argument('--workers', type=int, help='processes that decode; one a CPU core')
  to.add_argument('--max_examples_per_split', type=int, help='a random part of each split, for a trial')
  to.add_argument('--beam', nargs='+', metavar='OPTION', help="Beam's pipeline options: runner=DirectRunner ...")
  to.add_argument(
    '--again',
    action='store_true',
    help='build a finished dataset once more; only shards whose clips or files have changed are redone',
  )
  return to


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command line.

  Raises:
    UserError: there is no such builder, or a mistake in the command or its files.
  """
  options = flags.parse(parser(), argv)
  installed.need_train('Building a data set')
  builder = make_builder(
    options.dataset,
    options.data_dir,
    options.name,
    {
      k: v for k in ('short_side', 'fps', 'jpeg_quality', 'storage', 'labels') if (v := getattr(options, k)) is not None
    },
  )
  builder.workers = options.workers
  if builder.is_prepared():
    if not options.again:
      print(f'{builder.info.full_name} is built already, in {builder.data_dir}; --again looks for what has changed.')
      return
    builder = reopen(builder)
  import tensorflow_datasets as tfds

  config = tfds.download.DownloadConfig(
    manual_dir=options.manual_dir,
    max_examples_per_split=options.max_examples_per_split,
    beam_options=_beam_options(options.beam) if options.beam else None,
  )
  builder.download_and_prepare(download_config=config)
  print(f'{builder.info.full_name} is in {builder.data_dir}')


def make_builder(dataset: str, data_dir: str | None, name: str | None, stored: dict[str, float | str]):
  """The builder of a dataset.

  Args:
    dataset: builder/config.
    data_dir: of TFDS.
    name: of a variant; None: the config as it is, or a new one of that name.
    stored: how frames are stored, and how many labels an example has, where that differs from the config.

  Raises:
    UserError: there is no such builder or config, a variant has no name of its own, or `data_dir` is no folder.
  """
  from data_pipelines.builders.media import MediaBuilder, check_data_dir

  check_data_dir(data_dir or '')
  known = {cls.name: cls for cls in MediaBuilder.__subclasses__()}
  builder, _, config = dataset.partition('/')
  if builder not in known:
    close = difflib.get_close_matches(builder, known)
    hint = f'close matches: {", ".join(close)}' if close else f'expected one of {", ".join(known)}'
    raise UserError(f'There is no builder {builder!r} of local files; {hint}. TFDS builds its own with `tfds build`.')
  cls = known[builder]
  configs = cls.builder_configs
  free = 'default' in configs
  if not config and not free and len(configs) == 1:
    (config,) = configs
  if config not in configs and not (free and config and name is None):
    choice = f'{builder}/<a name of your own>' if free else ', '.join(f'{builder}/{c}' for c in configs)
    raise UserError(f'{dataset!r} is not a dataset of {builder}; expected {choice}.')
  if 'labels' in stored and not free:
    raise UserError(
      f'--labels is for folders of your own; {dataset} has the labels that its annotations say: leave it out.'
    )
  if config in configs and name is None and stored:
    raise UserError(
      f'{dataset} with {", ".join(f"{k}={v}" for k, v in stored.items())} is a variant: give it a name of its own '
      f'with --name.'
    )
  if config not in configs:
    config, name = 'default', config
  if name is None:
    return cls(data_dir=data_dir, config=config)
  if name in configs or not re.fullmatch(r'[\w.-]+', name):
    raise UserError(f'The name {name!r} is taken or has other characters than letters, digits, "_", "-" and ".".')
  variant = dataclasses.replace(configs[config], name=name, description=None, **stored)
  return cls(data_dir=data_dir, config=variant)


def reopen(builder):
  """Makes an unfinished build of a finished one, with all its shards; gives the builder for going on."""
  from data_pipelines.builders import shards

  if not os.path.exists(builder.data_path / shards.NOTES):
    raise UserError(f'{builder.data_dir} was not built by this version: delete it to build it again.')
  shutil.rmtree(builder.unfinished, ignore_errors=True)
  os.rename(builder.data_dir, builder.unfinished)
  return type(builder)(data_dir=builder.data_dir_root, config=builder.builder_config)


def _beam_options(options: list[str]):
  try:
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError:
    raise UserError("--beam needs Apache Beam: pip install -e '.[beam]'.") from None
  return PipelineOptions(flags=[f'--{option}' for option in options])


if __name__ == '__main__':
  try:
    sys.exit(flags.run(main))
  except KeyboardInterrupt:
    print('Stopped; the same command goes on from here.', file=sys.stderr)
    sys.exit(130)
