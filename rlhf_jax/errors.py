"""Errors that a caller can cause. Each message says what it is and what was got; what is needed; what to do."""

import typing


class RlhfJaxError(ValueError):
  """What every error of this package is, so that a program can catch them all by one name."""


class AxesError(RlhfJaxError):
  """Arrays whose shapes do not fit the letters of their names, or each other."""


class ConfigError(RlhfJaxError):
  """A setting, or two settings together, that cannot work."""


class DataError(RlhfJaxError):
  """A record, file or array that is not what it should be; the message names the place."""


class CheckpointError(RlhfJaxError):
  """Saved parameters that are missing, damaged, or of another model."""


class DamagedError(CheckpointError):
  """A checkpoint whose bytes are not those that were saved; an older one may do."""


class ShardingError(RlhfJaxError):
  """Sizes that a mesh does not divide, or an array that no partition rule covers."""


class DivergedError(RlhfJaxError):
  """A loss, gradient or score that is not a finite number; training stops before it spoils a checkpoint."""


class DeviceMemoryError(RlhfJaxError):
  """A program, or what a stage keeps beside it, that the memory of the devices does not hold."""


class ProcessError(RlhfJaxError):
  """Processes of one run that do not come together."""


class PreemptedError(Exception):
  """A run that was asked to stop, and will lose nothing when it goes on: nobody's mistake."""


def check_fields(what, config, *rules):
  """Raises ConfigError for the first of `rules` that does not hold: (field, holds, what it must be,
  what to do).
  """
  for field, holds, needed, do in rules:
    if not holds:
      raise ConfigError(f'{what} {field}={getattr(config, field)!r}. It must be {needed}. {do}.')


def check_choices(config):
  """Raises ConfigError for a field of a frozen dataclass whose value is not among those of its Literal type."""
  for name, kind in typing.get_type_hints(type(config)).items():
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    if choices and getattr(config, name) not in choices:
      raise ConfigError(f'{type(config).__name__} {name}={getattr(config, name)!r}. Choose one of: '
                        f'{", ".join(map(repr, choices))}.')
