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
    items = [storage] if isinstance(storage, str) else list(storage or [])
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise ConfigError(f"{_key(name)}={storage!r} names no shards. {_advice(name)}")
    return [shard for item in items for shard in _expand(item.strip(), name)]


def is_local(shard: str) -> bool:
    """Whether the shard is a path, not a URL or a command."""
    return not shard.startswith("pipe:") and "://" not in shard


def _expand(pattern: str, name: str) -> list[str]:
    shards = [shard for part in pattern.split("::") for shard in braceexpand(part)]
    local = [os.path.expanduser(shard) for shard in shards if is_local(shard)]
    if len(local) < len(shards):
        return shards
    if any(glob.has_magic(path) for path in local):
        found = sorted({path for p in local for path in glob.glob(p)})
        if not found:
            raise FileNotFoundError(f"{_key(name)}={pattern}: no file matches. {_advice(name)}")
        local = found
    _check_files(local, pattern, name)
    return local


def _check_files(paths: list[str], pattern: str, name: str) -> None:
    """Raise if a path does not exist. Each folder is listed once: ten thousand single look-ups are slow on NFS."""
    if os.path.isdir(paths[0]):
        raise IsADirectoryError(
            f"{_key(name)}={pattern}: {paths[0]} is a folder; name the shards in it: {paths[0].rstrip('/')}/*.tar"
        )
    listed = {folder: _names_in(folder) for folder in {os.path.dirname(path) for path in paths}}
    missing = [path for path in paths if os.path.basename(path) not in listed[os.path.dirname(path)]]
    if not missing:
        return
    folder = os.path.dirname(missing[0]) or "."
    hint = "" if os.path.isdir(folder) else f" There is no folder {folder}."
    if len(missing) < len(paths):
        hint = f" To take what is there: {folder}/*.tar."
    raise FileNotFoundError(
        f"{_key(name)}={pattern}: {len(missing)} of {len(paths)} shards are missing, e.g. {missing[0]}.{hint} "
        f"{_advice(name)}"
    )


def _names_in(folder: str) -> set[str]:
    return set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()


def _key(name: str) -> str:
    return f"datasets.{name}.build_info.storage"


def _advice(name: str) -> str:
    # in quotes, or the shell would expand the braces
    return f"Set it in the YAML or with --options '{_key(name)}=/data/{name}/{{00000..00099}}.tar'"
