"""What to change where a program does not fit: settings that make it smaller, each tried by compiling."""

from rlhf_jax.errors import RlhfJaxError
from rlhf_jax.planner import STAGES, plan


def remedies(experiment, cost, mesh, devices):
  """Settings that make a program smaller on so many devices, each with those before it, the least harmful first."""
  stage, trains, changes = getattr(experiment, cost.stage), cost.name in ('SFT step', 'reward step', 'PPO update'), {}
  data, fsdp, tensor = (mesh.get(axis, 1) for axis in ('data', 'fsdp', 'tensor'))
  is_cut = 'fsdp' in mesh
  if not is_cut and devices > 1:                                                # each device holds all, or only one does
    changes = {'mesh.runner': 'sharded', 'mesh.data': 1, 'mesh.fsdp': devices}
    yield changes
    data, fsdp = 1, devices
  if trains and not experiment.remat:
    yield (changes := changes | {'remat': True})
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
