"""What a worker process of `data check` does: it reads a part of a dataset, or looks at pictures."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import UnidentifiedImageError

from minigpt4.common.files import read_regular
from minigpt4.data_tools.findings import Finding
from minigpt4.data_tools.lengths import Length
from minigpt4.data_tools.pictures import SIGNATURE, Look, look_at
from minigpt4.data_tools.sources import Fault, Source
from minigpt4.data_tools.tar_order import look_at_names
from minigpt4.datasets.captions import Unusable, usable
from minigpt4.datasets.conversations.batch import Conversation
from minigpt4.datasets.conversations.dataset import conversation_of
from minigpt4.datasets.conversations.record import Record

ROW = np.dtype(
    [
        ("part", "i4"),
        ("item", "i4"),
        ("id", "u8"),
        ("content", "u8"),
        ("length", "i4"),
        ("lost", "i4"),
        ("usable", "?"),
    ]
)
LOOK = [
    ("width", "i4"),
    ("height", "i4"),
    ("sharpness", "f4"),
    ("contrast", "f4"),
    ("signature", f"V{SIGNATURE.itemsize}"),
]
# path: number of the path, or -1 for a picture inside the data, which is looked at already.
PICTURE = np.dtype([("row", "i8"), ("number", "i4"), ("path", "i8"), *LOOK])


@dataclass
class PartReport:
    """What was seen in a part. The numbers in the arrays count from 0 within it."""

    findings: list[Finding] = field(default_factory=list)
    wheres: list[str] = field(default_factory=list)
    """The place of each row."""
    rows: list[tuple] = field(default_factory=list)
    """As ROW, of the records without a fault, and of pictures without text; an array in the end."""
    pictures: list[tuple] = field(default_factory=list)
    """As PICTURE."""
    paths: list[str] = field(default_factory=list)
    num_records: int = 0
    """With those that have a fault."""


def examine_part(source: Source, measure: Callable[[Conversation], Length], part: int) -> PartReport:
    """Read the records of a part. Pictures inside the data are looked at; of others, the path is kept."""
    report = PartReport()
    for number, item in enumerate(source.read(part)):
        report.num_records += not (isinstance(item, Fault) and item.kind == "shard")
        record, length = item, Length(0)
        if isinstance(item, Fault):
            report.findings.append(Finding(item.kind, item.where, item.what))
            record = item.record
        else:
            try:
                length = measure(as_trained(item, source.text_processor))
            except Unusable as cause:
                report.findings.append(Finding("text", item.where, str(cause)))
                continue
        if record and add_pictures(report, record):
            is_whole = record is item
            report.rows.append((part, number, _hash(record.id), _content(record), length.length, length.lost, is_whole))
            report.wheres.append(record.where)
            report.findings += findings_of_text(record, length) if is_whole else []
    if source.shards:
        shard = source.shards[part]
        report.findings += look_at_names(shard)
        report.findings += [] if report.rows else [Finding("empty_shard", shard)]
    report.rows, report.pictures = np.array(report.rows, dtype=ROW), np.array(report.pictures, dtype=PICTURE)
    return report


def as_trained(record: Record, text_processor: Callable[[str], str] | None) -> Conversation:
    """The conversation with its captions as training reads them. Raises Unusable."""
    conversation = conversation_of(record)
    if text_processor is None:
        return conversation
    *before, (role, (caption,)) = conversation
    return (*before, (role, (usable(text_processor(caption)),)))


def add_pictures(report: PartReport, record: Record) -> bool:
    """Add the pictures of a record, unless one inside the data cannot be read, which is reported."""
    looks = [source if isinstance(source, str) else look_or_reason(source) for source in record.pictures]
    for source, look in zip(record.pictures, looks, strict=True):
        if isinstance(source, bytes) and isinstance(look, str):
            report.findings.append(Finding("picture", record.where, look))
            return False
    for number, look in enumerate(looks):
        path = -1
        if isinstance(look, str):
            path, look = len(report.paths), Look(0, 0, 0, 0, b"")
            report.paths.append(record.pictures[number])
        report.pictures.append((len(report.rows), number, path, *look))
    return True


def findings_of_text(record: Record, length: Length) -> list[Finding]:
    found = []
    if not length.has_labels:
        found.append(Finding("no_label", record.where))
    if length.lost:
        what = f"{length.lost:,} of {length.length:,} tokens are lost"
        found.append(Finding("cut", record.where, what, badness=length.lost))
    if length.broken_up:
        found.append(Finding("broken_up", record.where, "they are broken up by a space"))
    if not record.pictures:
        found.append(Finding("no_picture", record.where))
    return found


def look_or_reason(source: str | bytes) -> Look | str:
    """A look at a picture, or the reason why it cannot be read."""
    try:
        return look_at(read_regular(source) if isinstance(source, str) else source)
    except UnidentifiedImageError:
        return "it is no picture"
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # Pillow's plug-ins raise nearly every kind of error on broken files
        return f"{type(error).__name__}: {error}"


def _content(record: Record) -> int:
    """A hash of the texts and pictures."""
    texts = [f"{message.role} {part}" for message in record.messages for part in message.parts if isinstance(part, str)]
    return _hash("\n".join([*texts, *(p if isinstance(p, str) else f"{_hash(p)}" for p in record.pictures)]))


def _hash(content: str | bytes) -> int:
    content = content.encode("utf-8", errors="surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
