"""Describe pictures and videos: one JSON object a line, {"image": path, "caption": text}.

    python -m minigpt4 caption cat.jpg dog.png --cfg-path eval_configs/minigpt4_tiny_eval.yaml
    python -m minigpt4 caption --dir photos --out captions.jsonl --cfg-path …
    python -m minigpt4 caption --shards "cc_sbu/{00000..00009}.tar" --out captions.jsonl --cfg-path …
    torchrun --nproc_per_node 4 -m minigpt4 caption --dir photos --out captions.jsonl --cfg-path …

Of a video, the model sees --frames pictures at even distances, and its line has their number: {…, "frames": 8}. An
interrupted run continues where it stopped if it gets the same --out. Unreadable files are skipped, and listed last.
"""

import argparse
import io
import json
import logging
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import escape
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from minigpt4.cli import arguments
from minigpt4.cli.parallel import batches_ahead
from minigpt4.common.commands import check_positive, command_parser
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.conversation import Decoding, PictureError, open_media, open_picture, videos

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("caption", __doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures and videos")
    parser.add_argument("--dir", metavar="FOLDER", help="all pictures and videos in a folder and its subfolders")
    parser.add_argument("--shards", nargs="+", metavar="TAR", help="webdataset tars; globs and {00..09} are expanded")
    parser.add_argument("--out", metavar="FILE", help="JSONL file to append to (the screen)")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="a question for model.prompt_template, or a whole prompt with <ImageHere>"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (%(default)s)")
    arguments.add_model_arguments(parser)
    arguments.add_answer_arguments(parser, sample=False)
    args = arguments.parse(parser, argv, arguments.AnswerSettings)
    if not (args.images or args.dir or args.shards):
        parser.error("give pictures, --dir or --shards")
    check_positive(parser, args, ("batch_size",))
    return args


def main(argv: list[str]) -> int:
    """Describe the pictures and videos that the arguments name. Returns 1 if some could not be read."""
    args = parse_args(argv)
    cfg = Config(args)
    cfg.check_paths()
    files, shards = named_files(args)
    from minigpt4.common import dist_utils
    from minigpt4.common.logger import setup_logger
    from minigpt4.conversation.loading import load_chat, select_gpu

    setup_logger()
    gpu = None if args.gpu_id is None else select_gpu(cfg, args.gpu_id)
    with dist_utils.process_group(cfg.run_cfg, gpu) as device:
        chat = load_chat(cfg, device)
        captioner = Captioner(chat, args, cfg.model_cfg.prompt_template)
        unreadable = caption(files, shards, captioner, Output(args.out))
    return 1 if unreadable else 0


# How a line of the JSONL file begins.
LINE_START = b'{"image": '


def named_files(args: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The files and the shards to describe. Raises ConfigError if there are none, and for files that do not exist."""
    from minigpt4.datasets.datasets.shards import shards_of_argument

    files = [Path(path) for path in args.images]
    arguments.check_files(files)
    if args.dir:
        if not Path(args.dir).is_dir():
            raise ConfigError(f"--dir {args.dir} is not a folder.")
        kinds = SUFFIXES | {*videos.SUFFIXES}
        files += sorted(path for path in Path(args.dir).rglob("*") if path.suffix.lower() in kinds)
    shards = shards_of_argument(args.shards or [])
    if not files and not shards:
        raise ConfigError(f"--dir {args.dir} holds no pictures or videos ({', '.join(sorted(kinds))}).")
    return list(dict.fromkeys(files)), shards  # a file may be named, and be in the folder too


def read_items(files: list[Path], shards: list[str]) -> Iterator[tuple[str, Path | bytes | PictureError]]:
    """Yield (name, path or bytes) of each picture and video, or (tar, PictureError) for a damaged tar."""
    for path in files:
        yield str(path), path
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                        yield f"{shard}/{member.name}", tar.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            yield shard, PictureError(f"the rest of this tar cannot be read: {error}")


class Captioner:
    """Describes pictures and videos, several at a time.

    Args:
        chat: the model and its image processor.
        args: with `prompt`, `batch_size`, `frames` and the decoding settings.
        template: the text around a question, which replaces `{}`.

    Raises ConfigError for a prompt with more than one image slot.
    """

    def __init__(self, chat, args: argparse.Namespace, template: str | None):
        from minigpt4.conversation.conversation import IMAGE_TURN
        from minigpt4.models.prompt import IMAGE_SLOT

        self._chat = chat
        self.batch_size = args.batch_size
        self._frames = args.frames
        self._decoding = Decoding(**arguments.given(args, Decoding))
        prompts = getattr(chat.model, "prompt_list", None) or [IMAGE_SLOT]
        self._prompt = args.prompt or prompts[0]
        if IMAGE_SLOT not in self._prompt:
            self._prompt = (template or "{}").replace("{}", f"{IMAGE_TURN} {args.prompt}")
        if self._prompt.count(IMAGE_SLOT) != 1:
            raise ConfigError(f"--prompt {self._prompt!r} must have {IMAGE_SLOT} once: each line is about one file.")
        self._slot = IMAGE_TURN if IMAGE_TURN in self._prompt else IMAGE_SLOT

    def load(self, item: tuple[str, Path | bytes | PictureError]):
        """Read an item. Returns (name, processed pictures [3,H,W]), or (name, PictureError) if there are none."""
        name, source = item
        try:
            if isinstance(source, PictureError):
                raise source
            if isinstance(source, bytes):
                pictures = [open_picture(io.BytesIO(source), Path(name).name)]
            else:
                pictures = open_media(source, self._frames, self._chat.video_backend)
            self._check_length(Path(name).name, len(pictures))
            return name, [self._chat.vis_processor(picture) for picture in pictures]
        except PictureError as error:
            return name, error

    def describe(self, items: list[list]) -> list[str]:
        """The captions of the items, each of which is a list of processed pictures."""
        import torch

        if self._decoding.seed is not None:
            torch.manual_seed(self._decoding.seed)
        images = torch.stack([picture for pictures in items for picture in pictures]).to(self._chat.device)
        prompts = [self._prompt_for(len(pictures)) for pictures in items]
        chat = self._chat
        return chat.model.generate(images, prompts, decoding_loop=chat.decoding_loop, **self._decoding.options())

    def _prompt_for(self, pictures: int) -> str:
        return self._prompt.replace(self._slot, " ".join([self._slot] * pictures))

    def _check_length(self, name: str, pictures: int) -> None:
        """Raise PictureError if the model's context cannot hold so many pictures: it would silently write nonsense."""
        new, window = self._decoding.max_new_tokens, self._chat.window()
        length = self._chat.num_tokens(self._prompt_for(pictures))
        if length + new > window:
            raise PictureError(
                f"{name} takes {length} tokens with its prompt, and its caption up to {new}; the model has room for "
                f"{window}. Lower --frames or --max-new-tokens."
            )


class Output:
    """The JSONL file, or the screen. Of several ranks, each writes to a file of its own until `finish`."""

    def __init__(self, path: str | None):
        from minigpt4.common import dist_utils

        self._path = self._own = Path(path) if path else None
        self.done: set[str] = set()
        if self._path is None:
            return
        if self._path.is_dir():
            raise ConfigError(f"--out {path} is a folder; name a file in it.")
        if dist_utils.is_distributed():
            self._own = self._path.with_name(f"{self._path.name}.part{dist_utils.get_rank()}")
        self.finish()  # an earlier run
        if self._path.is_file():
            self.done = {_image(line) for line in _whole_lines(self._path)}
        dist_utils.barrier()  # all ranks have read before any writes

    def write(self, entries: list[dict]) -> None:
        """Append lines. They are on disk when this returns, so that an interrupted run can be continued."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        # A file name that is not UTF-8 has lone surrogates. JSON escapes them just like Python's backslashreplace.
        content = lines.encode("utf-8", "backslashreplace")
        if self._path is None:
            print(content.decode(), end="", flush=True)
            return
        with self._own.open("ab") as file:
            file.write(content)

    def finish(self) -> None:
        """Rank 0 appends the files of all ranks to the JSONL file."""
        from minigpt4.common import dist_utils

        dist_utils.barrier()  # all ranks have written
        if self._path and dist_utils.is_main_process():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for part in sorted(self._path.parent.glob(f"{escape(self._path.name)}.part[0-9]*")):
                with self._path.open("ab") as file:
                    file.writelines(_whole_lines(part))
                part.unlink()
        dist_utils.barrier()


def _whole_lines(path: Path) -> list[bytes]:
    """The complete lines of a file. One that a run was interrupted in is cut off the file.

    Raises ConfigError for a file that this command did not write; the file stays as it is then.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    lines = content[:end].splitlines(keepends=True)  # of bytes, since U+2028 in a caption would end a line of text
    rest = content[end:]
    if rest and not _is_cut_off(rest):
        lines.append(rest + b"\n")
    for line in lines:
        if _image(line) is None:
            raise ConfigError(f"--out {path} exists, and its line {line[:60]!r} is not a caption. Name another file.")
    whole = b"".join(lines)
    if whole != content:
        path.write_bytes(whole)
    return lines


def _is_cut_off(line: bytes) -> bool:
    """Whether a line is the beginning of one that this command writes."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(LINE_START) or LINE_START.startswith(line)
    return False


def _image(line: bytes) -> str | None:
    """The image that a line describes; None: this command did not write the line."""
    try:
        entry = json.loads(line)
        return entry["image"] if "caption" in entry else None
    except (ValueError, KeyError, TypeError):
        return None


def caption(files: list[Path], shards: list[str], captioner: Captioner, output: Output) -> list[str]:
    """Describe this rank's share of the pictures that `output` lacks. Returns why all ranks skipped pictures."""
    from minigpt4.common import dist_utils

    rank, ranks = dist_utils.get_rank(), dist_utils.get_world_size()
    own = islice((item for item in read_items(files, shards) if item[0] not in output.done), rank, None, ranks)
    total = None if shards else len([path for path in files if str(path) not in output.done][rank::ranks])
    skipped, written = [], 0
    with ThreadPoolExecutor(4) as pool, tqdm(total=total, unit="file", disable=rank > 0) as bar:
        for batch in batches_ahead(pool, captioner.load, own, captioner.batch_size):
            good = [(name, pictures) for name, pictures in batch if not isinstance(pictures, Exception)]
            skipped += [f"{name}: {error}" for name, error in batch if isinstance(error, Exception)]
            if good:
                captions = captioner.describe([pictures for _, pictures in good])
                output.write([_entry(*item, text) for item, text in zip(good, captions, strict=True)])
                written += len(good)
            bar.update(len(batch))
    output.finish()
    skipped = [line for lines in dist_utils.gather_objects(skipped) for line in lines]
    if skipped:
        logging.warning("Skipped, %d in all:\n  %s", len(skipped), "\n  ".join(skipped))
    written = sum(dist_utils.gather_objects(written))
    logging.info("%s written; %d were there already.", pluralize(written, "caption"), len(output.done))
    return skipped


def _entry(name: str, pictures: list, text: str) -> dict:
    """The line of an item."""
    return {"image": name, "caption": text} | ({"frames": len(pictures)} if videos.is_video(name) else {})
