"""The report's page: whole, safe, by itself, and readable in a real browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from reports import make

from hfprune.publishing.figures import THEME
from hfprune.publishing.page import FIGURES, write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a report in it."""
    folder = tmp_path_factory.mktemp("report")
    write_page(make(), folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def page(written):
    return (written / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element with its attributes, and that all are closed in order."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_file_is_there_and_none_half_written(written):
    names = {p.stem for p in (written / FIGURES).iterdir()}
    assert {"kept-heads", "importance-neurons", "quality", "curve", "latency", "time"} <= names
    assert {p.name for p in written.iterdir()} == {"report.html", FIGURES}
    endings = {name: set() for name in names}
    for path in (written / FIGURES).iterdir():
        endings[path.stem].add(path.suffix)
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().get("role") == "img"
    assert all(found == {".png", ".svg"} for found in endings.values())


def test_the_page_says_what_the_report_says(page):
    text = unescape(page).replace("\xa0", " ")
    report = make()
    for said in (
        *(cell for row in report.cells() for cell in row),
        *(piece for fact in report.facts() for piece in (fact.title, fact.value, fact.note)),
        *report.caveats(),
        report.caption(),
        *report.machine.values(),
        "budget: macs=50%",
    ):
        assert said in text, said
    assert "org/some-model" in re.search("<h1>(.*)</h1>", text)[1]


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    elements = Elements(page)
    assert not elements.open
    assert not {"script", "iframe", "object", "img"} & {tag for tag, _ in elements.found}
    for _, attributes in elements.found:
        for name in ("src", "href", "xlink:href", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page
    assert all(inside.startswith("#") for inside in re.findall(r"url\((.*?)\)", page))
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in elements.found:
        for name in ("aria-labelledby", "xlink:href"):
            wanted = attributes.get(name, "").replace("#", "").split()
            assert set(wanted) <= set(ids)


def test_every_picture_follows_the_theme(page):
    style, body = page.split("</style>", 1)
    assert all(f"--{name}: {color};" in style for name, color in THEME.items())
    assert not re.findall(r"#[0-9a-f]{6}\b", body)
    dark = re.search(r"prefers-color-scheme: dark\).*?\n}", style, re.DOTALL)[0]
    assert all(f"--{name}: #" in dark for name in THEME)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_and_marks_stand_out(page, scheme):
    """WCAG 2.1: 4.5 for text, 3 for what has to be seen in a picture."""
    style = page.split("</style>", 1)[0]
    part = style.split("prefers-color-scheme: dark")[scheme == "dark"]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part))
    for name, least in {"ink": 4.5, "muted": 4.5, "kept": 3.0, "line-1": 3.0}.items():
        for ground in ("paper", "page"):
            light, dark = sorted((luminance(colors[n]) for n in (name, ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)


def test_another_report_leaves_no_picture_of_the_one_before(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    write_page(make(pruning=None, curve=()), tmp_path / "run" / "report.html")
    names = {p.stem for p in (tmp_path / "run" / FIGURES).iterdir()}
    assert {n for n in names if "length" not in n} == {"quality", "latency", "time"}


def test_pictures_of_others_stay(tmp_path):
    own = tmp_path / FIGURES / "architecture.png"
    notebooks = tmp_path / FIGURES / ".ipynb_checkpoints"
    notebooks.mkdir(parents=True)
    own.write_bytes(b"mine")
    write_page(make(), tmp_path / "report.html")
    assert own.read_bytes() == b"mine" and notebooks.is_dir()


def test_names_cannot_break_out_of_the_page(tmp_path):
    evil = "</pre></svg><script>alert(1)</script>&\"'"
    plain = {"pruning": None, "curve": ()}
    report = make(recipe={"model": evil}, machine={evil: evil}, seconds={evil: 1.0}, **plain)
    write_page(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not Elements(page).open
    ElementTree.parse(tmp_path / FIGURES / "time.svg")


# In a real browser.

HARNESS = """<!DOCTYPE html><html><body><pre id="found"></pre><script>
const found = {}, widths = [400, 820, 1400];
function look(frame, width) {
  const doc = frame.contentDocument, root = doc.documentElement;
  const outside = [], small = [];
  for (const svg of doc.querySelectorAll("figure svg")) {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    for (const text of svg.querySelectorAll("text")) {
      const b = text.getBoundingClientRect();
      if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 ||
          b.bottom > box.bottom + 1) outside.push(text.textContent);
      const size = parseFloat(getComputedStyle(text).fontSize) * scale;
      if (size < 9.5 && !text.querySelector("tspan")) small.push(text.textContent + " " + size);
    }
  }
  found[width] = {scroll: root.scrollWidth, client: root.clientWidth, outside, small,
                  figures: doc.querySelectorAll("figure svg").length};
  document.getElementById("found").textContent = JSON.stringify(found);
}
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = "border:0;height:900px;width:" + width + "px";
  frame.onload = () => look(frame, width);
  frame.src = "report.html";
  document.body.append(frame);
}
</script></body></html>"""


def browse(folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """What a headless Chromium makes of a page, and what its console said."""
    command = [
        str(BROWSER),
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000",
        *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def looked_at(folder: Path) -> tuple[dict, list[str]]:
    (folder / "harness.html").write_text(HARNESS)
    dom, console = browse(folder, "--dump-dom", f"file://{folder}/harness.html")
    return json.loads(
        unescape(re.search('<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1])
    ), console


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_page_is_readable_on_a_telephone_and_on_a_wide_screen(written, tmp_path):
    shutil.copytree(written, tmp_path / "report")
    found, console = looked_at(tmp_path / "report")
    assert console == []
    assert set(found) == {"400", "820", "1400"}
    for width, seen in found.items():
        assert seen["scroll"] <= seen["client"], (width, seen)
        assert seen["outside"] == [], width  # letters that a picture cuts off
        assert seen["small"] == [], width
        assert seen["figures"] == 9
    shot = tmp_path / "shot.png"
    browse(
        tmp_path, f"--screenshot={shot}", "--window-size=1400,900", f"file://{written}/report.html"
    )
    from matplotlib.image import imread

    assert imread(shot).std() > 0.05


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_browser_test_sees_what_is_wrong(tmp_path):
    (tmp_path / "report.html").write_text(
        '<!DOCTYPE html><script>console.error("no")</script><div style="width:900px">wide</div>'
        '<figure style="width:100px"><svg viewBox="0 0 100 50" style="width:100%">'
        '<text x="95" y="20" font-size="5">cut off</text></svg></figure>'
    )
    found, console = looked_at(tmp_path)
    assert len(console) == 3 and "no" in console[0]
    assert found["400"]["scroll"] > found["400"]["client"]
    assert found["1400"]["scroll"] <= found["1400"]["client"]
    assert found["400"]["outside"] == ["cut off"]
    assert len(found["400"]["small"]) == 1
