"""Describe pictures and videos: one JSON object a line, {"image": path, "caption": text}.

    python -m minigpt4 caption cat.jpg dog.png --cfg-path eval_configs/minigpt4_tiny_eval.yaml
    python -m minigpt4 caption --dir photos --out captions.jsonl --cfg-path …
    python -m minigpt4 caption --shards "cc_sbu/{00000..00009}.tar" --out captions.jsonl --cfg-path …
    python -m minigpt4 caption --shards "laion/*.tar" --out-dir captions --part $SLURM_ARRAY_TASK_ID/16 --cfg-path …
    torchrun --nproc_per_node 4 -m minigpt4 caption --dir photos --out captions.jsonl --cfg-path …

Of a video, the model sees --frames pictures at even distances, and its line has their number: {…, "frames": 8}. An
interrupted run continues where it stopped if it gets the same --out and settings, which are kept in
<out>.settings.json. Unreadable files are skipped, and listed last and in <out>.errors.jsonl. --out-dir writes a file
for each shard. --part I/N takes a part of the files or shards, for jobs of an array; I counts from 0.
"""

import argparse
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4 import PACKAGE_ROOT
from minigpt4.cli import arguments
from minigpt4.cli.caption_sources import Item, Sources, listed, named_sources
from minigpt4.common import facts
from minigpt4.common.commands import check_positive, command_parser, path_argument, text_argument
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.parallel import THREADS, Batch, answer_in_batches, write_answers
from minigpt4.common.resumable import Lines, Output, open_output
from minigpt4.conversation import Decoding, PictureError, open_media, open_picture, videos

if TYPE_CHECKING:
    from minigpt4.serving.offline import OfflineAnswers


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("caption", __doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures and videos")
    parser.add_argument(
        "--dir", type=path_argument, metavar="FOLDER", help="all pictures and videos in a folder and those below it"
    )
    parser.add_argument("--shards", nargs="+", metavar="TAR", help="webdataset tars; globs and {00..09} are expanded")
    out = parser.add_mutually_exclusive_group()
    out.add_argument("--out", type=path_argument, metavar="FILE", help="JSONL file to append to (the screen)")
    out.add_argument("--out-dir", type=path_argument, metavar="FOLDER", help="a JSONL file here for each shard")
    parser.add_argument("--part", type=_part, metavar="I/N", help="part I of N, from 0; FILE becomes FILE-I-of-N")
    about = "a question for model.prompt_template, or a whole prompt with <ImageHere>"
    parser.add_argument("--prompt", type=text_argument, metavar="TEXT", help=about)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (%(default)s)")
    workers = "threads that read pictures ahead, in each process (%(default)s)"
    parser.add_argument("--workers", type=int, default=THREADS, metavar="N", help=workers)
    arguments.add_model_arguments(parser)
    arguments.add_answer_arguments(parser, sample=False)
    args = arguments.parse(parser, argv, arguments.AnswerSettings)
    if not (args.images or args.dir or args.shards):
        parser.error("give pictures, --dir or --shards")
    if args.out_dir and (args.images or args.dir):
        parser.error("--out-dir writes a file for each shard of --shards; use --out with pictures and --dir")
    check_positive(parser, args, ("batch_size", "workers"))
    return args


def _part(text: str) -> tuple[int, int]:
    """The numbers of `3/16`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not part < parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, as in 0/16 … 15/16")
    return part, parts


def main(argv: list[str]) -> int:
    """Describe the pictures and videos that the arguments name. Returns 1 if some could not be read."""
    args = parse_args(argv)
    cfg = Config(args)
    cfg.check_paths()
    sources = named_sources(args.images, args.dir, args.shards or [])
    outputs = [*outputs_of(sources, args.out, args.out_dir, args.part)]
    from minigpt4.common import dist_utils
    from minigpt4.common.logger import setup_logger
    from minigpt4.conversation.loading import load_chat, select_gpu

    setup_logger()
    gpu = None if args.gpu_id is None else select_gpu(cfg, args.gpu_id)
    with dist_utils.process_group(cfg.run_cfg, gpu) as device:
        chat, unreadable = None, []
        for path, part in outputs:
            with open_output(path, settings_of(args, cfg), LINES) as output:
                if chat is None:  # after the first file was checked
                    chat = load_chat(cfg, device)
                    template = getattr(chat.model, "template", None)
                    around = template.prompt if template else cfg.model_cfg.get("prompt_template")
                    captioner = Captioner(chat, args, around)
                unreadable += caption(part, captioner, output)
    return 1 if unreadable else 0


def outputs_of(
    sources: Sources, out: Path | None, out_dir: Path | None, part: tuple[int, int] | None
) -> Iterator[tuple[Path | None, Sources]]:
    """Each file that this run writes (None: the screen), and what it describes there.

    Raises ConfigError if that is nothing, or if two shards would have the same file.
    """
    if part:
        number, parts = part
        sources.files, sources.shards = sources.files[number::parts], sources.shards[number::parts]
        if not sources.files and not sources.shards:
            raise ConfigError(f"--part {number}/{parts} has nothing to describe: there are fewer files or shards.")
    if not out_dir:
        if out and part:
            out = out.with_name(f"{out.stem}-{number:05}-of-{parts:05}{out.suffix}")
        yield out, sources
        return
    files = {}
    for shard in sources.shards:
        path = out_dir / f"{Path(shard).stem}.jsonl"
        if path in files:
            raise ConfigError(f"--out-dir {out_dir}: {files[path]} and {shard} have the same name. Run them apart.")
        files[path] = shard
        yield path, Sources(shards=[shard])


def _image(entry: Any) -> str | None:
    """The image that a line describes; None: this command did not write the line."""
    ours = entry.keys() - {"frames"} == {"image", "caption"} and isinstance(entry["image"], str)
    return entry["image"] if ours else None


LINES = Lines("minigpt4 caption", "caption", b'{"image": ', _image)


def settings_of(args: argparse.Namespace, cfg: Config) -> dict[str, Any]:
    """What the captions depend on: {name: value}, for JSON."""
    prompt, file = args.prompt, cfg.model_cfg.get("prompt_path")
    if prompt is None and file:  # the first of the file, which may be edited
        lines = Path(file).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        prompt = next((line for line in lines if facts.IMAGE_SLOT in line), None)
    settings = {"prompt": prompt} | arguments.given(args, arguments.AnswerSettings)
    # Another installation of this package has the same files elsewhere.
    plain = json.loads(json.dumps(cfg.to_dict(), default=str).replace(json.dumps(str(PACKAGE_ROOT))[1:-1], "minigpt4"))
    settings |= {f"model.{key}": value for key, value in plain["model"].items()}
    settings["run.video_backend"] = plain["run"]["video_backend"]
    ckpt = settings.get("model.ckpt")
    if ckpt and os.path.isdir(ckpt):
        settings["model.ckpt"] = str(next(iter(facts.checkpoints_in(Path(ckpt))), ckpt))
    settings["preprocess.vis_processor"] = plain["preprocess"]["vis_processor"]
    for name, dataset in plain["datasets"].items():
        settings[f"datasets.{name}.vis_processor"] = dataset.get("vis_processor")
    return settings


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
        from minigpt4.models.template import join_parts

        self._chat = chat
        self._batch_size, self._workers = args.batch_size, args.workers
        self._frames = args.frames
        self._decoding = Decoding(**arguments.given(args, Decoding))
        prompts = getattr(chat.model, "prompt_list", None) or [IMAGE_SLOT]
        self._prompt = args.prompt or prompts[0]
        if IMAGE_SLOT not in self._prompt:
            self._prompt = (template or "{}").replace("{}", join_parts([None, args.prompt]))
        if self._prompt.count(IMAGE_SLOT) != 1:
            raise ConfigError(f"--prompt {self._prompt!r} must have {IMAGE_SLOT} once: each line is about one file.")
        self._slot = IMAGE_TURN if IMAGE_TURN in self._prompt else IMAGE_SLOT

    def load(self, item: Item):
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

    def describe(self, items: list[tuple[str, list]]) -> list[dict]:
        """The lines of items, each of which is a name and a list of processed pictures."""
        import torch

        if self._decoding.seed is not None:
            torch.manual_seed(self._decoding.seed)
        images = torch.stack([picture for _, pictures in items for picture in pictures]).to(self._chat.device)
        prompts = [self._prompt_for(len(pictures)) for _, pictures in items]
        model, loop = self._chat.model, self._chat.decoding_loop
        captions = model.generate(images, prompts, decoding_loop=loop, **self._decoding.options())
        return [_entry(name, len(pictures), text) for (name, pictures), text in zip(items, captions, strict=True)]

    def batches(self, items: Iterator[Item]) -> Iterator[Batch]:
        """Describe items: together token by token, if the model and the settings allow it."""
        if self._together:
            return self._together.batches(items, self.load, _entry)
        return answer_in_batches(items, self.load, self.describe, self._batch_size, self._workers)

    @cached_property
    def _together(self) -> "OfflineAnswers | None":
        from minigpt4.serving.offline import OfflineAnswers
        from minigpt4.serving.together import computes_together

        if self._decoding.num_beams > 1 or not computes_together(self._chat):
            return None
        return OfflineAnswers(self._chat, self._prompt_for, self._decoding, self._batch_size, self._workers)

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


def caption(sources: Sources, captioner: Captioner, output: Output) -> list[str]:
    """Describe this rank's share of the pictures that `output` lacks. Returns why all ranks skipped pictures."""
    from minigpt4.common import dist_utils

    files, own = sources.share(output.done, dist_utils.get_rank(), dist_utils.get_world_size())
    total = None if sources.shards else len(files)
    skipped = write_answers(captioner.batches(own), output, "caption", total)
    # Every rank has counted the files of the folder, and each the shards that it read.
    passed_over = sum(dist_utils.gather_objects(sources.passed_in_shards), sources.passed_in_folders)
    if passed_over:
        logging.warning("Passed over, since they are no pictures or videos: %s.", listed(passed_over))
    return skipped


def _entry(name: str, pictures: int, text: str) -> dict:
    """The line of an item."""
    return {"image": name, "caption": text} | ({"frames": pictures} if videos.is_video(name) else {})
