"""Runnable experiments: each module's docstring says its question, command, hardware, time and expected numbers."""
