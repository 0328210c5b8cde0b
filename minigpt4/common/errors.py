"""The error that is the user's to mend."""


class ConfigError(ValueError):
    """A mistake in a YAML file, in `--options` or in a file they name.

    The message names the key or file, what is wrong with it, and the fix; the commands print it without a traceback.
    """
