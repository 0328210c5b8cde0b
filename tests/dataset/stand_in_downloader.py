"""Replaces img2dataset in tests: takes the flags of dataset/download_*.sh and writes shards in img2dataset's format."""

import argparse
import csv
import io
import json
import tarfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("url_list", "output_folder", "input_format", "url_col", "caption_col", "output_format"):
        parser.add_argument(f"--{flag}", required=True)
    for flag in ("processes_count", "thread_count", "image_size", "number_sample_per_shard", "timeout"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    for flag in ("enable_wandb", "distributor"):
        parser.add_argument(f"--{flag}", required=True)
    args = parser.parse_args()
    assert (args.input_format, args.output_format, args.enable_wandb) == ("tsv", "webdataset", "False")
    source = Path(args.url_list)
    rows = []
    for path in sorted(source.glob("*.tsv")) if source.is_dir() else [source]:
        with open(path, encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file, delimiter="\t")
    Path(args.output_folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.thread_count) as pool:
        for shard, start in enumerate(range(0, len(rows), args.number_sample_per_shard)):
            part = rows[start : start + args.number_sample_per_shard]
            contents = pool.map(lambda row: download(row[args.url_col], args.timeout, args.image_size), part)
            write_shard(Path(args.output_folder) / f"{shard:05d}.tar", shard, part, list(contents), args.caption_col)


def download(url: str, timeout: int, size: int) -> tuple[bytes | None, str | None]:
    """(JPEG, None), or (None, the reason why there is no picture)."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            image = Image.open(io.BytesIO(answer.read())).convert("RGB").resize((size, size))
    except OSError as error:
        return None, str(error)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), None


def write_shard(path: Path, shard: int, rows, contents, caption_col: str) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (row, (jpeg, error)) in enumerate(zip(rows, contents, strict=True)):
            if jpeg is None:
                continue
            key = f"{shard:05d}{number:04d}"
            caption = row[caption_col]
            about = {"caption": caption, "url": row["url"], "key": key, "status": "success", "error_message": error}
            members = {"jpg": jpeg, "txt": caption.encode(), "json": json.dumps(about, indent=4).encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    failed = sum(jpeg is None for jpeg, _ in contents)
    stats = {"count": len(rows), "successes": len(rows) - failed, "failed_to_download": failed}
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats))


if __name__ == "__main__":
    main()
