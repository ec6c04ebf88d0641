"""The workloads of `bench` on the CPU by several libraries, in turns: each side in a process of its own."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import statistics
import time

import jax
import rich.progress

from experiments import bench
from experiments.peers.by_hand import Torch, Transformers
from rlhf_jax.cli import make_runner
from rlhf_jax.model.heads import LanguageModel, ScalarModel
from rlhf_jax.startup import prepare_process

_WARMUPS = 2


class Ours:
  """The workloads of `bench`, each round going on from the state of the last; the first says what cannot be measured."""
  def __init__(self, config, batch, mesh):
    self.config, self.batch, self.mesh = config, batch, mesh
    self.workloads, self.states = {}, {}

  def __getattr__(self, name):
    if name not in bench.WORKLOADS:
      raise AttributeError(name)
    def one_round():
      if name not in self.workloads:
        policy, scalar = LanguageModel(self.config), ScalarModel(self.config)
        runner = make_runner(self.mesh, models=(policy, scalar))
        setting = bench.Setting(runner, policy, scalar, self.batch)
        bench.check(bench.Bench(mesh=self.mesh, batch=self.batch, only=(name,)), setting)
        self.workloads[name] = bench.WORKLOADS[name](setting)
        self.states[name] = self.workloads[name].state
      programs = self.workloads[name].programs
      call = lambda program, *args: jax.block_until_ready(programs[program].call(*args))
      self.states[name] = self.workloads[name].turn(call, self.states[name])
    return one_round


SIDES = 'rlhf_jax', 'PyTorch', 'transformers'
DONE_BY = {'sft': SIDES, 'reward': ('rlhf_jax', 'PyTorch'), 'generate': SIDES, 'ppo': ('rlhf_jax', 'PyTorch')}


def _begin(make, mesh, config, batch):
  """Makes this process one side."""
  global _side
  prepare_process(mesh.cpu_devices)                                              # freed memory stays, for every side
  _side = make(config, batch)


def _round(name):
  """Seconds of one round of a workload of this process's side."""
  began = time.perf_counter()
  getattr(_side, name)()
  return time.perf_counter() - began


def compare(config, batch, mesh, only, repeats):
  """{workload: {who: median seconds of a round}}. A side's memory and threads do not meddle with another's."""
  found, spawn = {}, multiprocessing.get_context('spawn')
  with contextlib.ExitStack() as stack:
    makers = functools.partial(Ours, mesh=mesh), Torch, Transformers
    sides = {who: stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, spawn, _begin, (make, mesh, config, batch)))
             for who, make in zip(SIDES, makers, strict=True)}
    progress = stack.enter_context(rich.progress.Progress(transient=True))
    task = progress.add_task('', total=len(only) * (_WARMUPS + repeats))
    for name in only:
      progress.update(task, description=name)
      seconds = {who: [] for who in DONE_BY[name]}
      for _ in range(_WARMUPS + repeats):
        for who, times in seconds.items():
          times.append(sides[who].submit(_round, name).result())
        progress.advance(task)
      found[name] = {who: statistics.median(times[_WARMUPS:]) for who, times in seconds.items()}
  return found
