"""Error and warning classes that users of PEFT catch."""


class PeftError(Exception):
    """What the adapter layer raises beyond Python's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The adapter matches no module of the model."""


class PeftWarning(UserWarning):
    """What the adapter layer warns of."""


class IncompleteConfigError(PeftError, ValueError, TypeError):
    """An ``adapter_config.json`` without what makes it one."""
