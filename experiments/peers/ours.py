"""Our side of a comparison on one device: the workloads of `bench`, one round after another."""

import functools

import jax

from experiments import bench
from experiments.benchmarks.measuring import timed
from rlhf_jax.cli import make_runner
from rlhf_jax.config import MeshConfig
from rlhf_jax.errors import ConfigError
from rlhf_jax.model.heads import LanguageModel, ScalarModel


class Ours:
  """A workload whose rounds go on from the state of the last."""
  def __init__(self, workload, config, batch, device):
    if jax.default_backend() != device:
      raise ConfigError(f'JAX computes on {jax.default_backend()} here, not on {device}.')
    mesh = MeshConfig()
    policy, scalar = LanguageModel(config), ScalarModel(config)
    runner = make_runner(mesh, models=(policy, scalar))
    setting = bench.Setting(runner, policy, scalar, batch)
    bench.check(bench.Bench(mesh=mesh, batch=batch, only=(workload,)), setting)
    self.mesh = setting.runner.mesh
    self.workload = bench.WORKLOADS[workload](setting)
    self.state = self.workload.state

  def round(self):
    """Seconds of each program of one round."""
    seconds = {}
    call = functools.partial(timed, self.workload.programs, seconds)
    self.state = self.workload.turn(call, self.state)
    return seconds

  def peak_bytes(self):
    """The most that the device held at a time; None on a CPU."""
    return bench.peak_memory(self.mesh)['device_bytes']

  def device_name(self):
    return self.mesh.devices.flat[0].device_kind
