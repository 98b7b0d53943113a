"""`ssl report`: one page that needs nothing else, whatever state the run is in; a browser, if any, lays it out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECTIONS = ["curves", "samples", "features", "recipe", "data", "speed-and-memory", "environment"]
SMALL = ("--set", "backbone.depth=1", "--set", "backbone.width=16", "--set", "backbone.heads=2")
FETCHES = {"src", "srcset", "data", "poster", "action", "background", "xlink:href"}


class Page(HTMLParser):
    """What a page refers to, its sections, and its text."""

    def __init__(self, path):
        super().__init__()
        self.text = Path(path).read_text("utf-8")
        self.tags, self.sections, self.links, self.fetched, self.said = set(), [], [], [], ""
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            self.fetched += [value] if name in FETCHES else []
            self.links += [value] if name == "href" else []
        self.sections += [dict(attributes)["id"]] if tag == "section" else []

    def handle_data(self, data):
        self.said += data


@pytest.fixture
def page(toys):
    """The page of a run of the toy."""
    toys("train", "--plugin", "guess", "--out", "r", "--set", "data.workers=0")

    def make(*options):
        out, err = toys("report", "r", *options)
        return Page(re.search(r"^wrote +(\S+),", out, re.M)[1]), err

    return make


def test_every_section_is_there_and_nothing_is_fetched(page):
    found, err = page()
    assert err == ""
    assert found.sections == SECTIONS
    assert found.links == ["https://example.org/toy"]
    assert found.fetched == []
    assert not found.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"@import|url\(", found.text)
    for part in (
        *("guess: r", "numbers, mixer, preset tiny", "A. Toy 2020", "Done: 12 of 12 steps.", "gradient norm"),
        *("float32 [5, 4]", "random initialisation", "effective rank", "settings differ from the paper's"),
        *("built-in sample of 100 number samples", "96 samples seen", "Every sample that was read", "numbers / s"),
        *("GB of memory", "command", "step 12"),
    ):
        assert part in found.said, part


def test_it_writes_the_page_where_it_is_told(page):
    page("--out", "pages/deep/r.html", "--no-model")
    assert Page("pages/deep/r.html").sections == [s for s in SECTIONS if s not in ("samples", "features")]
    assert not Path("r/report.html").exists()


def test_a_run_without_a_checkpoint_has_a_page(page):
    shutil.rmtree("r/checkpoints")
    found, _ = page()
    assert "There is no checkpoint yet" in found.said
    assert "gradient norm" in found.said


def test_data_that_is_gone_is_said(toys):
    Path("d").mkdir()
    for n in range(20):
        Path(f"d/{n}.num").write_text(str(n))
    toys("train", "--plugin", "guess", "--data", "d", "--steps", 2, "--out", "r", "--set", "data.workers=0")
    shutil.rmtree("d")
    toys("report", "r")
    found = Page("r/report.html")
    assert "They cannot be shown: there is no 'd'" in found.said
    assert found.sections[-4:] == SECTIONS[-4:]


def test_a_damaged_checkpoint_is_said(page):
    for file in Path("r/checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    assert "is damaged" in page()[0].said


def test_a_plugin_that_fails_to_show_costs_its_section_alone(toys, page):
    file = toys.path / "toy_plugins.py"
    lines = '\n    def show(self, batch, step, guess=True):\n        raise OSError("<no>")\n'
    file.write_text(file.read_text() + lines)
    process = toys.start("report", "r", PYTHONWARNINGS="error")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "samples cannot be shown: OSError: <no>" in err
    found = Page("r/report.html")
    assert "They cannot be shown: OSError: <no>" in found.said
    assert found.sections == SECTIONS
    assert "random initialisation" in found.said


def test_how_a_run_failed_is_on_its_page(toys):
    toys("train", "--plugin", "guess", "--out", "r", "--set", "objective.crash=3", "--set", "data.workers=0", code=1)
    outcome = json.loads(Path("r/outcome.json").read_text())
    assert (outcome["ended"], outcome["steps"], outcome["of"]) == ("failed", 3, 12)
    toys("report", "r")
    said = Page("r/report.html").said
    assert "Failed after 3 of 12 steps: RuntimeError('a toy broke')" in said
    assert "ssl train --resume --out r" in said


def test_a_run_that_goes_on_forgets_how_it_ended_before(toys):
    outcome = Path("r/outcome.json")
    toys("train", "--plugin", "guess", "--out", "r", "--set", "data.workers=0")
    known = json.loads(outcome.read_text())
    assert (known["ended"], known["error"], known["steps"], known["skipped"]) == ("done", None, 12, 0)
    outcome.write_text('{"ended": "failed"}')
    toys("train", "--resume", "--out", "r")  # nothing is left to do: nothing changes
    assert outcome.read_text() == '{"ended": "failed"}'
    toys("train", "--resume", "--out", "r", "--steps", 14)
    assert json.loads(outcome.read_text())["steps"] == 14


@pytest.mark.parametrize(
    ("folder", "message"), [("my-rum", "did you mean 'my-run'?"), ("my-run/checkpoints", "not the folder")]
)
def test_a_folder_that_is_no_run_is_named_with_the_nearest(toys, folder, message):
    toys("train", "--plugin", "guess", "--steps", 1, "--out", "my-run", "--set", "data.workers=0")
    _, err = toys("report", folder, code=1)
    assert message in err


def test_a_page_that_cannot_be_written_is_said(page, toys):
    Path("file").touch()
    assert "choose another place with --out" in toys("report", "r", "--no-model", "--out", "file/r.html", code=1)[1]


def test_help_has_an_example(ssl):
    assert "ssl report runs/simclr-" in ssl("report", "--help")[0]


@pytest.fixture
def pictures(ssl):
    """The page of a run with pictures, wide names and a measured value."""
    ssl("train", "--plugin", "mae", "--steps", 3, "--batch", 16, *SMALL, "--out", "r", "--set", "data.workers=0")
    with Path("r/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "measured": {"validation/" + "a_long_name" * 9: 0.25}}) + "\n")
    facts = json.loads(Path("r/environment.json").read_text())
    Path("r/environment.json").write_text(json.dumps({**facts, "command": ["ssl", "x" * 400]}))
    ssl("report", "r", "--samples", 4)
    return Path("r/report.html")


def test_pictures_are_in_the_page(pictures):
    found = Page(pictures)
    assert found.sections == SECTIONS
    assert len(found.fetched) == 4 * 3
    assert all(source.startswith("data:image/png;base64,") for source in found.fetched)
    assert "a_long_name" in found.said
    assert len(found.text) < 300_000


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_scrolling_sideways(pictures, width):
    """The page in a frame of this width says how wide it came out, and what sticks out."""
    measure = (
        "<script>onload = () => { const wide = innerWidth, whole = document.documentElement.scrollWidth;"
        "const out = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > wide + 1);"
        "parent.postMessage([wide, whole, ...out.map(e => e.tagName + '.' + e.className)].join(' '), '*'); }</script>"
    )
    Path("inner.html").write_text(pictures.read_text().replace("</body>", measure + "</body>"))
    Path("outer.html").write_text(
        f'<body><iframe src="inner.html" style="width:{width}px;height:9000px;border:0"></iframe>'
        "<script>onmessage = e => document.body.textContent = 'measured ' + e.data + ' end'</script></body>"
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    address = Path("outer.html").absolute().as_uri()
    home = f"--user-data-dir={Path('browser').absolute()}"
    command = [BROWSER, *options, home, "--virtual-time-budget=10000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = re.search("measured (.*) end", done.stdout)
    assert said, done.stderr[-2000:]
    assert said[1].split() == [str(width), str(width)]
