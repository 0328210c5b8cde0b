"""Describe pictures: one JSON object a line, {"image": path, "caption": text}.

    python -m minigpt4 caption cat.jpg dog.png --cfg-path eval_configs/minigpt4_tiny_eval.yaml
    python -m minigpt4 caption --dir photos --out captions.jsonl --cfg-path …
    python -m minigpt4 caption --shards "cc_sbu/{00000..00009}.tar" --out captions.jsonl --cfg-path …
    torchrun --nproc_per_node 4 -m minigpt4 caption --dir photos --out captions.jsonl --cfg-path …

A run that was interrupted goes on where it stopped, when it is given the same --out. Unreadable files are skipped and
listed at the end.
"""

import argparse
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from minigpt4.cli.arguments import (
    add_decoding_arguments,
    add_model_arguments,
    decoding_settings,
    expand_shards,
)
from minigpt4.cli.parallel import ahead, batches
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="minigpt4 caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures")
    parser.add_argument("--dir", metavar="FOLDER", help="all pictures in a folder and the folders in it")
    parser.add_argument("--shards", nargs="+", metavar="TAR", help="webdataset tars; globs and {00..09} are expanded")
    parser.add_argument("--out", metavar="FILE", help="JSONL file to add to; left out: the screen")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="question, put into model.prompt_template, or a whole prompt with <ImageHere>"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (%(default)s)")
    add_model_arguments(parser)
    add_decoding_arguments(parser, do_sample=False)
    args = parser.parse_args(argv)
    if not (args.images or args.dir or args.shards):
        parser.error("give pictures, --dir or --shards")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Describe what the arguments name. Returns 1 if some pictures could not be read."""
    args = parse_args(argv)
    cfg = Config(args)
    cfg.check_paths()
    items = Items(args)
    from minigpt4.common import dist_utils
    from minigpt4.common.logger import setup_logger
    from minigpt4.conversation.loading import load_chat, select_gpu

    setup_logger()
    device = dist_utils.select_device(cfg.run_cfg.device) if args.gpu_id is None else select_gpu(cfg, args.gpu_id)
    dist_utils.init_process_group(device, cfg.run_cfg.dist_backend, cfg.run_cfg.distributed)
    try:
        chat = load_chat(cfg, device)
        unreadable = caption(items, Captioner(chat, args, cfg.model_cfg.prompt_template), Output(args.out))
    finally:
        dist_utils.destroy_process_group()
    return 1 if unreadable else 0


class Items:
    """The pictures to describe: iterating gives (name, path or bytes).

    `total` is their number, or None where shards make it unknown. Raises ConfigError when there are none.
    """

    def __init__(self, args: argparse.Namespace):
        self._files = [Path(path) for path in args.images]
        if args.dir:
            if not Path(args.dir).is_dir():
                raise ConfigError(f"--dir {args.dir} is not a folder.")
            self._files += sorted(path for path in Path(args.dir).rglob("*") if path.suffix.lower() in SUFFIXES)
        self._shards = expand_shards(args.shards or [])
        if not self._files and not self._shards:
            raise ConfigError(f"--dir {args.dir} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
        self.total = None if self._shards else len(self._files)

    def __iter__(self) -> Iterator[tuple[str, Path | bytes]]:
        for path in self._files:
            yield str(path), path
        for shard in self._shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                        yield f"{shard}/{member.name}", tar.extractfile(member).read()


class Captioner:
    """Describes pictures, several at a time.

    Args:
        chat: the model and its image processor.
        args: has `prompt`, `batch_size` and the decoding settings.
        template: how a question is wrapped, `{}` standing for it.
    """

    def __init__(self, chat, args: argparse.Namespace, template: str | None):
        from minigpt4.conversation import Decoding
        from minigpt4.models.prompt import IMAGE_SLOT

        self._chat = chat
        self.batch_size = args.batch_size
        self._decoding = Decoding(**decoding_settings(args))
        prompts = chat.model.prompt_list or [IMAGE_SLOT]
        self._prompt = args.prompt or prompts[0]
        if IMAGE_SLOT not in self._prompt:
            self._prompt = (template or "{}").replace("{}", f"<Img>{IMAGE_SLOT}</Img> {args.prompt}")

    def load(self, item: tuple[str, Path | bytes]):
        """Read an item: (name, processed picture [3,H,W], or the PictureError that tells why there is none)."""
        from minigpt4.conversation import PictureError, open_picture

        name, source = item
        try:
            source = io.BytesIO(source) if isinstance(source, bytes) else source
            return name, self._chat.vis_processor(open_picture(source, Path(name).name))
        except PictureError as error:
            return name, error

    def describe(self, pictures: list) -> list[str]:
        """The captions of processed pictures."""
        import torch

        if self._decoding.seed is not None:
            torch.manual_seed(self._decoding.seed)
        images = torch.stack(pictures).to(self._chat.device)
        return self._chat.model.generate(images, [self._prompt] * len(pictures), **self._decoding.options())


class Output:
    """The JSONL file, or the screen. With several ranks each adds to a part of its own until `finish`."""

    def __init__(self, path: str | None):
        from minigpt4.common import dist_utils

        self._path = Path(path) if path else None
        self._rank, self._ranks = dist_utils.get_rank(), dist_utils.get_world_size()
        self._own = self._path
        self.done: set[str] = set()
        if self._path is None:
            return
        if self._ranks > 1:
            self._own = self._path.with_name(f"{self._path.name}.part{self._rank}")
        self.finish()  # of an earlier run
        if self._path.is_file():
            self.done = {json.loads(line)["image"] for line in _whole_lines(self._path)}
        dist_utils.gather_objects(None)  # all have read before any writes

    def write(self, names: list[str], captions: list[str]) -> None:
        """Add lines; they are on disk when this returns, so that an interrupted run can go on."""
        lines = [
            json.dumps({"image": name, "caption": text}, ensure_ascii=False) + "\n"
            for name, text in zip(names, captions, strict=True)
        ]
        if self._path is None:
            print("".join(lines), end="", flush=True)
            return
        with self._own.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def finish(self) -> None:
        """Rank 0 puts the parts of all ranks together."""
        from minigpt4.common import dist_utils

        dist_utils.gather_objects(None)  # all have written
        if self._rank == 0 and self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for part in sorted(self._path.parent.glob(f"{self._path.name}.part*")):
                with self._path.open("a", encoding="utf-8") as file:
                    file.writelines(_whole_lines(part))
                part.unlink()
        dist_utils.gather_objects(None)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file; the last one is cut from it if a run was interrupted while writing it."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines), encoding="utf-8")
    return lines


def caption(items: Items, captioner: Captioner, output: Output) -> list[str]:
    """Describe this rank's share of what is not done. Returns why pictures were skipped, of all ranks."""
    from tqdm import tqdm

    from minigpt4.common import dist_utils

    rank, ranks = dist_utils.get_rank(), dist_utils.get_world_size()
    own = islice((item for item in items if item[0] not in output.done), rank, None, ranks)
    total = items.total and len(range(rank, max(0, items.total - len(output.done)), ranks))
    skipped = []
    with ThreadPoolExecutor(4) as pool, tqdm(total=total, unit="picture", disable=rank > 0) as bar:
        for batch in batches(ahead(pool, captioner.load, own, 2 * captioner.batch_size), captioner.batch_size):
            good = [(name, picture) for name, picture in batch if not isinstance(picture, Exception)]
            skipped += [f"{name}: {error}" for name, error in batch if isinstance(error, Exception)]
            if good:
                names, pictures = zip(*good, strict=True)
                output.write(names, captioner.describe(pictures))
            bar.update(len(batch))
    output.finish()
    skipped = [line for lines in dist_utils.gather_objects(skipped) for line in lines]
    if skipped:
        logging.warning("%d pictures were skipped:\n  %s", len(skipped), "\n  ".join(skipped))
    return skipped
