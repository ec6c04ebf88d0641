"""From a command line to a finished run: flags, run directory, the three stages, exports, and the table at the end.

An experiment module calls `main(EXPERIMENT, make_task, __doc__)`. The same command again resumes: a finished stage is
skipped, an unfinished one goes on from its newest checkpoint.
"""

import contextlib
import dataclasses
import datetime
import errno
import functools
import json
import os
import pathlib
import shutil
import sys
import time
import traceback
from typing import Literal

import jax

from rlhf_jax import ahead, chips, planner, processes, remedies, report, runners
from rlhf_jax import config as configs
from rlhf_jax.checkpoint import read_meta
from rlhf_jax.data.chat import open_chat
from rlhf_jax.data.examples import fingerprint
from rlhf_jax.data.padding_token import with_pad_token
from rlhf_jax.data.text import (
  check_vocabulary,
  export_tokenizer,
  load_tokenizer,
  save_tokenizer,
  train_tokenizer,
  with_begin,
)
from rlhf_jax.errors import CheckpointError, ConfigError, PreemptedError, ProcessError, RlhfJaxError
from rlhf_jax.model import huggingface, running
from rlhf_jax.model.config import preset
from rlhf_jax.model.device import describe
from rlhf_jax.model.forward import check_length
from rlhf_jax.model.heads import LanguageModel, ScalarModel, initial_params
from rlhf_jax.processes import ProcessesConfig
from rlhf_jax.stages import ppo, reward, sft
from rlhf_jax.stages.task import PARTS, Run
from rlhf_jax.startup import prepare_process, say_unused_gpu

Stage = Literal['sft', 'reward', 'ppo']
_STAGES = {'sft': sft, 'reward': reward, 'ppo': ppo}
_DATA_FACTS = 'data.json'
_START_AGAIN = 75  # exit status: saved as asked, not finished
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclasses.dataclass(frozen=True)
class Command:
  """Flags that say what to do, and do not belong to the experiment."""
  stages: tuple[Stage, ...] = ('sft', 'reward', 'ppo')  # which to run; each needs those before it, here or from earlier
  run_dir: str = ''  # where everything is written; empty: runs/NAME
  restart: bool = False  # delete what an earlier run left in the run directory
  export: bool = True  # write the finished models as Hugging Face directories
  plan: str = ''  # run nothing: compile for v5p:4x4x4, h100:8x4 or cpu:8, say whether all fits, and how fast
  json: bool = False  # the plan as JSON
  sized_for: str = ''  # take what the experiment sets for these devices, as --plan does; other flags take precedence
  compile_ahead: bool | None = None  # compile later programs beside the run; None: on accelerators, where cores are idle
  processes: ProcessesConfig = ProcessesConfig()


def main(experiment, make_task, description, name=None, args=None, sizes=None):
  """Runs an experiment from the command line, and exits as `clear_exits` says.

  `make_task(experiment)` gives the Task. `name` (the module's, by default) names the run directory. `sizes` has settings
  that suit a model preset on certain devices, {'llama3-8b': {'v5p:4x4x4': {'mesh.fsdp': 16}}}. --plan exits with 1 where
  they do not fit.
  """
  with clear_exits():
    experiment, command = _parse(experiment, description, args, sizes or {})
    prepare_process(experiment.mesh.cpu_devices)
    if command.plan:
      sys.exit(0 if show_plan(experiment, command) else 1)
  directory = pathlib.Path(command.run_dir or pathlib.Path('runs') / (name or pathlib.Path(sys.argv[0]).stem))
  with clear_exits(directory, command.processes.lost_s), processes.joined(command.processes):
    return run_stages(experiment, make_task, directory, command)


def _parse(default, description, args, sizes):
  """(experiment, command) of the flags, over what `sizes` says of the devices that they name."""
  experiment, command = configs.parse(default, Command(), description, args)
  if command.json and not command.plan:
    raise ConfigError('--json without --plan. It is the form of a plan: pass --plan TOPOLOGY.')
  if command.plan and command.sized_for:
    raise ConfigError(f'--plan {command.plan} and --sized-for {command.sized_for}. A plan takes the settings of its own '
                      'devices: pass one of the two.')
  sized, devices = sizes.get(experiment.preset, {}), command.plan or command.sized_for
  if devices in sized:
    experiment, command = configs.parse(configs.override(default, sized[devices] | {'preset': experiment.preset}), Command(),
                                        description, args)
  elif command.sized_for:
    raise ConfigError(f'--sized-for {command.sized_for}, but for {experiment.preset} this experiment has settings for: '
                      f'{", ".join(sized) or "nothing"}. Choose one of those, or set the mesh by its flags.')
  if default.pretrained and experiment.pretrained == default.pretrained and experiment.preset != default.preset \
     and not command.plan:
    raise ConfigError(f'--preset {experiment.preset}, but the weights are those of {experiment.pretrained}. Pass those of '
                      'that model, --pretrained MODEL; or --pretrained None, to start from fresh ones.')
  return experiment, command


@contextlib.contextmanager
def clear_exits(directory='', lost_s=0):
  """What ends a command early as one line, and an exit status: 2 for what the user can mend, 130 for Ctrl-C.

  75 (EX_TEMPFAIL) says: start it again. After SIGTERM, or the notice that a TPU is taken away, all is saved; or one of
  several processes did not come. With several also an error that nobody expected ends the process at once, in place of
  waiting for the others.
  """
  goes_on = f'The same command goes on from the last checkpoint in {directory}.'
  try:
    yield
  except PreemptedError as error:
    _say_error(f'Stopped as asked: {error}. {goes_on}')
    _leave(_START_AGAIN)
  except RlhfJaxError as error:
    _say_error(f'{type(error).__name__}: {error}')
    _leave(_START_AGAIN if isinstance(error, ProcessError) else 2)
  except KeyboardInterrupt:
    _say_error(f'\nStopped. {goes_on}')
    _leave(130)
  except Exception as error:
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
      _say_error(f'CheckpointError: {error}. What {directory} holds is complete up to the last checkpoint: free some space, '
                 'and the same command goes on from there.')
      _leave(2)
    if not processes.are_several() and not ahead.is_busy():
      raise
    traceback.print_exc()
    _leave(1, wait_s=lost_s + 5)


def _leave(status, wait_s=5):
  """Exits, without waiting for a program that is being compiled ahead."""
  if ahead.is_busy():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  processes.leave(status, wait_s)


def _say_error(text):
  print(f'process {jax.process_index()}: {text}' if processes.are_several() else text, file=sys.stderr, flush=True)


def run_stages(experiment, make_task, directory, command=Command()):
  """Runs the stages asked for, in their order; returns the results, which are in results.json too."""
  began = time.monotonic()
  prepare_process(experiment.mesh.cpu_devices)
  unknown = set(command.stages) - set(_STAGES)
  if unknown:
    raise ConfigError(f'there is no stage {min(unknown)!r}. Choose from: {", ".join(_STAGES)}.')
  say_unused_gpu()
  directory = pathlib.Path(directory)
  processes.once('run directory', lambda: _open_directory(experiment, directory, command))
  run = prepare(experiment, make_task, directory)
  results = _earlier_results(directory)
  stages = [name for name in _STAGES if name in command.stages]
  to_run = [name for name in stages if not run.finished(name)]
  with _compiling_ahead(run, to_run, command.compile_ahead):
    for name in stages:
      results[name] = _train(run, name) if name in to_run else _earlier_evaluation(run, name)
      if processes.first_says(command.export and not (run.stage(name) / 'export').exists()):
        _export(run, name)
      if processes.stop_asked():
        raise PreemptedError(f'{name} is finished')
  if 'ppo' in command.stages:
    with _clear_memory_errors(run, 'ppo'):
      table, said = ppo.compare(run)
    results['table'] = table
    processes.once('answers', lambda: _write_answers(directory, said))
    report.print_table(table, f'{len(said["SFT"][0])} answers to {len(run.task.prompts[1])} held-out prompts')
  _say_reward_accuracy(results)
  processes.once('results', lambda: _write_results(directory, results))
  written = [name for name in ('results.json', 'answers.jsonl', 'report.png') if (directory / name).exists()]
  print(f'{directory}: {", ".join(written)}; {time.monotonic() - began:.0f} s in all')
  return results


@contextlib.contextmanager
def _compiling_ahead(run, stages, asked):
  """Inside, the programs of these stages are compiled beside the run, where cores are idle."""
  platform = run.runner.mesh.devices.flat[0].platform
  programs = functools.partial(planner.programs, run, stages)
  run.runner.ahead.begin(programs, ahead.idle_threads(platform, asked))
  try:
    yield
  finally:
    run.runner.ahead.stop()


@contextlib.contextmanager
def _clear_memory_errors(run, stage):
  """Where memory runs out, an error that says what was needed and which settings help."""
  run.runner.calls.clear()
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not remedies.is_out_of_memory(error):
      raise
    raise remedies.out_of_memory(run, stage, error) from error


def _train(run, name):
  began = time.monotonic()
  with _clear_memory_errors(run, name):
    measured = _STAGES[name].train(run)
  print(f'{name}: {time.monotonic() - began:.0f} s')
  return measured


def _earlier_evaluation(run, name):
  print(f'{name}: finished before, skipped')
  return read_meta(run.checkpoints(name))['evaluation']


def prepare(experiment, make_task, directory):
  """The Run of an experiment: task, tokenizer, models and devices, checked against each other."""
  task = make_task(experiment)
  processes.once('data', lambda: _keep_data_facts(directory, task))
  began = datetime.datetime.fromisoformat(
    json.loads((directory / _DATA_FACTS).read_text())['began'])
  pretrained, generation_ends, tokenizer_dir = None, (), directory / 'tokenizer'
  if experiment.pretrained is not None:
    model_config = huggingface.read_config(experiment.pretrained, **_runtime(experiment))
    huggingface.find_weights(experiment.pretrained, model_config)                # says now what is missing, not at the stage
    pretrained = functools.partial(huggingface.load, experiment.pretrained, model_config)
    tokenizer = load_tokenizer(experiment.pretrained)
    generation_ends = huggingface.read_generation_ids(experiment.pretrained)
  else:
    model_config = preset(experiment.preset, **_runtime(experiment))
    processes.once('tokenizer', lambda: _make_tokenizer(tokenizer_dir, task.demonstrations[0], model_config.vocab_size))
    tokenizer = load_tokenizer(tokenizer_dir)
  if task.chat_template is not None:
    tokenizer.chat_template = with_begin(task.chat_template, tokenizer)
  reward_config = _reward_config(experiment, model_config)
  check_vocabulary(tokenizer, policy=model_config, reward=reward_config)
  chat = _chat(tokenizer, generation_ends, model_config.vocab_size, began)
  run = _run(experiment, task, chat, None, directory, model_config, reward_config, pretrained)
  _say_devices(experiment.mesh, run.runner)
  if running.device_of(run.policy.config).is_accelerator:
    said = {running.chosen(model.config) for model in (run.policy, run.reward)}
    print(*sorted(said), sep='\n')
  return run


def _chat(tokenizer, generation_ends, vocab_size, began):
  """The Chat of a run; says which of the model's end tokens are none of the tokenizer's."""
  unknown = [i for i in generation_ends if i not in tokenizer.added_tokens_decoder]
  if unknown:
    print(f'the generation config names the end tokens {unknown}, which are ordinary text to this '
          'tokenizer; they are left out')
  ends = open_chat(tokenizer, generation_ends=generation_ends, began=began).end_tokens
  try:
    tokenizer = with_pad_token(tokenizer, vocab_size, ends)
  except ConfigError as error:
    print(f'Exported reward models will be scored a token early by transformers: {error}')
  return open_chat(tokenizer, generation_ends=generation_ends, pad_token=tokenizer.pad_token_id,
                   began=began)


def _keep_data_facts(directory, task):
  """Writes down when the run began and what its data is; ConfigError where a stage has begun with
  other data.

  Before a stage has begun, what was made of other data is forgotten.
  """
  path, now = directory / _DATA_FACTS, _data_facts(task)
  begun = any((directory / name).exists() for name in _STAGES)
  facts = _read_data_facts(path)
  if begun and not facts:
    print(f'{path} is absent, so nobody knows whether the data is that which the run began with')
  changed = [f'{name}: {_counted(facts[name])} -> {_counted(now[name])}'
             for name in now if facts.get(name, now[name]) != now[name]]
  if changed and begun:
    raise ConfigError(f'the data of the run in {directory} has changed since it began; '
                      f'{"; ".join(changed)}. Go on with the data that it began with, or pass '
                      'another --run-dir, or --restart to delete the run and start anew.')
  if changed:
    shutil.rmtree(directory / 'tokenizer', ignore_errors=True)
  directory.mkdir(parents=True, exist_ok=True)
  _write_whole(path, json.dumps(
    {'began': datetime.datetime.now().isoformat()} | facts | now, indent=2))


def _read_data_facts(path):
  """What `_keep_data_facts` wrote; nothing where there is no file."""
  if not path.exists():
    return {}
  try:
    facts = json.loads(path.read_text())
    datetime.datetime.fromisoformat(facts['began'])
    _ = [_counted(fact) for name, fact in facts.items() if name != 'began']
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{path} is damaged ({type(error).__name__}: {error}): it should say '
                          'when the run began, and what its data is. Restore it, or delete it, if '
                          'you are sure that the data is the same.') from error
  return facts


def _data_facts(task):
  """Counts and fingerprints of a Task's examples. Rankings of answers yet to come have none."""
  recorded = {} if callable(task.comparisons) else {'comparisons': task.comparisons}
  splits = {'demonstrations': task.demonstrations, 'prompts': task.prompts} | recorded
  return {f'{name}, {part}': {'examples': len(examples), 'sha256': fingerprint(examples)}
          for name, split in splits.items() for part, examples in zip(PARTS, split)}


def _counted(facts):
  return f'{facts["examples"]:,} examples ({facts["sha256"][:8]})'


def prepare_shapes(experiment, devices, memory_bytes=None):
  """The Run of an experiment on devices that need not be here: without task, tokenizer and weights,
  for its shapes alone. `memory_bytes` is what programs may use of a device.
  """
  if _is_path(experiment.pretrained):
    model_config = huggingface.read_config(experiment.pretrained, **_runtime(experiment))
  else:                                                                         # what is on the hub has the preset's shapes
    model_config = preset(experiment.preset, **_runtime(experiment))
  reward_config = _reward_config(experiment, model_config)
  return _run(experiment, None, planner.CHAT, devices, None, model_config, reward_config,
              memory_bytes=memory_bytes)


def _run(experiment, task, chat, devices, directory, model_config, reward_config, pretrained=None,
         memory_bytes=None):
  for size in (model_config, reward_config):
    check_length(size, experiment.data.limits.tokens)
  device = describe(jax.devices()[0] if devices is None else devices[0], memory_bytes)
  model_config, reward_config = (dataclasses.replace(size, device=device)
                                 for size in (model_config, reward_config))
  for size in (model_config, reward_config):
    running.check_attention(size)
  policy, reward_model = LanguageModel(model_config), ScalarModel(reward_config)
  runner = make_runner(experiment.mesh, devices, (policy, reward_model))
  _check_answers(experiment.ppo, runner.batch_parts)
  return Run(experiment, task, chat, runner, directory, policy, reward_model, pretrained)


def _make_tokenizer(directory, demonstrations, vocab_size):
  """A tokenizer of the demonstrations' texts, unless there is one."""
  if directory.exists():
    return
  texts = [turn.text for example in demonstrations for turn in example.prompt]
  texts += [response for example in demonstrations for response in example.responses]
  unfinished = directory.with_suffix('.unfinished')
  save_tokenizer(train_tokenizer(texts, vocab_size), unfinished)
  unfinished.rename(directory)


def _runtime(experiment):
  """What an experiment says of how models compute, whatever their size."""
  return {name: getattr(experiment, name) for name in ('dtype', 'attention', 'remat', 'scan_layers')}


def _reward_config(experiment, model_config):
  if experiment.reward_preset is None:
    return model_config
  if experiment.ppo.shared_trunk:
    raise ConfigError("a value head on the policy's trunk, but a reward model of another size "
                      f'({experiment.reward_preset}). Drop --reward-preset or --ppo.shared-trunk.')
  return preset(experiment.reward_preset, vocab_size=model_config.vocab_size, **_runtime(experiment))


def show_plan(experiment, command):
  """Prints what the programs of a Command cost on its topology, and what would help; returns whether all of them fit."""
  devices = chips.devices(command.plan)
  say = lambda text: print(text, file=sys.stderr, flush=True)
  memory_bytes = chips.memory_of(command.plan)
  prepare_it = lambda experiment: prepare_shapes(experiment, devices, memory_bytes)
  run, suggestion = prepare_it(experiment), None
  if not _is_path(experiment.pretrained) and experiment.pretrained is not None:
    say(f'{experiment.pretrained} is not looked at: the plan takes the sizes of the preset {experiment.preset}')
  if run.runner.mesh.size < len(devices):
    say(f'--mesh.runner {runner_name(experiment.mesh, devices)} uses {run.runner.mesh.size} of the '
        f'{len(devices)} devices')
  made = planner.plan(run, command.plan, command.stages, say=say)
  if made.too_large:
    suggestion = remedies.suggest(experiment, made, prepare_it, configs.override, len(devices), command.stages, say)
  if command.json:
    print(json.dumps(planner.to_json(made, suggestion), indent=2))
  else:
    print(planner.markdown(made))
    if made.too_large:
      print(f'It fits with {remedies.flags(suggestion)}' if suggestion else
            'Nothing that was tried makes it fit: take more or larger chips, or shorter sequences.')
  return not made.too_large


def _is_path(pretrained):
  """Whether that is a directory, or can be nothing else, and not the name of a model on the hub."""
  return pretrained is not None and (pathlib.Path(pretrained).is_dir() or pretrained.startswith(('.', '/', '~')))


def _check_answers(config, parts):
  """ConfigError, before the first stage, where the devices do not divide what PPO wants answered."""
  for flag, count in (('--ppo.batch-size', config.batch_size), ('--ppo.slots', config.slots)):
    if count is not None and count % parts:
      raise ConfigError(f'{flag} is {count}, which does not divide over the {parts} parts into which the devices cut a '
                        f'batch. Pass a multiple of {parts}, or --mesh.runner single, which uses one device.')


def make_runner(mesh, devices=None, models=()):
  """The Runner that a MeshConfig names, on the devices of all processes unless others are given.

  `models` are those whose parameters it will hold: where the config leaves `fsdp` open, it takes
  what their widths allow.
  """
  devices = jax.devices() if devices is None else devices
  name = runner_name(mesh, devices)
  if name == 'single':
    return runners.single(devices[0])
  if name == 'pmap':
    return runners.pmapped(devices)
  fsdp = _fsdp(mesh, len(devices), models) if mesh.fsdp is None else mesh.fsdp
  return runners.sharded(data=mesh.data, fsdp=fsdp, tensor=mesh.tensor, devices=devices)


def runner_name(mesh, devices):
  """Which runner a MeshConfig means on these devices."""
  if mesh.runner != 'auto':
    return mesh.runner
  sized = (mesh.data, mesh.fsdp, mesh.tensor) != (None, None, 1)
  several_accelerators = len(devices) > 1 and devices[0].platform != 'cpu'
  return 'sharded' if sized or several_accelerators else 'single'


def _fsdp(mesh, count, models):
  """How many ways to cut parameters where no flag says it: over all devices that are left, as far
  as the parameters divide.
  """
  if mesh.tensor < 1:
    return 1                                                                     # which `sharded` refuses
  if mesh.data is not None:
    return max(1, count // max(1, mesh.data * mesh.tensor))
  shapes = {
    str(number): jax.eval_shape(lambda model=model: initial_params(model, jax.random.key(0)))
    for number, model in enumerate(models)}
  return runners.largest_fsdp(shapes, count // mesh.tensor, mesh.tensor)


def _say_devices(mesh, runner):
  """A line on how the run lies on its devices, where that was not said by flags."""
  chosen = mesh.runner == 'auto' or (runner.name == 'sharded' and mesh.fsdp is None)
  if chosen and runner.mesh.size > 1:
    sizes = ' '.join(f'--mesh.{axis} {size}' for axis, size in runner.mesh.shape.items())
    print(f'{runner.mesh.size} devices: chosen is --mesh.runner {runner.name} {sizes}')


def _open_directory(experiment, directory, command):
  """The run directory, with experiment.json in it; raises ConfigError where it holds a run of another config."""
  path = directory / 'experiment.json'
  try:
    if command.restart and directory.exists():
      if not path.exists() and any(directory.iterdir()):
        raise ConfigError(f'{directory} holds files but no experiment.json, so it is not a run directory and is not '
                          'deleted. Choose another --run-dir.')
      shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if path.exists():
      _check_same(path, experiment)
    unfinished = path.with_suffix('.unfinished')
    unfinished.write_text(json.dumps(configs.to_json(experiment), indent=2))
    unfinished.rename(path)
  except OSError as error:
    raise CheckpointError(f'cannot write to the run directory {directory}: {error.strerror}. '
                          'Choose another --run-dir.') from error


def _check_same(path, experiment):
  """ConfigError where a stage of another config has begun; before that, what a failed start left does not count.

  On which devices it runs may change: a checkpoint is restored onto any mesh.
  """
  directory = path.parent
  try:
    changed = configs.changes(json.loads(path.read_text()), experiment)
  except ValueError as error:
    raise ConfigError(f'{path} is not JSON ({error}), so nobody knows which run this is. Choose another --run-dir, or '
                      'pass --restart to delete it and start anew.') from error
  if changed and any((directory / name).exists() for name in _STAGES):
    raise ConfigError(f'{directory} holds a run of another config: {"; ".join(changed)}. Pass the same flags to go on, '
                      'another --run-dir, or --restart to delete it and start anew.')
  if changed:
    shutil.rmtree(directory / 'tokenizer', ignore_errors=True)


def _export(run, name):
  """The finished stage's model as a Hugging Face directory, with its tokenizer."""
  kind = 'scalar' if name == 'reward' else 'language'
  params = _STAGES[name].restore(run)
  params = params['policy'] if name == 'ppo' else params
  model = run.reward if name == 'reward' else run.policy
  target = run.stage(name) / 'export'
  unfinished = target.with_suffix('.unfinished')

  def fetch(leaf):
    if processes.stop_asked():
      raise PreemptedError(f'{name} is finished, its export will be written again')
    return run.runner.fetch(leaf)
  ends = run.chat.end_tokens
  huggingface.save(unfinished, model.config, params, kind=kind,
                   end_token=list(ends) if len(ends) > 1 else ends[0],
                   pad_token=run.chat.pad_token, begin_token=run.chat.begin_token, fetch=fetch)

  def finish():
    export_tokenizer(run.chat.tokenizer, unfinished, 'right' if kind == 'scalar' else 'left')
    unfinished.rename(target)
  processes.once(f'exported {name}', finish)


def _earlier_results(directory):
  """What an earlier command with fewer stages measured in this run directory."""
  path = directory / 'results.json'
  return json.loads(path.read_text()) if path.exists() else {}


def _write_results(directory, results):
  _write_whole(directory / 'results.json', json.dumps(results, indent=2, default=float))
  report.draw(directory)


def _write_whole(path, text):
  """The file with that text, or as it was: never half of it."""
  unfinished = path.with_suffix('.unfinished')
  unfinished.write_text(text)
  unfinished.rename(path)


def _write_answers(directory, said):
  """Every held-out prompt with the answers of both policies, as answers.jsonl."""
  rows = zip(said['SFT'][0], said['SFT'][1], said['PPO'][1], strict=True)
  lines = [json.dumps(ppo.said_row(prompt, {'SFT': before, 'PPO': after}), ensure_ascii=False)
           for prompt, before, after in rows]
  (directory / 'answers.jsonl').write_text('\n'.join(lines) + '\n')


def _say_reward_accuracy(results):
  """One line on how good the reward model is, with its interval and what was possible."""
  found = results.get('reward')
  if not found or 'accuracy_low' not in found:
    return
  possible = f', of {found["ceiling"]:.1%} that the labellers\' noise allows' if 'ceiling' in found else ''
  print(f'Reward model: {found["accuracy"]:.1%} of {found["pairs"]:.0f} held-out pairs ordered rightly '
        f'(95 % interval {found["accuracy_low"]:.1%} to {found["accuracy_high"]:.1%}){possible}')
