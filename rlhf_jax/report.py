"""What a run leaves for people to look at: the table of SFT against PPO, and a picture of its three stages."""

import pathlib

import matplotlib
import rich.console
import rich.table

from rlhf_jax.metrics import read_metrics

matplotlib.use('Agg')

import matplotlib.pyplot as plt

_PANELS = [
  ('sft', 'SFT', [('loss', 'training'), ('held_out/loss', 'held out')], 'nats per token'),
  ('reward', 'Reward model', [('accuracy', 'training'), ('held_out/accuracy', 'held out')], 'accuracy'),
  ('ppo', 'PPO: score', [('score', 'score')], 'reward model'),
  ('ppo', 'PPO: KL to the SFT model', [('kl_nats_per_sequence', 'KL')], 'nats per answer'),
  ('ppo', 'PPO: entropy', [('entropy', 'entropy')], 'nats per token'),
  ('ppo', 'PPO: length', [('response_length', 'tokens per answer')], 'tokens'),
]


def print_table(columns, title, console=None):
  """Prints {column: {row: number}} as a table."""
  table = rich.table.Table(title=title, title_justify='left')
  table.add_column('')
  for name in columns:
    table.add_column(name, justify='right')
  for row in next(iter(columns.values())):
    table.add_row(row, *(_number(values.get(row)) for values in columns.values()))
  (console or rich.console.Console()).print(table)


def _number(value):
  if value is None:
    return '-'
  return value if isinstance(value, str) else f'{value:.3g}' if abs(value) < 1000 else f'{value:.0f}'


def draw(directory):
  """Draws the metrics under a run directory to report.png there, if there are any; returns the file's name."""
  directory = pathlib.Path(directory)
  logs = {stage: read_metrics(directory / stage) for stage in ('sft', 'reward', 'ppo') if (directory / stage).exists()}
  panels = [panel for panel in _PANELS if logs.get(panel[0])]
  if not panels:
    return 'report.png'
  figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout='constrained')
  for axis, (stage, title, curves, unit) in zip(axes.flat, panels):
    for name, label in curves:
      points = [(row['step'], row[name]) for row in logs[stage] if row.get(name) is not None]
      if points:
        held_out = name.startswith('held_out')
        axis.plot(*zip(*points), marker='o' if held_out else None, linewidth=2 if held_out else 1, label=label)
    axis.set_title(title)
    axis.set_ylabel(unit)
    axis.set_xlabel('iteration' if stage == 'ppo' else 'update')
    axis.grid(alpha=0.3)
    if len(curves) > 1:
      axis.legend()
  for axis in axes.flat[len(panels):]:
    axis.set_visible(False)
  figure.savefig(directory / 'report.png', dpi=110)
  plt.close(figure)
  return 'report.png'
