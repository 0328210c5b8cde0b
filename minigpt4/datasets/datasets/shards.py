"""From `storage` in a YAML to a list of shards that exist."""

import glob
import os
from collections.abc import Iterable

from braceexpand import braceexpand

from minigpt4.common.errors import ConfigError


def expand_shards(storage: str | Iterable[str], name: str) -> list[str]:
    """All shards that `storage` names, in order.

    storage: a path or URL, or a list of them. Each may have brace ranges (`{00000..01255}.tar`); local paths may also
    have globs (`*.tar`) and `~`. `pipe:command` and URLs are not checked.
    name: the dataset's name in the YAML, for messages.
    Raises FileNotFoundError if local shards of a pattern are missing, ConfigError for an empty list.
    """
    key = f"datasets.{name}.build_info.storage"
    # In quotes, or the shell would expand the braces.
    advice = f"Set it in the YAML or with --options '{key}=/data/{name}/{{00000..00099}}.tar'"
    items = [storage] if isinstance(storage, str) else list(storage or [])
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise ConfigError(f"{key}={storage!r} names no shards. {advice}")
    try:
        return [shard for item in items for shard in _expand(item.strip())]
    except OSError as error:
        raise type(error)(f"{key}={error} {advice}") from None


def shards_of_argument(patterns: list[str]) -> list[str]:
    """All local shards that the argument `--shards` of a command stands for, in order.

    patterns: paths with brace ranges, globs and `~`, as in `expand_shards`.
    Raises ConfigError for a pattern none or only some of whose shards exist, and for one that is not a path.
    """
    try:
        shards = [shard for pattern in patterns for shard in _expand(pattern)]
    except OSError as error:
        raise ConfigError(f"--shards {error}") from None
    remote = [shard for shard in shards if not is_local(shard)]
    if remote:
        raise ConfigError(f"--shards {remote[0]}: only files on this machine can be read.")
    return shards


def is_local(shard: str) -> bool:
    """Whether the shard is a path, not a URL or a command."""
    return not shard.startswith("pipe:") and "://" not in shard


def _expand(pattern: str) -> list[str]:
    shards = [shard for part in pattern.split("::") for shard in braceexpand(part)]
    local = [os.path.expanduser(shard) for shard in shards if is_local(shard)]
    if len(local) < len(shards):
        return shards
    if any(glob.has_magic(path) for path in local):
        found = sorted({path for p in local for path in ([p] if os.path.exists(p) else glob.glob(p))})
        if not found:
            raise FileNotFoundError(f"{pattern}: no file matches.")
        local = found
    _check_files(local, pattern)
    return local


def _check_files(paths: list[str], pattern: str) -> None:
    """Raise if a path is not there. Each folder is listed once: ten thousand single look-ups are slow on NFS."""
    if os.path.isdir(paths[0]):
        raise IsADirectoryError(
            f"{pattern}: {paths[0]} is a folder; name the shards in it: {paths[0].rstrip('/')}/*.tar."
        )
    listed = {folder: _files_in(folder) for folder in {os.path.dirname(path) for path in paths}}
    missing = [path for path in paths if os.path.basename(path) not in listed[os.path.dirname(path)]]
    if not missing:
        return
    if os.path.exists(missing[0]):
        raise OSError(f"{pattern}: {missing[0]} is a pipe or a device, not a file. For a command, write pipe:COMMAND.")
    folder = os.path.dirname(missing[0]) or "."
    hint = "" if os.path.isdir(folder) else f" There is no folder {folder}."
    if len(missing) < len(paths):
        hint = f" To take what is there: {folder}/*.tar."
    raise FileNotFoundError(f"{pattern}: {len(missing)} of {len(paths)} shards are missing, e.g. {missing[0]}.{hint}")


def _files_in(folder: str) -> set[str]:
    """The names in a folder, without pipes and devices: reading one might never end."""
    if not os.path.isdir(folder or "."):
        return set()
    with os.scandir(folder or ".") as entries:
        return {e.name for e in entries if e.is_symlink() or e.is_file(follow_symlinks=False) or e.is_dir()}
