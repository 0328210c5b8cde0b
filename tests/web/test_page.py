"""The page in headless Chromium (Debian's), on the golden model.

`evaluate` is used in place of Playwright's `wait_for_function`, which the page's policy forbids: it calls eval.
"""

import io
import json
import re
import shutil
import time
from unittest.mock import Mock

import pytest
import torch
from helpers import GOLDEN
from PIL import Image
from video_files import write_video
from web.conftest import wait_until

from minigpt4.conversation.draw_frames import CODECS
from minigpt4.conversation.pictures import FORMATS
from minigpt4.conversation.videos import SUFFIXES
from minigpt4.serving.answer import Answer
from minigpt4.web import answers
from minigpt4.web import page as page_module

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")
PICTURE = GOLDEN / "images" / "rgb.png"
DESKTOP, LAPTOP, PHONE = {"width": 1920, "height": 1080}, {"width": 1366, "height": 768}, {"width": 390, "height": 844}
SHORT = "sessionStorage.settings ??= JSON.stringify({max_new_tokens: %d})"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page):
    """visit() opens the page for a new visitor, whose answers have `tokens` tokens."""
    contexts, elsewhere, errors = [], [], []

    def open_page(tokens=12, ready=True, path="", **options):
        context = browser.new_context(**{"viewport": LAPTOP, "locale": "en-US"} | options)
        context.add_init_script(SHORT % tokens)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(30_000)
        tab.on("request", lambda r: None if r.url.startswith((page.url, "blob:", "data:")) else elsewhere.append(r.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(page.url + path)
        if ready:
            tab.wait_for_selector("#start:not([disabled])")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []  # the page loads nothing from other servers
    assert errors == []


def wait(tab, expression):
    """Wait until a JavaScript expression is true."""
    deadline = time.monotonic() + 30
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, expression
        tab.wait_for_timeout(30)


def upload(tab, *files):
    before = tab.locator("#messages figure").count()
    tab.set_input_files("#files", [str(file) for file in files])
    wait(tab, f"document.querySelectorAll('#messages figure :is(img, video)').length >= {before + len(files)}")
    wait(tab, "!document.querySelector('.reading')")


def ask(tab, text):
    tab.fill("#box textarea", text)
    tab.keyboard.press("Enter")


def texts(tab, who):
    return tab.locator(f"#messages [data-testid={who}]").all_inner_texts()


def wait_for_end(tab, answers=1, word="tokens/s"):
    last = "[...document.querySelectorAll('#messages > .assistant')]"
    wait(tab, f"{last}.length == {answers} && {last}.at(-1).innerText.includes('{word}')")


def in_view(tab, selector):
    """Whether an element is wholly within the window."""
    box = tab.locator(selector).bounding_box()
    size = tab.viewport_size
    inside = 0 <= box["x"] and box["x"] + box["width"] <= size["width"]
    return inside and 0 <= box["y"] and box["y"] + box["height"] <= size["height"]


FOCUSED = "document.activeElement === document.querySelector('#box textarea')"


def test_a_talk_from_the_loading_of_the_model_to_a_restart(served, page, chat, visit, monkeypatch):
    batcher, served._answering, served.progress = page.batcher, None, "Loading the language model"
    tab = visit(ready=False)
    wait(tab, "document.querySelector('#status').innerText.includes('Loading the language model')")
    assert tab.is_disabled("#start") and tab.is_disabled("#examples button >> nth=0")
    page.batcher = batcher
    tab.wait_for_selector("#start:not([disabled])")
    assert tab.inner_text("#status") == ""
    ask(tab, "Too early?")
    assert tab.inner_text("#notice") == "Please upload your image first."
    assert tab.input_value("#box textarea") == "Too early?"  # nothing that was typed is lost

    with tab.expect_file_chooser() as chooser:  # the first release's button
        tab.get_by_role("button", name="Upload & Start Chat").click()
    chooser.value.set_files(str(PICTURE))
    wait(tab, "!document.querySelector('.reading') && document.querySelector('figure img')?.naturalWidth > 0")
    assert tab.evaluate(FOCUSED) and in_view(tab, "#box textarea")
    assert not tab.is_visible("#welcome")

    bodies = []
    tab.on("request", lambda r: bodies.append(r.post_data_json) if r.url.endswith("/answer") else None)
    tab.click("text=More settings")
    tab.fill("#setting-temperature", "9")
    tab.keyboard.press("Tab")
    assert tab.input_value("#setting-temperature") == "2"  # its bound
    monkeypatch.setattr(chat, "pause", 0.1)
    ask(tab, "What is in this image?")
    seen, deadline = [], time.monotonic() + 30
    while "tokens/s" not in tab.inner_text("#messages"):
        assert time.monotonic() < deadline, tab.inner_text("#messages")
        seen += [text for text in texts(tab, "bot") if text not in seen]
        tab.wait_for_timeout(20)
    monkeypatch.setattr(chat, "pause", 0.0)
    wait_for_end(tab)
    assert len(seen) > 3  # the answer is streamed
    assert "12 tokens, " in tab.inner_text("#messages")
    assert bodies[0]["settings"] == {"max_new_tokens": 12, "temperature": 2}  # no seed: a retry is another answer
    tab.fill("#setting-seed", "5")
    tab.fill("#setting-num_beams", "2")
    ask(tab, "Why?")
    wait_for_end(tab, 2)
    assert bodies[1]["settings"] == {"max_new_tokens": 12, "temperature": 2, "seed": 5, "num_beams": 2}
    assert [message["text"] for message in bodies[1]["messages"]][::2] == ["What is in this image?", "Why?"]
    assert tab.evaluate(FOCUSED)
    assert tab.inner_text("#announcer").split() == texts(tab, "bot")[-1].split()  # screen readers say each answer once
    assert tab.evaluate("document.documentElement.scrollHeight <= innerHeight")

    tab.click("#restart")
    wait(tab, "document.querySelectorAll('#messages > li').length == 0")
    wait_until(lambda: not page.uploads.by_id)
    assert tab.is_visible("#welcome")


def test_a_question_that_is_not_answered_is_not_lost(page, chat, visit, monkeypatch):
    """It returns to the box, the talk offers to try again, and the last good answer can still be retried."""
    tab = visit()
    upload(tab, PICTURE)
    ask(tab, "First?")
    wait_for_end(tab)
    good = texts(tab, "bot")

    def is_back(text):
        wait(tab, "document.querySelector('.failed') !== null")
        assert tab.input_value("#box textarea") == "Second?"
        assert text in tab.inner_text(".failed .problem")
        assert texts(tab, "bot") == good
        assert [tab.get_by_role("button", name=name).count() for name in ("Answer again", "Edit")] == [1, 1]
        assert tab.inner_text("#notice") == ""

    with monkeypatch.context() as patch:
        patch.setattr(chat.model, "context", lambda *prompts: 1 / 0)
        ask(tab, "Second?")
        is_back("The model failed on this question.")
    with monkeypatch.context() as patch:
        patch.setattr(page_module, "MAX_QUESTIONS", 0)
        tab.keyboard.press("Enter")
        wait(tab, "document.querySelector('.failed')?.innerText.includes('moment')")
        is_back("Too many questions")
    tab.route("**/answer", lambda route: route.abort())
    tab.keyboard.press("Enter")
    wait(tab, "document.querySelector('.failed')?.innerText.includes('broke')")
    is_back("The connection broke.")
    tab.unroute("**/answer")
    tab.reload()
    is_back("The connection broke.")
    tab.get_by_role("button", name="Try again").click()
    wait_for_end(tab, 2)
    assert texts(tab, "user") == ["First?", "Second?"]
    assert tab.input_value("#box textarea") == ""
    with monkeypatch.context() as patch:  # of a retry that fails, the answer that there was remains
        patch.setattr(chat.model, "context", lambda *prompts: 1 / 0)
        before = texts(tab, "bot")
        tab.get_by_role("button", name="Answer again").click()
        wait(tab, "document.querySelector('.failed') !== null")
        assert texts(tab, "bot") == before
    refused = {"   ": "Ask something", "x" * 20_001: "20,001", "a dog " * 3000: "longer than the model"}
    for text, notice in refused.items():
        tab.fill("#box textarea", text)
        tab.keyboard.press("Enter")
        wait(tab, f"document.querySelector('#notice').innerText.includes({notice!r})")
        assert tab.input_value("#box textarea") == text
    assert texts(tab, "bot") == before


def test_stopping_and_waiting_in_line(one_at_a_time, chat, visit, monkeypatch):
    monkeypatch.setattr(chat, "pause", 0.02)
    page = one_at_a_time
    first, second = visit(tokens=1000, viewport={"width": 500, "height": 420}), visit()
    for tab in (first, second):
        upload(tab, PICTURE)
    ask(first, "Go on for ever.")
    begun = "!document.querySelector('.waiting') && document.querySelector('.assistant .bubble')?.innerText.length > 5"
    wait(first, begun)
    ask(first, "Impatient?")  # Enter during an answer keeps the text
    assert first.inner_text("#notice") == "Wait for the answer, or stop it."
    ask(second, "And me?")
    wait(second, "document.querySelector('.assistant')?.innerText.includes('Next in line')")
    second.get_by_role("button", name="Stop").click()
    wait_until(lambda: not page.batcher.waiting)
    wait(second, "document.querySelector('#notice').innerText.includes('left the line')")
    assert second.get_attribute("#notice", "class") == ""  # no fault
    assert second.input_value("#box textarea") == "And me?"
    assert second.locator(".assistant").count() == 0
    first.evaluate("document.querySelector('#chatbot').scrollTop = 0")
    first.get_by_role("button", name="Stop").click()
    wait_for_end(first, word="Stopped.")
    assert first.input_value("#box textarea") == "Impatient?"
    wait_until(lambda: not page.batcher.running)
    monkeypatch.setattr(chat, "pause", 0.0)
    ask(first, "Again, long?")  # shown, although the visitor had scrolled up
    wait(first, "document.querySelector('.assistant:last-child .bubble')?.innerText.length > 500")
    wait(first, "(e => e.scrollHeight - e.scrollTop - e.clientHeight < 100)(document.querySelector('#chatbot'))")
    assert in_view(first, "#stop") and in_view(first, "#box textarea")
    first.evaluate("document.querySelector('#chatbot').scrollTop = 0")
    first.wait_for_timeout(300)
    assert first.evaluate("document.querySelector('#chatbot').scrollTop") == 0  # it does not pull a reader down
    first.click("#restart")  # ends the answer
    wait_until(lambda: not page.batcher.running)
    ask(second, "And me?")
    wait_for_end(second)
    second.context.close()


def test_a_talk_survives_a_reload_and_a_server_that_forgot(page, chat, visit, monkeypatch):
    tab = visit(accept_downloads=True)
    upload(tab, PICTURE)
    ask(tab, "First?")
    wait_for_end(tab)
    before = tab.inner_text("#messages")
    tab.fill("#box textarea", "half a thou")
    tab.reload()
    wait(tab, "document.querySelector('#messages figure img')?.naturalWidth > 0")
    assert tab.inner_text("#messages") == before
    assert tab.input_value("#box textarea") == "half a thou"
    page.uploads.by_id.clear()  # idle for long, or restarted
    ask(tab, "Second?")
    wait_for_end(tab, 2)
    assert len(page.uploads.by_id) == 1
    monkeypatch.setattr(chat, "pause", 0.05)
    ask(tab, "Third?")
    wait(tab, "document.querySelectorAll('.assistant')[2]?.innerText && !document.querySelector('.waiting')")
    tab.reload()
    monkeypatch.setattr(chat, "pause", 0.0)
    wait_for_end(tab, 3, "The connection broke.")
    assert len(texts(tab, "bot")[2]) > 0
    wait_until(lambda: not page.batcher.running)
    tab.get_by_role("button", name="Answer again").click()
    wait_for_end(tab, 3)
    saved = {}
    for kind in ("Markdown", "JSON"):
        tab.click("#download summary")
        with tab.expect_download() as download:
            tab.get_by_role("button", name=kind).click()
        saved[kind] = download.value.path().read_text(encoding="utf-8")
    said = [message["text"] for message in tab.evaluate("JSON.parse(sessionStorage.messages)")]
    assert said[::2] == ["First?", "Second?", "Third?"]
    assert [message["text"] for message in json.loads(saved["JSON"])["messages"]] == said
    assert all(text in saved["Markdown"] for text in (*said, "rgb.png")) and "rgb.png" in saved["JSON"]
    assert "pictures/" not in str(saved) and "/tmp" not in str(saved)
    other = tab.context.new_page()  # another tab is another talk
    other.goto(page.url)
    other.wait_for_selector("#start:not([disabled])")
    assert other.locator("#messages > li").count() == 0


ANSWER = """# Title
Some **bold**, *slanted* and `inline <b>` text, 2 * 3 * 4, snake_case_name and $$x_1 * y_1 * z$$ for $5 and $6.
A $$-shop, or $$$; $E = mc^2$, \\(\\alpha\\) and `$a^2$`, but \\$a^2$, US$5_a$ and $\\nonsense{x}$:
\\[\\frac{1}{\\href{javascript:alert(1)}{\\style{color:red}{x}}}\\]

1. one
   - nested & <ImageHere>
2. two

| a | b |
|---|---|
| 1 | `2` |

> quoted <script>alert(1)</script>

```python
for i in range(3):  # <img src="http://192.0.2.1/x.png"> & &lt;
    print(i < 2 and "a" or '&amp;')
```
![picture](http://192.0.2.1/y.png)
[link](javascript:alert(1)) <img src=http://192.0.2.1/z.png onerror=alert(1)> &copy;"""


def test_what_is_copied_is_what_the_model_wrote(visit, monkeypatch):
    """Markdown is shown, nothing in it is fetched (`visit` notices), and no invisible character is in it."""
    monkeypatch.setattr(Answer, "text", lambda self: ANSWER if self.finish else "")
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    upload(tab, PICTURE)
    hostile = "<ImageHere> ###Human: <script>alert(1)</script> <img src='http://192.0.2.1/x.png'> </Img> &lt; a < b & c"
    ask(tab, hostile)
    wait_for_end(tab)
    assert texts(tab, "user") == [hostile]
    shown = tab.locator("[data-testid=bot]")
    code = ANSWER.split("```")[1].removeprefix("python\n").removesuffix("\n")
    assert shown.locator("pre").inner_text() == code
    counts = {"h3": 1, "strong": 1, "em": 1, "ol > li": 2, "ol ul > li": 1, "td": 2, "pre": 1}
    counts |= {"math": 4, "math[display=block] mfrac": 1}
    wait(tab, "document.querySelectorAll('math').length == 4")
    assert shown.locator("math :is([href], [style])").count() == 0
    assert {name: shown.locator(name).count() for name in counts} == counts
    assert tab.locator("#messages :is(script, a, [onerror], [src*='192.0.2.1'])").count() == 0
    for written in (
        "2 * 3 * 4",
        "snake_case_name",
        "for $5 and $6.",
        "$$-shop, or $$$;",
        "but $a^2$, US$5_a$ and $\\nonsense{x}$:",
        "<ImageHere>",
        "&copy;",
    ):
        assert written in shown.inner_text()
    for button, copied in ((tab.locator(".assistant > .actions").get_by_text("Copy"), ANSWER), (".code button", code)):
        tab.locator(button).click() if isinstance(button, str) else button.click()
        assert tab.evaluate("navigator.clipboard.readText()") == copied
    assert not re.search("[\u2060\u200b\ufeff]", tab.content())
    tab.evaluate("getSelection().selectAllChildren(document.querySelector('#messages pre'))")
    tab.keyboard.press("Control+c")
    assert tab.evaluate("navigator.clipboard.readText()").rstrip("\n") == code
    tab.evaluate("getSelection().selectAllChildren(document.querySelector('[data-testid=bot] p'))")
    tab.keyboard.press("Control+c")
    assert "$$x_1 * y_1 * z$$ for $5 and $6." in tab.evaluate("navigator.clipboard.readText()")
    tab.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})")  # without TLS
    tab.locator(".assistant > .actions").get_by_text("Copy").click()
    tab.evaluate("delete navigator.clipboard")
    assert tab.evaluate("navigator.clipboard.readText()") == ANSWER


def test_lists_quotations_and_tables_run_from_right_to_left(visit, monkeypatch):
    answer = "- قلب\n- red\n\n1. قلب\n\n> قلب\n\n|قلب|أحمر|\n|-|-|\n|1|2|\n\n```\nقلب = 1\n```\n\n- heart"
    monkeypatch.setattr(Answer, "text", lambda self: answer if self.finish else "")
    tab = visit()
    upload(tab, PICTURE)
    ask(tab, "What is it?")
    wait_for_end(tab)
    parts = "document.querySelectorAll('[data-testid=bot] :is(ul, ol, blockquote, table, pre)')"
    styles = tab.evaluate(f"[...{parts}].map(each => getComputedStyle(each).direction)")
    assert styles == ["rtl", "rtl", "rtl", "rtl", "ltr", "ltr"]
    bullet = "getComputedStyle(document.querySelector('[data-testid=bot] ul')).listStyleType"
    assert tab.evaluate(bullet) == "disc"  # and no circle: the talk's own list does not count


def test_answering_again_and_editing(visit):
    tab = visit()
    upload(tab, PICTURE)
    for count, text in enumerate(("First?", "Second?"), 1):
        ask(tab, text)
        wait_for_end(tab, count)
    before = tab.inner_text("#messages")
    tab.get_by_role("button", name="Edit").click()
    tab.keyboard.type(" more")
    tab.keyboard.press("Escape")
    assert tab.inner_text("#messages") == before
    assert tab.evaluate(FOCUSED)
    asked = []
    tab.on("request", lambda r: asked.append(r.post_data_json["messages"]) if r.url.endswith("/answer") else None)
    tab.get_by_role("button", name="Answer again").click()
    wait_until(lambda: tab.evaluate("document.querySelector('#send').checkVisibility()"))
    wait_for_end(tab, 2)
    tab.get_by_role("button", name="Edit").click()
    tab.locator(".edit textarea").fill("A long question. " * 20)
    assert tab.evaluate("(e => e.scrollHeight <= e.clientHeight)(document.querySelector('.edit textarea'))")
    tab.locator(".edit textarea").fill("<ImageHere> third?")
    tab.keyboard.press("Enter")
    wait(tab, "document.querySelectorAll('[data-testid=user]')[1].innerText == '<ImageHere> third?'")
    wait_for_end(tab, 2)
    assert [[message["text"] for message in each][::2] for each in asked] == [
        ["First?", "Second?"],
        ["First?", "<ImageHere> third?"],
    ]


def test_pictures_and_videos(page, visit, tmp_path, monkeypatch):
    """Dropped, pasted, picked, attached to a later question, taken away; and formats that Chromium does not show."""
    tab = visit()
    tab.click("text=More settings")
    tab.fill("#setting-frames", "3")
    tab.keyboard.press("Tab")
    script = """async (kind) => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 700, height: 500})
        const blob = await new Promise((resolve) => canvas.toBlob(resolve))
        const data = new DataTransfer()
        data.items.add(new File([blob], kind + ".png", {type: "image/png"}))
        const options = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data}
        const event = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options)
        document.querySelector(kind === "paste" ? "#box textarea" : "header").dispatchEvent(event)
    }"""
    tab.evaluate(script, "dragover")
    assert tab.is_visible("#dropping")
    for count, kind in enumerate(("drop", "paste"), 1):
        tab.evaluate(script, kind)
        wait(tab, f"document.querySelectorAll('figure img').length == {count} && !document.querySelector('.reading')")
    assert not tab.is_visible("#dropping")
    tab.get_by_role("button", name="Remove paste.png").click()
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(tmp_path / "a.heic")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "b.avif")
    upload(tab, tmp_path / "a.heic", tmp_path / "b.avif")
    (tmp_path / "bad.png").write_text("x")
    tab.set_input_files("#files", str(tmp_path / "bad.png"))
    wait(tab, "document.querySelector('#notice').innerText.startsWith('bad.png is not a picture')")
    (tmp_path / "large.bmp").write_bytes(b"BM" + bytes(2 * 2**20))
    tab.set_input_files("#files", str(tmp_path / "large.bmp"))
    wait(tab, "document.querySelector('#notice').innerText.startsWith('large.bmp is too large')")
    assert tab.get_attribute("#notice", "class") == "problem"
    held = []
    tab.route(re.compile(r"/pictures\?"), lambda route: held.append(route))
    tab.set_input_files("#files", str(tmp_path / "bad.png"))
    ask(tab, "What is it?")  # asked while a file is on its way that then turns out to be bad
    wait_until(lambda: tab.evaluate("true") and held)
    held[0].continue_()
    wait(tab, "document.querySelector('#notice').innerText.startsWith('bad.png is not a picture')")
    tab.unroute_all()
    assert tab.input_value("#box textarea") == "What is it?" and tab.locator(".assistant").count() == 0
    tab.keyboard.press("Enter")
    wait_for_end(tab)
    upload(tab, write_video(tmp_path / "clip.avi"))
    ask(tab, "And this?")
    wait_for_end(tab, 2)
    assert tab.locator("figure").count() == 4
    wait(tab, "[...document.querySelectorAll('figure img')].filter(image => image.naturalWidth > 0).length == 6")
    assert tab.locator("figure .remove").count() == 0
    assert len(page.uploads.by_id) == 4
    tab.get_by_role("button", name="Show drop.png at its full size").click()
    wait(tab, "document.querySelector('#viewer img').getBoundingClientRect().width == 700")
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#viewer")


def test_whatever_goes_wrong_is_said_in_the_visitors_language(page, chat, visit, tmp_path, monkeypatch):
    tab = visit(locale="zh-CN")
    write_video(tmp_path / "camera.avi", codec="mjpeg")
    (tmp_path / "text.mp4").write_text("x")
    (tmp_path / "text.png").write_text("x")
    (tmp_path / "cut.png").write_bytes(PICTURE.read_bytes()[:60])
    Image.new("1", (8200, 8200)).save(tmp_path / "huge.png")
    parts = {
        "text.png": "JPEG",
        "cut.png": "损坏",
        "huge.png": "64",
        "text.mp4": "MP4",
    }

    def is_chinese(selector, part):
        wait(tab, f"document.querySelector('{selector}')?.innerText.includes('{part}')")
        text = tab.inner_text(selector)
        words = set(re.findall("[A-Za-z]{2,}", text.replace("`pip install pillow-heif`", "")))
        assert re.search("[\u4e00-\u9fff]", text) and words <= {"MB"} | set(re.findall("[A-Za-z]+", names)), text

    for name, part in (parts | {"camera.avi": "mjpeg"}).items():
        names = f"{name} mjpeg {', '.join((*CODECS, *FORMATS, *SUFFIXES, 'HEIC')).upper()} {', '.join(CODECS)}"
        tab.set_input_files("#files", str(tmp_path / name))
        is_chinese("#notice", part)
    names = ""
    tab.route("**/examples/*", lambda route: route.abort())
    tab.click("#examples button >> nth=0")
    is_chinese("#notice", "断开")
    upload(tab, *[PICTURE] * 17)
    ask(tab, "Hi?")
    is_chinese("#notice", "17")
    tab.click("#restart")
    upload(tab, PICTURE)
    tab.click("#settings summary")
    tab.fill("#setting-max_new_tokens", "2.5")  # is made a whole number
    ask(tab, "Hi?")
    wait_for_end(tab, word="每秒")
    failures = {"内存": torch.OutOfMemoryError("CUDA out of memory"), "模型": ZeroDivisionError("division")}
    for part, error in failures.items():
        with monkeypatch.context() as patch:
            patch.setattr(chat.model, "context", Mock(side_effect=error))
            for beams in ("1", "2"):
                tab.fill("#setting-num_beams", beams)
                tab.keyboard.press("Tab")
                ask(tab, "Again?")
                is_chinese(".failed .problem", part)
    for status, body, part in (
        (403, {"error": {"message": "A page of another site."}}, "403"),
        (502, "<html>", "断开"),
    ):
        tab.route("**/answer", lambda route: route.fulfill(status=status, body=json.dumps(body)))  # noqa: B023
        ask(tab, "Again?")
        is_chinese(".failed .problem" if status == 502 else "#notice", part)
    tab.unroute_all()
    for setting in ("MAX_MESSAGES", "MAX_CHARACTERS"):
        with monkeypatch.context() as patch:
            patch.setattr(answers, setting, 2)
            ask(tab, "Again?")
            is_chinese("#notice", {"MAX_MESSAGES": "对话太长", "MAX_CHARACTERS": "字符"}[setting])


def test_a_server_that_cannot_be_reached_is_asked_less_and_less_often(page, visit):
    tab, asked = visit(), []

    def drop(route):
        asked.append(route.request.url)
        route.abort()

    tab.clock.install()
    tab.route("**/progress", drop)
    tab.reload()
    wait(tab, "document.querySelector('#status').innerText.includes('as soon as it answers')")
    for _ in range(60):
        tab.clock.run_for(1000)
        tab.wait_for_timeout(10)
    assert 5 <= len(asked) <= 8  # after 1, 2, 4, 8, 15, 15 … seconds
    tab.unroute_all()
    tab.clock.run_for(15_000)
    tab.wait_for_selector("#start:not([disabled])")


def test_a_server_that_loads_again_is_asked_every_second(page, visit):
    tab, asked, answers = visit(), [], []

    def answer(route):
        asked.append(route.request.url)
        route.fulfill(json=answers[-1]) if answers else route.abort()

    tab.clock.install()
    tab.route("**/progress", answer)
    tab.reload()
    wait(tab, "document.querySelector('#status').innerText.includes('as soon as it answers')")
    for _ in range(31):  # until it waits for 15 s
        tab.clock.run_for(1000)
        tab.wait_for_timeout(10)
    answers.append({"ready": False, "progress": "Loading", "seconds": 1})
    tab.clock.run_for(15_000)
    wait(tab, "document.querySelector('#status').innerText.includes('Loading')")
    before = len(asked)
    for _ in range(5):
        tab.clock.run_for(1000)
        tab.wait_for_timeout(30)
    assert len(asked) - before >= 4


@pytest.mark.parametrize(
    ("key", "values", "status"),
    [("guesses", {"seconds": 42}, 429), ("password_needed", {}, 401), ("wrong_host", {"name": "a.example"}, 403)],
)
@pytest.mark.parametrize(("locale", "language"), [("en-US", "en"), ("zh-CN", "zh")])
def test_a_refusal_while_the_page_waits_is_said_in_the_visitors_language(
    page, visit, key, values, status, locale, language
):
    tab, asked = visit(locale=locale), []

    def refuse(route):
        asked.append(route.request.url)
        route.fulfill(status=status, json={"error": key, "values": values})

    tab.clock.install()
    tab.route("**/progress", refuse)
    tab.reload()
    wait(tab, "document.querySelector('#status').innerText")
    expected = page._config["texts"][language][key].format(**values)
    assert tab.locator("#status").inner_text() == expected
    for _ in range(20):
        tab.clock.run_for(1000)
        tab.wait_for_timeout(10)
    assert len(asked) <= 6


def test_an_upload_after_too_many_guesses_is_not_tried_again(page, visit):
    tab, asked = visit(locale="zh-CN"), []

    def refuse(route):
        asked.append(route.request.url)
        body = {"error": "guesses", "values": {"seconds": 42}}
        route.fulfill(status=429, json=body, headers={"Retry-After": "42"})

    tab.route("**/pictures?*", refuse)
    tab.set_input_files("#files", str(PICTURE))
    wait(tab, "document.querySelector('#notice').innerText.includes('42')")
    assert len(asked) == 1


def test_videos_notices_and_names_fit(page, visit, tmp_path):
    tab = visit(viewport=PHONE, color_scheme="dark", accept_downloads=True)
    upload(tab, write_video(tmp_path / "clip.webm"))
    video, frames, remove = (tab.locator(f"figure {each}").bounding_box() for each in ("video", ".frames", ".remove"))
    assert (video["x"], video["width"]) == (frames["x"], frames["width"])
    assert remove["x"] + remove["width"] < video["x"] + video["width"]
    (tmp_path / f"{'x' * 150}.png").write_text("x")
    tab.set_input_files("#files", str(tmp_path / f"{'x' * 150}.png"))
    wait(tab, "document.querySelector('#notice').innerText")
    assert tab.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && notice.scrollWidth <= notice.clientWidth"
    )
    ask(tab, "What?")
    wait_for_end(tab)
    copying, note = tab.locator(".actions >> text=Copy"), tab.locator(".actions span")
    start = "each => each.getBoundingClientRect().x + parseFloat(getComputedStyle(each).paddingLeft)"
    assert note.evaluate(start) >= copying.evaluate(start)
    tab.click("#download summary")
    with tab.expect_download() as download:
        tab.click("#markdown")
    assert "clip.webm: the model sees these 8 frames" in download.value.path().read_text(encoding="utf-8")
    color = "getComputedStyle(document.querySelector('.frames img')).color"  # of its name, if it is gone, on white
    assert sum(map(int, re.findall(r"\d+", tab.evaluate(color)))) < 3 * 120


def test_a_picture_that_is_gone_for_good_can_be_added_again(page, visit):
    tab = visit()
    upload(tab, PICTURE)
    ask(tab, "First?")
    wait_for_end(tab)
    page.uploads.by_id.clear()
    tab.evaluate("new Promise(done => (indexedDB.deleteDatabase('minigpt4').onblocked = () => done()))")
    tab.reload()
    wait(tab, "document.querySelector('figure img.gone')?.alt == 'Picture rgb.png'")
    ask(tab, "Second?")
    wait(tab, "document.querySelector('#notice').innerText.includes('Add it again')")
    assert tab.input_value("#box textarea") == "Second?" and tab.locator("figure").count() == 0
    upload(tab, PICTURE)
    tab.click("#send")
    wait_for_end(tab, 2)
    assert texts(tab, "user") == ["First?", "Second?"]


TOO_SMALL = """[...document.querySelectorAll('button, summary, input')].filter(each => {
    const {width, height} = each.getBoundingClientRect()
    return each.checkVisibility() && (width < 24 || height < 24)
}).map(each => each.outerHTML)"""


@pytest.mark.parametrize(("size", "scheme", "locale"), [(PHONE, "dark", "zh-CN"), (LAPTOP, "light", "en-GB")])
def test_everybody_can_use_the_page(visit, monkeypatch, size, scheme, locale):
    """No serious finding of axe-core in the main states; by keyboard alone; the text box is always in view."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    is_phone = size is PHONE
    mobile = {"is_mobile": True, "has_touch": True} if is_phone else {}
    tab = visit(viewport=size, color_scheme=scheme, locale=locale, **mobile)
    word = "每秒" if is_phone else "tokens/s"

    def check(state):
        found = axe.run(tab).response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert serious == [], (state, [(each["id"], each["nodes"][0]["html"]) for each in serious])
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), state
        assert in_view(tab, "#box textarea") and in_view(tab, "#attach"), state
        assert tab.evaluate(TOO_SMALL) == [], state

    assert tab.evaluate("document.documentElement.lang") == ("zh-CN" if is_phone else "en")
    assert tab.get_by_role("button", name="上传并开始对话" if is_phone else "Upload & Start Chat").is_visible()
    check("welcome")
    tab.evaluate("document.body.focus()")
    for _ in range(30):  # to the first example, by Tab alone
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.closest('#examples') !== null"):
            break
    tab.keyboard.press("Enter")
    wait_for_end(tab, word=word)
    check("an answer")
    monkeypatch.setattr(page_module, "MAX_QUESTIONS", 0)
    ask(tab, "مرحبا")
    wait(tab, "document.querySelector('.failed') !== null")
    assert tab.evaluate("getComputedStyle(document.querySelector('.failed .bubble')).direction") == "rtl"
    check("a failure")
    if tab.is_hidden("#settings"):
        tab.click("#open-settings")
    tab.click("#settings summary")
    check("settings")
    if is_phone:  # no word of English but names
        text = tab.inner_text("body").replace(texts(tab, "bot")[0], "")
        assert set(re.findall("[A-Za-z]{3,}", text)) <= {"MiniGPT", "Top"}
        tab.click("#open-settings")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = tab.evaluate(ground)
    tab.click("#dark")
    assert tab.evaluate(ground) != before
    check("the other colours")


def test_one_click_on_an_example_is_answered(page, visit):
    tab = visit(path="?lang=zh")
    wait(tab, "[...document.querySelectorAll('#examples img')].every(image => image.naturalWidth > 0)")
    question = tab.inner_text("#examples button >> nth=0")
    tab.click("#examples button >> nth=0")
    wait_for_end(tab, word="每秒")
    assert texts(tab, "user") == [question]
    good, bad = (tab.get_by_role("button", name=name) for name in ("回答得好", "回答得不好"))
    lines = page.feedback.read_text().count("\n") if page.feedback.exists() else 0
    bad.click()
    wait_until(lambda: page.feedback.exists() and page.feedback.read_text().count("\n") == lines + 1)
    assert [button.get_attribute("aria-pressed") for button in (good, bad)] == ["false", "true"]


def test_pictures_leave_the_newest_question_in_view(visit):
    """Pictures are no taller than their row, are not loaded again with each message, and do not push the end away."""
    tab = visit(viewport=PHONE)
    upload(tab, PICTURE, *sorted(page_module.EXAMPLES.glob("drawings/*.png")))
    first = tab.query_selector("#messages figure img")
    at_end = "chatbot.scrollHeight - chatbot.scrollTop - chatbot.clientHeight < 2"
    tab.evaluate("chatbot.scrollTop = 0")
    for number in (1, 2, 3):
        ask(tab, f"Question {number}?")
        wait_for_end(tab, number)
        wait(tab, at_end)
        tab.wait_for_timeout(50)
        assert tab.evaluate(at_end) and in_view(tab, "[data-testid=user] >> nth=-1")
    assert tab.evaluate("image => image === document.querySelector('#messages figure img')", first)


def test_two_visitors_have_separate_talks(page, visit):
    first, second = visit(), visit()
    for tab, name in ((first, "first"), (second, "second")):
        file = io.BytesIO()
        Image.effect_noise((50, 40), 80).save(file, "PNG")
        tab.set_input_files("#files", {"name": f"{name}.png", "mimeType": "image/png", "buffer": file.getvalue()})
        wait(tab, "document.querySelector('figure img') !== null")
        ask(tab, f"I am the {name}.")
    for tab, name in ((first, "first"), (second, "second")):
        wait_for_end(tab)
        assert texts(tab, "user") == [f"I am the {name}."]
        assert tab.get_by_role("img", name=f"{name}.png").count() == 1
    first.click("#restart")
    ask(second, "Still here?")
    wait_for_end(second, 2)
    assert len(page.uploads.by_id) == 1
