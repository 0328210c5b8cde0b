"""Questions with references, from files that are recognised by their content, and from datasets.

The formats are those of benchmarks, below, and those of training data (`datasets.conversations`).
"""

import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, check_names
from minigpt4.datasets.captions import Unusable
from minigpt4.datasets.conversations import formats
from minigpt4.datasets.conversations.dataset import conversation_of
from minigpt4.datasets.conversations.listed import open_coco
from minigpt4.datasets.conversations.record import Picture, Record
from minigpt4.datasets.conversations.text_files import TextFile, decode, parse_json
from minigpt4.datasets.splits import spread
from minigpt4.evaluation.example import Example

PICTURE = (("user", (None,)),)
"""A picture alone: a caption is asked for."""
PICTURES = {"image", "image_features"}
"""Keys of a sample's picture."""
TYPES = {"question": str, "text": str, "image": str, "answers": list, "choices": list}
"""Of the values that benchmarks have at these keys."""
SHORT = 5  # words: references that are no longer are answers to compare as a whole


class Folder:
    """Finds the pictures of a benchmark, whose files name them by numbers.

    check: whether a picture that is not there is a mistake.
    """

    def __init__(self, images: str | None, path: str, check: bool) -> None:
        self.folder = os.path.abspath(images or os.path.dirname(os.path.abspath(path)))
        self.check = check
        self._there: set[str] = set()
        with suppress(OSError):
            self._there = set(os.listdir(self.folder))

    def __call__(self, where: str, *names: str) -> str:
        """The path of the first of some names that is there. Raises ConfigError about `where` if none is."""
        found = next((name for name in names if name in self._there), None)
        if found is None and self.check and not os.path.exists(os.path.join(self.folder, names[0])):
            raise ConfigError(
                f"{where} asks about a picture {' or '.join(names)}, which is not in {self.folder}. Name its folder: "
                "--images"
            )
        return os.path.join(self.folder, found or names[0])


def read_examples(
    paths: Sequence[str],
    images: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    check: bool = True,
) -> tuple[str, list[Example]]:
    """The task that some files are for, and their examples.

    Args:
        images: the folder of the pictures; None: the folder of each file.
        format: a key of READERS or of `formats.FORMS`; None: recognised by content.
        columns: of tables, as for `formats.read_records`.
        check: whether the pictures have to be there.

    Raises ConfigError for a file of no known format, one with a mistake, and for pictures that are not there.
    """
    format = format or "auto"
    check_names([format], ["auto", *(READERS | formats.FORMS)], lambda name: f"--format {name!r} is not known")
    for path in paths:
        if not os.path.exists(path):
            raise ConfigError(f"--data {path}: there is no file or folder {os.path.abspath(path)}.")
    by_format: dict[str, list[str]] = {}
    for path in paths:
        by_format.setdefault(recognise(path) if format == "auto" else format, []).append(path)
    found, task = [], ""
    for name, group in by_format.items():
        examples = [*_read(name, group, images, columns, check)]
        each_task = READERS[name][0] if name in READERS else task_for(examples)
        for example in examples:
            if not example.references or not all(isinstance(text, str) for text in example.references):
                shown = f"{example.id} has the references {reprlib.repr(list(example.references))}"
                raise ConfigError(f"--data {' '.join(group)}: question {shown}. It needs texts, at least one.")
        if task not in ("", each_task):
            raise ConfigError(f"--data has files for the tasks {task} and {each_task}. Evaluate one at a time.")
        found, task = found + examples, each_task
    return task, with_unique_ids(found)


def recognise(path: str) -> str:
    """The format of a file or folder. Raises ConfigError that shows how the file begins."""
    if os.path.isdir(path):
        return "folder"
    text, _ = TextFile(path).begin(formats.HEAD)

    def has(*keys: str) -> bool:
        return all(re.search(f'"{key}"\\s*:', text) for key in keys)

    if has("question_id", "text", "label"):
        return "pope"
    if re.search(r'"data"\s*:\s*\[', text) and has("question"):
        return "textvqa"
    if re.search(r'"(questions|annotations)"\s*:\s*\[', text) and has("question_id"):
        return "vqa"
    first = re.search(r'"annotations"\s*:\s*\[\s*(\{[^{}]*\})', text)
    if first and re.search(r'"id"\s*:', first[1]) is None:
        return "cc_sbu_align"
    if re.match(r'\{\s*"[^"]*"\s*:\s*\{', text):
        return "scienceqa" if has("choices") else "gqa"
    return formats.recognise(path)


def task_for(examples: Sequence[Example]) -> str:
    """The task that fits examples: captions, yes or no, short answers, or texts."""
    if all(example.messages == PICTURE for example in examples):
        return "caption"
    references = [text for example in examples for text in example.references]
    if all(text.strip(" .").lower() in ("yes", "no") for text in references):
        return "yes_no"
    return "vqa" if all(len(text.split()) <= SHORT for text in references) else "caption"


def with_unique_ids(examples: Sequence[Example]) -> list[Example]:
    """The examples; ids that come in several groups get the group's name in front.

    Raises ConfigError for an id that comes twice in a group.
    """
    times: dict[str, int] = {}
    for example in examples:
        times[example.id] = times.get(example.id, 0) + 1
    unique, seen = [], set()
    for example in examples:
        id = example.id if times[example.id] == 1 else f"{example.group}/{example.id}"
        if id in seen:
            raise ConfigError(f"--data has two questions with the id {example.id}. Give each an id of its own.")
        seen.add(id)
        unique.append(replace(example, id=id))
    return unique


def from_records(records: Iterable[Record], group: str = "") -> Iterator[Example]:
    """Conversations as examples: the last answer is the reference. Equal questions about equal pictures are one."""
    merged: dict[Any, Example] = {}
    for record in records:
        try:
            *messages, (_, answer) = conversation_of(record)
        except Unusable as error:
            raise ConfigError(f"{record.where} {error}") from None
        parts = [part for message in record.messages for part in message.parts]
        pictures = tuple(part.source for part in parts if isinstance(part, Picture))
        names = {"id": record.id}
        if len(pictures) == 1 and isinstance(pictures[0], str):
            names["image"] = pictures[0]
        new = Example(record.id, tuple(messages), ("".join(answer),), pictures, names, group)
        key = (new.messages, pictures)
        old = merged.get(key)
        if old:
            new = replace(old, references=old.references + new.references, merged=(*old.merged, new.id))
        merged[key] = new
    yield from merged.values()


def examples_of_split(
    datasets: Mapping[str, Mapping[str, Any]], split: str, most: int | None = None
) -> tuple[list[Example], str]:
    """The examples of a split of {name: {split: dataset}}, and the name of the first dataset that has it.

    most: of each dataset, as for `from_dataset`. Raises ConfigError if there is none.
    """
    having = {name: splits[split] for name, splits in datasets.items() if split in splits}
    if not having:
        known = sorted({each for splits in datasets.values() for each in splits})
        raise ConfigError(
            f"--split {split}: no dataset has it (they have {', '.join(known)}). Name references with --data, or keep "
            "a share of a dataset back: build_info.val (docs/own_data.md)."
        )
    found = [example for name, dataset in having.items() for example in from_dataset(dataset, name, most)]
    return with_unique_ids(found), next(iter(having))


def from_dataset(dataset: Any, name: str, most: int | None = None) -> Iterator[Example]:
    """The examples of a dataset with a length, or of one pass over a stream, whose pictures are then kept in memory.

    A sample has "image" (or "image_features") and a text "text_input", or a conversation and "pictures"
    (`datasets.conversations.dataset`).

    Args:
        name: that of its section; the group of the examples.
        most: number of examples, of a stream the first ones, otherwise spread over the dataset; None: all.

    Raises ConfigError for a dataset of another kind.
    """
    records = getattr(dataset, "records", None)
    if isinstance(records, Sequence):
        examples = [*from_records((records[index] for index in range(len(records))), name)]
        yield from (examples[index] for index in spread(len(examples), most))
        return
    for index, (sample, get) in enumerate(_samples(dataset, name, most)):
        text = sample.get("text_input") if isinstance(sample, Mapping) else None
        names = {} if text is None else {"image_id": str(sample.get("image_id", index))}
        if isinstance(text, str) and PICTURES & sample.keys():
            yield Example(str(index), PICTURE, (text,), (partial(_processed, get, None),), names, name)
        elif isinstance(text, tuple) and "pictures" in sample:
            pictures = tuple(partial(_processed, get, number) for number in range(len(sample["pictures"])))
            yield Example(str(index), text[:-1], ("".join(text[-1][1]),), pictures, names, name)
        else:
            what = "its samples have no 'image' with a text 'text_input'"
            raise ConfigError(f"datasets.{name}: {what}. Name references with --data.")


def _samples(dataset: Any, name: str, most: int | None) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """The samples of a dataset, each with a function that returns it again. Those that cannot be used are left out."""
    if hasattr(dataset, "one_pass"):
        for sample in islice(dataset.one_pass(0, 1), most):
            yield sample, lambda sample=sample: sample
    elif hasattr(dataset, "__len__"):
        read = getattr(dataset, "item_or_none", dataset.__getitem__)
        for index in spread(len(dataset), most):
            if (sample := read(index)) is not None:
                yield sample, partial(read, index)
    else:
        raise ConfigError(f"datasets.{name}: a stream has no end. Give it a method one_pass, or name --data.")


def _processed(get: Callable[[], Any], number: int | None) -> Any:
    """The picture [3,H,W] of a sample, or the one with this number, normalised; or its cached features [Q,W]."""
    from torch.utils.data import default_collate

    from minigpt4.processors import normalise

    fields = get() if number is None else get()["pictures"][number]
    if "image_features" in fields:
        return fields["image_features"]
    picture = {key: fields[key] for key in ("image", "image_mean", "image_std") if key in fields}
    return normalise(default_collate([picture]))["image"][0]


def _read(
    format: str, paths: list[str], images: str | None, columns: Mapping[str, str] | None, check: bool
) -> Iterator[Example]:
    """The examples of files of one format. Of several files each is a group, unless it has groups itself."""
    if format == "vqa":
        yield from _read_vqa(paths, images, check)
        return
    for path in paths:
        group = Path(path).stem if len(paths) > 1 else ""
        if format in READERS:
            yield from READERS[format][1](path, Folder(images, path, check), group)
            continue
        _, records = formats.read_records(path, images, format, columns, "data", check)
        if not isinstance(records, Sequence):
            raise ConfigError(f"--data {path} is a shard. Name files or a folder.")
        yield from from_records((records[index] for index in range(len(records))), group)


# One function for each format of benchmarks: (path, folder of the pictures, group) -> examples.


def _read_coco(path: str, folder: Folder, group: str) -> Iterator[Example]:
    """COCO's captions: all captions of an image are the references of one example."""
    captions: dict[tuple, list[str]] = {}
    for annotation in open_coco(path).items:
        _, image, file, caption = json.loads(annotation)
        captions.setdefault((image, file), []).append(caption)
    for (image, file), texts in captions.items():
        if None in texts:
            raise ConfigError(f"{path} image_id {image} has no 'caption'. Use the captions file (captions_*.json).")
        picture = folder(f"{path} {image}", file or f"{image}.jpg")
        names = {"image_id": str(image), "image": picture}
        yield Example(str(image), PICTURE, tuple(texts), (picture,), names, group)


def _read_align(path: str, folder: Folder, group: str) -> Iterator[Example]:
    """The filter_cap.json of stage 2: {"annotations": [{"image_id", "caption"}]}, and image/<image_id>.jpg."""
    for item in _list(_load(path), "annotations"):
        image, caption = _need(path, item, "image_id", "caption")
        picture = folder(f"{path} {image}", f"image/{image}.jpg", f"{image}.jpg")
        names = {"image_id": str(image), "image": picture}
        yield Example(str(image), PICTURE, (caption,), (picture,), names, group)


def _read_vqa(paths: list[str], images: str | None, check: bool) -> Iterator[Example]:
    """VQAv2 and OK-VQA: a file of questions and one of annotations, in any order, of all files together."""
    files = {path: _load(path) for path in paths}
    annotations = [(path, each) for path, file in files.items() for each in _list(file, "annotations")]
    annotated = {_need(path, each, "question_id", "answers")[0]: each for path, each in annotations}
    if not annotated or not any("questions" in file for file in files.values()):
        lack = "annotations" if not annotated else "questions"
        raise ConfigError(f"--data {' '.join(paths)} has no {lack}. Name both files: --data QUESTIONS ANNOTATIONS")
    for path, file in files.items():
        subtype, folder = file.get("data_subtype", "val2014"), Folder(images, path, check)
        for item in _list(file, "questions"):
            number, image, question = _need(path, item, "question_id", "image_id", "question")
            if number not in annotated:
                raise ConfigError(f"{path} question_id {number} is not among the annotations. Name the file with it.")
            about = f"{path} question_id {number}"
            answers = tuple(str(_need(about, each, "answer")[0]) for each in annotated[number]["answers"])
            digits = f"{image:012d}.jpg" if isinstance(image, int) else f"{image}.jpg"
            picture = folder(f"{path} {number}", f"COCO_{subtype}_{digits}", digits, f"{image}.jpg", f"{image}.png")
            group = str(annotated[number].get("answer_type") or "")
            yield _question(number, image, question, answers, picture, group)


def _read_textvqa(path: str, folder: Folder, group: str) -> Iterator[Example]:
    """TextVQA: {"data": [{"question", "image_id", "question_id", "answers"}]}."""
    for item in _list(_load(path), "data"):
        number, image, question, answers = _need(path, item, "question_id", "image_id", "question", "answers")
        picture = folder(f"{path} {number}", f"{image}.jpg", f"{image}.png")
        yield _question(number, image, question, tuple(answers), picture, group)


def _read_gqa(path: str, folder: Folder, group: str) -> Iterator[Example]:
    """GQA: {question id: {"question", "answer", "imageId"}}."""
    for number, item in _load(path).items():
        image, question, answer = _need(f"{path} {number}", item, "imageId", "question", "answer")
        picture = folder(f"{path} {number}", f"{image}.jpg", f"{image}.png")
        yield _question(number, image, question, (answer,), picture, group)


def _read_scienceqa(path: str, folder: Folder, group: str) -> Iterator[Example]:
    """ScienceQA: {id: {"question", "choices", "answer": index, "hint", "image", "split"}}, some without a picture."""
    for number, item in _load(path).items():
        question, choices, right = _need(f"{path} {number}", item, "question", "choices", "answer")
        if not isinstance(right, int) or not 0 <= right < len(choices):
            raise ConfigError(f"{path} {number} has the answer {right!r}; an index of its choices is expected.")
        listed = [f"{chr(ord('A') + n)}. {choice}" for n, choice in enumerate(choices)]
        text = "\n".join([*map(str, filter(None, [item.get("hint"), question])), *listed])
        names = {"id": number, "question_id": number}
        pictures, parts = (), (text,)
        if item.get("image"):
            place = os.path.join(item.get("split") or "", number, *_need(f"{path} {number}", item, "image"))
            pictures, parts = (folder(f"{path} {number}", place),), (None, text)
        subject, messages = str(item.get("subject") or group), (("user", parts),)
        yield Example(number, messages, (choices[right],), pictures, names, subject, tuple(choices))


def _read_pope(path: str, folder: Folder, group: str) -> Iterator[Example]:
    """POPE: {"question_id", "image", "text", "label": "yes" or "no"} on each line; each file is a setting."""
    for where, item in formats.read_items(path):
        number, image, question, label = _need(where, item, "question_id", "image", "text", "label")
        if label not in ("yes", "no"):
            raise ConfigError(f"{where} has the label {label!r}; yes or no is expected.")
        picture = folder(f"{path} {number}", image)
        yield _question(number, None, question, (label,), picture, group)


READERS: dict[str, tuple[str, Callable]] = {
    "coco": ("caption", _read_coco),
    "cc_sbu_align": ("caption", _read_align),
    "vqa": ("vqa", _read_vqa),
    "textvqa": ("vqa", _read_textvqa),
    "gqa": ("vqa", _read_gqa),
    "scienceqa": ("choice", _read_scienceqa),
    "pope": ("yes_no", _read_pope),
}
"""{format: (its task, its reader)}."""


def _question(number: Any, image: Any, question: str, answers: tuple, picture: str, group: str = "") -> Example:
    names = {"question_id": str(number), "image": picture} | ({} if image is None else {"image_id": str(image)})
    return Example(str(number), (("user", (None, question)),), answers, (picture,), names, group)


def _load(path: str) -> dict:
    try:
        return parse_json(decode(Path(path).read_bytes()))
    except ConfigError as error:
        raise ConfigError(f"{path} {error}") from None


def _list(file: Mapping, key: str) -> list:
    return file.get(key) or []


def _need(where: str, item: Any, *keys: str) -> list:
    """The values at some keys. Raises ConfigError that names one that is missing, or not of its type."""
    lacks = next((key for key in keys if not isinstance(item, Mapping) or key not in item), None)
    if lacks:
        raise ConfigError(f"{where}: a question has no {lacks!r}. It needs {', '.join(keys)}.")
    for key in keys:
        if not isinstance(item[key], TYPES.get(key, object)):
            kind = "text" if TYPES[key] is str else "list"
            raise ConfigError(f"{where}: its {key!r} is {reprlib.repr(item[key])}; a {kind} is expected.")
    return [item[key] for key in keys]
