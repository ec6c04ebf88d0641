"""The small models and the directory whose first two stages are finished, for all tests of stages."""

from small import finished, presets

__all__ = ['finished', 'presets']
