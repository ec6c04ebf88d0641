"""Programs that are compiled and timed in rounds, and what is said of the rounds: median, least and most."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function, the seconds that compiling it took, and the bytes that it needs.

  Bytes are those on one device; None where the compiler does not say.
  """
  call: Callable
  compile_seconds: float
  memory_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Workload:
  """`turn(call, state)` does one round of `units` and returns the next state.

  call(name, *args) runs a program of it. The first turn gives `state` away, so a workload is
  measured once.
  """
  title: str
  unit: str
  units: float
  programs: dict[str, Program]
  turn: Callable[[Callable, Any], Any]
  state: Any = None


def compiled(fn, *args):
  """The Program that `Runner.compile` gave as fn, compiled for these arguments."""
  began = time.perf_counter()
  executable = fn.lower(*args).compile()
  return Program(fn, time.perf_counter() - began, program_bytes(executable))


def program_bytes(executable):
  """Bytes of a device while a program runs: donated arguments count once; None if unknown."""
  memory = executable.memory_analysis()
  if not memory:
    return None
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return held - memory.alias_size_in_bytes


def measure(workload, repeats):
  """Seconds and units per second of a round, and of each program its part."""
  state, rounds = workload.state, []
  for _ in range(1 + repeats):                                   # the first warms up
    seconds = {}
    state = workload.turn(functools.partial(timed, workload.programs, seconds), state)
    rounds.append(seconds)
  counted = rounds[1:]
  totals = [sum(seconds.values()) for seconds in counted]
  parts = {name: {'seconds': spread(seconds[name] for seconds in counted),
                  'compile_seconds': program.compile_seconds,
                  'memory_bytes': program.memory_bytes}
           for name, program in workload.programs.items()}
  rates = spread(workload.units / total for total in totals)
  return {'title': workload.title, 'unit': workload.unit, 'units': workload.units,
          'seconds': spread(totals), 'units_per_second': rates, 'parts': parts}


def timed(programs, seconds, name, *args):
  """The program's result, its seconds added to those of that name."""
  began = time.perf_counter()
  result = jax.block_until_ready(programs[name].call(*args))
  seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
  return result


def spread(numbers):
  """{'median', 'min', 'max'} of numbers."""
  numbers = list(numbers)
  return {'median': statistics.median(numbers), 'min': min(numbers), 'max': max(numbers)}
