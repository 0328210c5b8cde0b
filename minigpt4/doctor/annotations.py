"""A look at a cc_sbu_align folder, as `CCSBUAlignDataset` wants it."""

import json
from pathlib import Path

from minigpt4.common.text import pluralize
from minigpt4.weights import locate


def read_records(folder: Path) -> tuple[int, str | None]:
    """How many records its list has, and what is wrong with the folder, if anything."""
    listing, pictures = folder / "filter_cap.json", folder / "image"
    if not listing.is_file():
        return 0, f"{listing} is not there"
    reason = locate.why_unreadable(listing)
    if reason:
        return 0, f"{listing}: {reason}"
    if not pictures.is_dir():
        return 0, f"{pictures} is not there"
    try:
        records = json.loads(listing.read_text(encoding="utf-8"))["annotations"]
        ids = {str(record["image_id"]) for record in records}
    except (ValueError, KeyError, TypeError) as error:
        return 0, f'{listing} is not of the form {{"annotations": [{{"image_id": …, "caption": …}}, …]}} ({error!r})'
    missing = ids - {path.stem for path in pictures.iterdir()}
    if missing:
        some = f"{len(missing)} of {pluralize(len(records), 'record')}"
        return len(records), f"{some} without a picture in {pictures}, e.g. {min(missing)}"
    return len(records), None
