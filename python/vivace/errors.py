"""Every error a user of Vivace can meet. One root, so that one `except` is enough.

A message says where, what we got, what we need and what to do.
"""


class VivaceError(Exception):
    """Root of all errors raised on purpose by Vivace."""


class ArgumentError(VivaceError, ValueError):
    """An argument has a value that no call accepts."""


class PlanError(VivaceError, ValueError):
    """A sampling plan breaks a legality rule."""


class PlanFileError(PlanError):
    """A plan file cannot be read: damaged, of another version, or not a plan."""


class UnsupportedError(VivaceError, ValueError):
    """A known method, field or feature that this release does not cover; the message names it."""


class ShapeError(VivaceError, ValueError):
    """A tensor has the wrong shape."""


class DtypeError(VivaceError, TypeError):
    """A tensor has the wrong dtype."""


class BackendError(VivaceError, RuntimeError):
    """A backend was asked for by name and cannot run here, or cannot run this."""


class ModelError(VivaceError, ValueError):
    """A checkpoint is missing, damaged, or of another architecture."""


class PromptError(VivaceError, ValueError):
    """A prompt names nothing the model knows."""


class StateError(VivaceError, RuntimeError):
    """A request state is used after it was finished, aborted, or in another session."""


class OutputError(VivaceError, OSError):
    """A file cannot be written; nothing was left behind."""


class PackError(VivaceError, ValueError):
    """An exported pack is damaged, tampered with, of another version, or lacks what was asked of it."""
