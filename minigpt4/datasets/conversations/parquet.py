"""Random access to the rows of a Parquet file, as Hugging Face's datasets have them."""

import bisect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.conversations.text_files import optional

log = logging.getLogger(__name__)

LARGE_GROUP = 64  # MB
# Behind the name of a column of pictures, or of lists of them.
PICTURE_BYTES = re.compile(r"(\.list\.\w+)?\.bytes$")


class ParquetRows:
    """The rows of a file. Reading one reads its row group, so the last group is kept."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError if pyarrow is missing or the file is broken."""
        self.path = path
        self._last: tuple[Any, Any] = (None, None)
        meta = self._open().metadata
        groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self.columns: list[str] = self._open().schema_arrow.names
        largest = max((group.total_byte_size for group in groups), default=0) >> 20
        if largest > LARGE_GROUP:
            log.warning("%s: each sample in random order reads up to %d MB. Shards are faster.", path, largest)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": (None, None)}

    def where(self, index: int) -> str:
        return f"{self.path} row {index}"

    @contextmanager
    def reader(self, check: bool = False) -> Iterator[Callable[[int], dict]]:
        """A function that gives the row at an index. check: bytes of pictures that are there come as b""."""
        file = None

        def read(index: int) -> dict:
            nonlocal file
            group = bisect.bisect_right(self._ends, index)
            if self._last[0] != (group, check):
                file = file or self._open()
                try:
                    self._last = ((group, check), self._read_group(file, group, check))
                except (ValueError, OSError) as error:
                    if getattr(error, "errno", None) is not None:  # of the system: it may pass
                        raise
                    raise ConfigError(
                        f"is in a part of the file that is broken: {' '.join(str(error).split())}. Fetch it again."
                    ) from None
            table, emptied = self._last[1]
            start = int(self._ends[group - 1]) if group else 0
            row = table.slice(index - start, 1).to_pylist()[0]
            for name in emptied:
                for picture in row[name] if isinstance(row[name], list) else [row[name]]:
                    picture["bytes"] = b""
            return row

        yield read

    def _read_group(self, file: Any, group: int, check: bool) -> tuple[Any, list[str]]:
        """A row group, and its columns of which "bytes" was left out because no picture lacks it."""
        if not check:
            return file.read_row_group(group), []
        parts = file.metadata.row_group(group)
        chunks = {part.path_in_schema: part for part in map(parts.column, range(parts.num_columns))}
        whole = {path for path, chunk in chunks.items() if chunk.statistics and chunk.statistics.null_count == 0}
        pictures = {path: PICTURE_BYTES.sub("", path) for path in whole if PICTURE_BYTES.search(path)}
        left_out = {
            path: name
            for path, name in pictures.items()
            if name in self.columns and path.removesuffix("bytes") + "path" in chunks
        }
        table = file.read_row_group(group, columns=sorted(chunks.keys() - left_out.keys()))
        return table, [*left_out.values()]

    def _open(self) -> Any:
        parquet = optional("pyarrow.parquet", "pyarrow", self.path)
        try:
            return parquet.ParquetFile(self.path)
        except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
            raise ConfigError(
                f"{self.path} is no Parquet file, or a broken one: {' '.join(str(error).split())}. Fetch it again."
            ) from None
