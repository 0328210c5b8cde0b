"""Convert BLIP's list for LAION (115 million pairs) to TSVs for `download_laion.sh`.

    python convert_laion.py --rows-per-file 1000000     # img2dataset loads a file whole
    python convert_laion.py --limit 1000                # a first try
    python convert_laion.py                             # one file, in the working directory

The list: https://storage.googleapis.com/sfr-vision-language-research/BLIP/datasets/laion_synthetic_filtered_large.json

The JSON is streamed, so memory does not grow with its length. This file can be copied anywhere: it needs ijson and tqdm
alone. convert_cc_sbu.py and convert_laion.py differ in these names only; a test compares them.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import BinaryIO

try:
    import ijson
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"Error: {error}. Install what this script needs: pip install ijson tqdm")

NAME = "laion_synthetic_filtered_large"  # of the list and of the TSV
COLUMNS = ("caption", "url")
# img2dataset reads through pyarrow, which reads the file in blocks of this size. It ends each block at its last line
# break, even if that is inside quotes.
READ_BLOCK = 1 << 20


class ConvertError(ValueError):
    """The JSON file is not a list of pairs, or files of an earlier conversion are in the way."""


def convert(source: Path, target: Path, limit: int | None = None, rows_per_file: int | None = None) -> Counter[str]:
    """Write the pairs of `source` to `target`.

    Args:
        limit: convert only the first `limit` pairs.
        rows_per_file: write files of this many pairs, `<target without .tsv>/00000.tsv` …, instead of one file.
            img2dataset reads a folder too.

    Returns:
        The number of pairs "written", and for each cause the number of objects left out.

    Raises:
        ConvertError: `source` is not a list of pairs, or `target` exists, or the folder has .tsv files already. An
            incomplete file is removed.
    """
    counts: Counter[str] = Counter()
    size = source.stat().st_size
    with open(source, "rb") as file, tqdm.wrapattr(file, "read", total=size, desc=source.name) as wrapped:
        # Tutorials cut the first release's `rows = …` here; --limit 1000 takes the first 1,000 pairs.
        pairs = islice(read_pairs(wrapped, counts), limit)
        for path, first in zip(_paths(target, rows_per_file), pairs, strict=False):
            rest = islice(pairs, rows_per_file - 1) if rows_per_file else pairs
            counts["written"] += write_tsv(path, chain([first], rest))
    if not counts["written"]:
        raise ConvertError(f'{source} holds no pairs. Expected a list: [{{"caption": "…", "url": "…"}}, …].')
    return counts


def _paths(target: Path, rows_per_file: int | None) -> Iterator[Path]:
    """The files to write: `target`, or files of its folder without end."""
    if rows_per_file is None:
        if target.exists():
            raise ConvertError(f"{target} exists already. Move it away, or name another file with --output.")
        return iter([target])
    folder = target.with_suffix("")
    if any(folder.glob("*.tsv")):
        raise ConvertError(f"{folder} has .tsv files already, which img2dataset would read too. Move them away.")
    return (folder / f"{number:05d}.tsv" for number in count())


def read_pairs(file: BinaryIO, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """(caption, URL) of each object of a JSON list; objects that lack one are counted by cause.

    Raises ConvertError with the number of objects after which the file is not JSON.
    """
    number = 0
    try:
        for number, item in enumerate(ijson.items(file, "item"), 1):  # noqa: B007 (used in the error)
            values = [item.get(name) if isinstance(item, dict) else None for name in COLUMNS]
            missing = [n for n, v in zip(COLUMNS, values, strict=True) if not (isinstance(v, str) and v.strip())]
            if missing:
                left_out[f"no {' and no '.join(missing)}"] += 1
            else:
                yield tuple(values)
    except ijson.JSONError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConvertError(f"Not JSON after {number:,} objects. Was the download cut off? {reason}") from error


def write_tsv(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Write a header and the rows. Returns the number of rows. The file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    number = 0
    try:
        with open(part, "wb") as file:
            size = file.write(tsv_line(COLUMNS))
            for number, row in enumerate(rows, 1):  # noqa: B007 (returned)
                line = tsv_line(row)
                room = READ_BLOCK - size % READ_BLOCK
                if len(line) > room and (b"\n" in line[:-1] or b"\r" in line):
                    # Fill the block with empty lines, which readers skip, so that it does not end inside this row.
                    size += file.write(b"\n" * room)
                size += file.write(line)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return number


def tsv_line(fields: tuple[str, ...]) -> bytes:
    """A line of the TSV. A field with tabs, quotes or line breaks is quoted, as csv, pandas and pyarrow do it."""
    quoted = ('"' + text.replace('"', '""') + '"' if re.search('[\t\r\n"]', text) else text for text in fields)
    return ("\t".join(quoted) + "\n").encode(errors="replace")


def main(usage: str | None = __doc__, name: str = NAME, argv: list[str] | None = None) -> None:
    """The command. name: of the list and the TSV, without suffix."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may have characters that the screen cannot show
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=f"{name}.json", metavar="FILE", help="JSON list (%(default)s)")
    parser.add_argument("--output", type=Path, default=f"{name}.tsv", metavar="FILE", help="TSV (%(default)s)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="convert the first N pairs only")
    parser.add_argument(
        "--rows-per-file", type=_positive, metavar="N", help=f"write files of N rows into a folder ({name}/)"
    )
    args = parser.parse_args(argv)
    if args.limit is None:
        print("Converting all pairs. For a first try, --limit 1000 takes the first 1,000.", file=sys.stderr)
    try:
        counts = convert(args.input, args.output, args.limit, args.rows_per_file)
    except FileNotFoundError:
        sys.exit(
            f"Error: there is no {args.input}. Name the list with --input; README_1_STAGE.md says where to get it."
        )
    except (ConvertError, OSError) as error:
        sys.exit(f"Error: {error}")
    written = counts.pop("written")
    for cause, number in counts.most_common():
        print(f"Left out {number:,} objects with {cause}.")
    target = args.output.with_suffix("") if args.rows_per_file else args.output
    print(f"Wrote {written:,} pairs to {target}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


if __name__ == "__main__":
    main()
