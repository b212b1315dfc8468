"""The bill of a run: what its data takes to build, and what its slice costs."""

import pathlib
import re

import pytest

from configs import cover_b16
from cover_jax.planning import bill
from data_pipelines.sources.sizes import PUBLISHED, Size

DATASETS = (pathlib.Path(__file__).parent.parent / 'docs/datasets.md').read_text()


def built(dataset, size, fps=0.0):
  (row,) = bill.data({'x': size}, {'x': {'dataset': dataset}}, fps)
  return row['core_hours'], row['gb']


def test_rates_are_those_of_the_page():
  """The whole data set's core hours and terabytes, which the page has for Kinetics."""
  low, high, tb_low, tb_high = map(
    float, re.search(r'K400 \(240,000\): (\d+) to (\d+) core hours, ([\d.]+) to ([\d.]+) TB', DATASETS).groups()
  )
  hours, gb = built('kinetics/400', PUBLISHED['kinetics/400'])
  assert low <= hours <= high and tb_low - 0.05 <= gb / 1000 <= tb_high
  for dataset, rate in bill.RATES.items():
    like = {'kinetics': 'Kinetics, 340x256', 'something_something_v2': 'Something', 'moments_in_time': 'Moments'}
    row = re.search(rf'(?m)^\| {like.get(dataset, dataset.upper())}.*$', DATASETS)[0].split('|')
    numbers = lambda cell: [
      [float(x) for x in part.split(' to ')] for part in re.findall(r'[\d.]+(?: to [\d.]+)?', cell)
    ]
    (minutes, gb), (minutes_at_10, gb_at_10) = numbers(row[3]), numbers(row[4])
    for found, among in zip(rate, (minutes, gb, minutes_at_10, gb_at_10), strict=True):
      assert among[0] - 0.05 <= found <= among[-1] + 0.05, (dataset, found, among)


def test_what_is_there_costs_nothing_and_what_nobody_measured_is_not_known():
  assert built('kinetics/400', Size('video', 1000, 400, 'prepared in /data')) == (0.0, 0.0)
  assert built('video_folder/mine', Size('video', 1000, 4, '--sizes')) == (None, None)
  assert built('kinetics/700:1.0.0', Size('video', 60_000, 700, 'x'), 10) == pytest.approx((3.9, 99))


def test_the_table_sums_what_is_known():
  config = cover_b16.get_config()
  known = {name: PUBLISHED[source.dataset] for name, source in config.sources.items()}
  rows = bill.data(known, config.sources, 0)
  text = bill.data_report(rows, 0)
  images = next(name for name, size in known.items() if size.modality == 'image')
  assert f'| {images} | - | - |' in text and len(rows) == len(known)
  assert f'| in all | {sum(r["core_hours"] or 0 for r in rows):,.0f} |' in text and 'half to twice' in text


def test_price_of_a_slice():
  result = {'mesh': {'data': 8, 'fsdp': 4, 'tensor': 2}, 'time': {'days': 0.5}}
  assert bill.slice_price(result, None) == {'chip_hours': 768}
  assert bill.slice_price(result, 1.5) == {'chip_hours': 768, 'dollars': 1152}
  assert '768.0 chip hours, 1,152 dollars' in bill.price_report(bill.slice_price(result, 1.5))
  assert bill.slice_price({'mesh': {'data': 8}}, 1.5) == {} and bill.price_report({}) == ''
