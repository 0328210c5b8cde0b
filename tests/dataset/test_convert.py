"""Conversion of BLIP's JSON lists to TSV: it keeps every caption, whatever its characters, and needs little memory."""

import csv
import json
import os
import re
import subprocess
import sys

import pandas
import pytest
from helpers import ROOT
from pairs_to_tsv import READ_BLOCK, ConvertError, convert

AWKWARD = [
    "plain words, with a comma",
    'a "quoted" word',
    '"all quoted"',
    "a\ttab",
    "two\nlines",
    "Windows\r\nlines",
    "a lone \r return",
    "é 日本 😀 \u2028 \u00a0",
    " blanks at both ends ",
    "back\\slash and 'apostrophe'",
    "NA",
    "###Human: <Img></Img>",
]


def write_list(path, captions):
    pairs = [{"caption": caption, "url": f"http://example.org/{i}.jpg?a=1&b=é"} for i, caption in enumerate(captions)]
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return [(pair["caption"], pair["url"]) for pair in pairs]


def read_tsv(path):
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = (row for row in csv.reader(file, delimiter="\t") if row)
    assert header == ["caption", "url"]
    return [tuple(row) for row in rows]


def run(name, *arguments, folder):
    script = ROOT / "dataset" / f"{name}.py"
    return subprocess.run([sys.executable, script, *arguments], cwd=folder, capture_output=True, text=True)


def test_awkward_captions_survive(tmp_path):
    pairs = write_list(tmp_path / "list.json", AWKWARD)
    assert convert(tmp_path / "list.json", tmp_path / "list.tsv") == {"written": len(pairs)}
    assert read_tsv(tmp_path / "list.tsv") == pairs
    table = pandas.read_csv(tmp_path / "list.tsv", sep="\t", keep_default_na=False, lineterminator="\n")
    assert list(table.itertuples(index=False, name=None)) == pairs


def test_line_breaks_in_captions_survive_readers_that_cut_at_them(tmp_path):
    """pyarrow, which img2dataset reads with, reads blocks and ends each at its last line break, quoted or not."""
    pairs = write_list(tmp_path / "list.json", [f"line {i}\nand\r\n{'x' * (i % 300)}\n" for i in range(9000)])
    convert(tmp_path / "list.json", tmp_path / "list.tsv")
    content = (tmp_path / "list.tsv").read_bytes()
    assert len(content) > 1.3 * READ_BLOCK
    end = content.rindex(b"\n", 0, READ_BLOCK) + 1
    assert content[:end].count(b'"') % 2 == 0  # the block ends outside of quotes
    assert read_tsv(tmp_path / "list.tsv") == pairs


def test_two_hundred_thousand_rows_in_little_memory(tmp_path):
    write_list(tmp_path / "list.json", [f"a caption of the usual length, number {i} of many" for i in range(200_000)])
    # The peak of this process alone; getrusage's is inherited from the parent.
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'dataset')!r})\n"
        "from pairs_to_tsv import main\n"
        "main('', 'list')\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) / 1024
    assert peak < 300, f"{peak} MB"
    assert sum(1 for _ in open(tmp_path / "list.tsv")) == 200_001


@pytest.mark.parametrize(
    ("name", "stem"),
    [("convert_cc_sbu", "ccs_synthetic_filtered_large"), ("convert_laion", "laion_synthetic_filtered_large")],
)
def test_the_scripts_and_their_defaults(tmp_path, name, stem):
    pairs = write_list(tmp_path / f"{stem}.json", AWKWARD)
    done = run(name, "--limit", "5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Wrote 5 pairs to {stem}.tsv\n"
    assert "%" in done.stderr  # the progress bar
    assert read_tsv(tmp_path / f"{stem}.tsv") == pairs[:5]


@pytest.mark.parametrize(("rows", "sizes"), [(4, [4, 4, 4]), (5, [5, 5, 2]), (100, [12])])
def test_split(tmp_path, rows, sizes):
    pairs = write_list(tmp_path / "list.json", AWKWARD)
    convert(tmp_path / "list.json", tmp_path / "list.tsv", rows_per_file=rows)
    files = sorted((tmp_path / "list").iterdir())
    assert [path.name for path in files] == [f"{i:05d}.tsv" for i in range(len(sizes))]
    parts = [read_tsv(path) for path in files]
    assert [len(part) for part in parts] == sizes
    assert sum(parts, []) == pairs
    with pytest.raises(ConvertError, match=r"list has \.tsv files already"):
        convert(tmp_path / "list.json", tmp_path / "list.tsv", rows_per_file=rows)


def test_objects_without_caption_or_url_are_counted(tmp_path):
    items = [{"caption": "a", "url": "u"}, {"caption": "a"}, {"url": "u"}, 3, {"caption": None, "url": "u"}]
    items += [{"caption": " ", "url": "u"}, {"caption": "b", "url": 7}, {"caption": "z", "url": "v", "id": 1}]
    (tmp_path / "ccs_synthetic_filtered_large.json").write_text(json.dumps(items))
    done = run("convert_cc_sbu", folder=tmp_path)
    assert read_tsv(tmp_path / "ccs_synthetic_filtered_large.tsv") == [("a", "u"), ("z", "v")]
    assert done.stdout.splitlines() == [
        "Left out 3 objects with no caption.",
        "Left out 2 objects with no url.",
        "Left out 1 objects with no caption and no url.",
        "Wrote 2 pairs to ccs_synthetic_filtered_large.tsv",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"caption": "a", "url": "u"}, {"capt', "Not JSON after 1 objects. Was the download cut off?"),
        ("<html>404</html>", "Not JSON after 0 objects"),
        ("", "Not JSON after 0 objects"),
        ('{"caption": "a", "url": "u"}', "holds no pairs. Expected a list"),
        ("[]", "holds no pairs"),
        ('[{"text": "a", "link": "u"}]', "holds no pairs"),
    ],
)
def test_files_that_are_not_a_list_of_pairs(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    done = run("convert_laion", "--input", "list.json", folder=tmp_path)
    assert done.returncode == 1
    assert "Error: " in done.stderr and message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["list.json"]


def test_bad_arguments(tmp_path):
    done = run("convert_laion", folder=tmp_path)
    assert done.returncode == 1
    assert "there is no laion_synthetic_filtered_large.json. Name the list with --input" in done.stderr
    for argument in ("--limit=0", "--rows-per-file=-1", "--limit=x"):
        done = run("convert_laion", argument, folder=tmp_path)
        assert done.returncode == 2 and argument.split("=")[0] in done.stderr


def test_a_path_that_the_screen_cannot_show(tmp_path):
    write_list(tmp_path / "list.json", AWKWARD)
    script = ROOT / "dataset" / "convert_laion.py"
    command = [sys.executable, script, "--input", "list.json", "--output", "猫.tsv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.strip() == b"Wrote 12 pairs to \\u732b.tsv"


def test_a_missing_library_is_one_line():
    code = "import runpy, sys; sys.modules['ijson'] = None; runpy.run_path(sys.argv[1])"
    script = str(ROOT / "dataset" / "convert_cc_sbu.py")
    done = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("Error: .*ijson.* pip install ijson tqdm\n", done.stderr)
