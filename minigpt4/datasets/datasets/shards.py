"""From `storage` in a YAML to a list of shards that exist."""

import glob
import os
from collections.abc import Sequence
from typing import Any

from braceexpand import braceexpand

from minigpt4.common.errors import ConfigError

# The characters of patterns.
PATTERN = frozenset("*?[{")


def expand_shards(storage: str | Sequence[str], name: str) -> list[str]:
    """All shards that `storage` names, in order.

    storage: a path or URL, or a list of them. Each may have brace ranges (`{00000..01255}.tar`); local paths may also
    have globs (`*.tar`) and `~`. A folder or file that exists under exactly this name wins over a pattern.
    `pipe:command` and URLs are not checked.
    name: the dataset's name in the YAML, for messages.
    Raises FileNotFoundError if local shards of a pattern are missing, ConfigError for an empty list.
    """
    advice = how_to_set(name, f"/data/{name}/{{00000..00099}}.tar")
    try:
        return [shard for item in listed_storage(storage, name, "shards", advice) for shard in _expand(item.strip())]
    except OSError as error:
        raise type(error)(f"datasets.{name}.build_info.storage={error} {advice}") from None


def listed_storage(storage: Any, name: str, kind: str, advice: str) -> list[str]:
    """The paths of `build_info.storage`, which is one or a list of them. Raises ConfigError for anything else.

    kind, advice: what a path names, and how to set it, for the message.
    """
    items = [storage] if isinstance(storage, str) else [*storage] if isinstance(storage, Sequence) else []
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise ConfigError(f"datasets.{name}.build_info.storage={storage!r} names no {kind}. {advice}")
    return items


def how_to_set(name: str, example: str) -> str:
    """Advice on the storage of a dataset. It is in quotes, or a shell would expand braces."""
    return f"Set it in the YAML or with --options 'datasets.{name}.build_info.storage={example}'"


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
    parts = [_existing_part(part) if is_local(part) else ("", part) for part in _split_list(pattern)]
    shards = [folder + path for folder, rest in parts for path in (braceexpand(rest) if rest else [""])]
    if not all(map(is_local, shards)):
        return shards
    if any(glob.has_magic(rest) for _, rest in parts):
        shards = sorted({path for shard in shards for path in _matches(shard)})
        if not shards:
            raise FileNotFoundError(f"{pattern}: no file matches.")
    _check_files(shards, pattern)
    return shards


def _split_list(pattern: str) -> list[str]:
    """The parts of `a.tar::b.tar`; a folder may have `::` in its name."""
    path = os.path.expanduser(pattern)
    folder = os.path.dirname(path)
    if "::" not in path or os.path.exists(path) or ("::" in folder and os.path.isdir(folder)):
        return [path]
    return [os.path.expanduser(part) for part in pattern.split("::")]


def _existing_part(path: str) -> tuple[str, str]:
    """A path, split behind the last of its folders that exists under exactly this name, `[`, `*` and `{` included."""
    end = len(path)
    if not PATTERN.intersection(path):
        return path, ""
    while end and not os.path.exists(path[:end]):
        end = path.rfind("/", 0, end - 1) + 1
    return path[:end], path[end:]


def _matches(path: str) -> list[str]:
    """The files that a pattern matches. At each level, a folder with exactly this name wins over the pattern."""
    folder, rest = _existing_part(path)
    if not rest:
        return [path]
    name, slash, below = rest.partition("/")
    found = glob.glob(glob.escape(folder) + name + slash)
    return [match for each in found for match in _matches(each + below)] if slash else found


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
