"""What to change where a program does not fit: settings that make it smaller, each tried by compiling."""

import jax

from rlhf_jax.errors import DeviceMemoryError, RlhfJaxError
from rlhf_jax.planner import STAGES, Program, plan


def remedies(experiment, cost, mesh, devices):
  """Settings that make a program smaller on so many devices, each with those before it, the least harmful first."""
  stage, trains, changes = getattr(experiment, cost.stage), cost.name in ('SFT step', 'reward step', 'PPO update'), {}
  data, fsdp, tensor = (mesh.get(axis, 1) for axis in ('data', 'fsdp', 'tensor'))
  is_cut = 'fsdp' in mesh
  if not is_cut and devices > 1:                                                # each device holds all, or only one does
    changes = {'mesh.runner': 'sharded', 'mesh.data': 1, 'mesh.fsdp': devices}
    yield changes
    data, fsdp = 1, devices
  if cost.stage == 'ppo' and experiment.dtype == 'bfloat16' and stage.frozen_dtype == 'float32':
    yield (changes := changes | {'ppo.frozen_dtype': 'bfloat16'})
  if trains and experiment.remat != 'block':
    yield (changes := changes | {'remat': 'block'})
  pieces = stage.microbatches * 2
  while trains and stage.batch_size // getattr(stage, 'minibatches', 1) % (pieces * data * fsdp) == 0:
    yield (changes := changes | {f'{cost.stage}.microbatches': pieces})
    pieces *= 2
  if cost.name == 'generate':
    slots = (stage.slots or stage.batch_size) // 2
    if slots % (data * fsdp) == 0:
      yield (changes := changes | {'ppo.slots': slots})
    if stage.gather and fsdp > 1:
      yield (changes := changes | {'ppo.gather': False})
  if trains and stage.optimizer.moment_dtype != 'bfloat16':
    yield (changes := changes | {f'{cost.stage}.optimizer.moment_dtype': 'bfloat16'})
  if is_cut and data > 1:
    yield changes | {'mesh.data': 1, 'mesh.fsdp': fsdp * data}
  elif tensor > 1:
    yield changes | {'mesh.data': 1, 'mesh.fsdp': fsdp * 2, 'mesh.tensor': tensor // 2}


def is_out_of_memory(error):
  """Whether that is what an error of JAX says. Where a result is awaited, the code is another."""
  return 'RESOURCE_EXHAUSTED' in str(error) or 'out of memory' in str(error).lower()


def out_of_memory(run, stage, error):
  """DeviceMemoryError in place of JAX's: what the program needed that was called last, and the
  settings that make it smaller, the least harmful first.
  """
  call = run.runner.calls[-1] if run.runner.calls else None
  name = _program(stage, call and call.name)
  belongs_to = 'ppo' if name == 'generate' else stage  # the answers that labellers rank, too
  settings = _first_values(run, Program(name, belongs_to, None, (), {}))
  smaller = f'a smaller --{belongs_to}.batch-size or shorter sequences (--data.limits)'
  if call is None:  # batches and activations have no part in it
    settings = {setting: value for setting, value in settings.items()
                if setting.startswith('mesh.') or setting.endswith('.moment_dtype')}
    smaller = 'a smaller model'
  in_order = f', in this order, until it fits: {flags(settings)}; or' if settings else ''
  return DeviceMemoryError(
    f'{stage}: out of memory{_needed(name, call, run.runner)}. XLA says: {_first_line(error)}. '
    f'Pass{in_order} {smaller}. The last checkpoint is untouched.')


def _first_values(run, program):
  """Settings that make a program smaller, each with the first value that is to be tried."""
  settings = {}
  mesh = dict(run.runner.mesh.shape)
  for changes in remedies(run.experiment, program, mesh, jax.device_count()):
    settings = changes | settings
  return settings


def _first_line(error):
  """What XLA says of memory, without what stands before it and on the lines after."""
  line = str(error).splitlines()[0]
  begins = max(line.lower().find('out of memory'), 0)
  return line[begins:][:200].rstrip('.')


def _program(stage, called):
  """The planner's name of a function that a stage calls; before the first, of its update."""
  update = {'sft': 'SFT step', 'reward': 'reward step', 'ppo': 'PPO update'}[stage]
  names = {
    None: update, 'step': update, 'update': update, 'look_back': 'experience',
    'eval_step': 'evaluation'}
  return names.get(called, called)


def _needed(name, call, runner):
  """What a call took of a device, in words."""
  if call is None:
    return ' before its first program: parameters and moments do not fit'
  try:
    arguments, own = call.memory()
  except jax.errors.JaxRuntimeError:  # the compiler refuses it
    return f' in {name}'
  limit = (runner.mesh.local_devices[0].memory_stats() or {}).get('bytes_limit')
  of = f', of {_gib(limit)} GiB' if limit else ''
  return (f' in {name}, which needs {_gib(arguments + own)} GiB of a device{of}: '
          f'{_gib(arguments)} for its arguments and {_gib(own)} beside them')


def _gib(size):
  return f'{size / 2**30:,.3g}'


def suggest(experiment, made, prepare, override, devices, stages=STAGES, say=lambda text: None):
  """Settings under which all programs of a Plan fit, compiled to be sure; None where none of the remedies helps.

  `prepare(experiment)` gives the Run, `override(experiment, settings)` the changed experiment.
  """
  found = {}
  for cost in made.too_large:
    for settings in remedies(experiment, cost, made.mesh, devices):
      say(f'{cost.name} does not fit; with {flags(settings)}?')
      try:
        tried = plan(prepare(override(experiment, found | settings)), made.topology, [cost.stage], [cost.name], say)
      except RlhfJaxError as error:                                              # what this mesh divides, another may not
        say(str(error))
        continue
      if not tried.too_large:
        found |= settings
        break
    else:
      return None
  if any(name.startswith('mesh') for name in found) and \
     plan(prepare(override(experiment, found)), made.topology, stages, say=say).too_large:
    return None
  return found


def flags(settings):
  """Settings as the command line has them."""
  return ' '.join(_flag(*name.replace('_', '-').rpartition('.'), value) for name, value in settings.items())


def _flag(group, dot, name, value):
  if isinstance(value, bool):
    return f'--{group}{dot}{name}' if value else f'--{group}{dot}no-{name}'
  return f'--{group}{dot}{name} {value}'
