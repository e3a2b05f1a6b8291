#!/usr/bin/env python3
"""Checks a report that `kvreplay report` wrote as its readers use it: opens the page in a browser without a network, looks
at every figure, works its controls with pointer and keys, reads the pictures, and runs the notebook in a copy.

    ENVIRONMENT/bin/python scripts/check-report.py REPORT [--screenshots DIR] [--open-within S] [--skip LIST]

ENVIRONMENT is what `scripts/make-report-environment.sh --checks` makes; the browser is the system's Chromium. Prints what was
checked and how long the page took; fails with a line for each thing that is wrong.
"""
import argparse
import contextlib
import csv
import json
import pathlib
import re
import shutil
import sys
import tempfile
import time
import zlib

LARGEST_PICTURE = 2_000_000  # bytes
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (420, 1000, 1900)  # of a telephone, half a screen, and a screen
# Of a specification's version and of the one that notebook viewers draw with.
VEGA_LITE_VERSIONS = ("6.4", "5.20")

failures = []


def expect(condition, text):
    """Notes that something is wrong and goes on."""
    if not condition:
        failures.append(text)
        print(f"check-report: WRONG: {text}", flush=True)
    return bool(condition)


def say(text):
    print(f"check-report: {text}", flush=True)


# Files

def png_is_blank(data):
    """Whether all rows of a PNG hold the same bytes."""
    pixels = b""
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        if data[at + 4:at + 8] == b"IDAT":
            pixels += data[at + 8:at + 8 + length]
        at += length + 12
    return len(set(zlib.decompress(pixels))) < 8


def check_pictures(report, names):
    largest = ("", 0)
    for name in names:
        for suffix in ("svg", "png", "pdf"):
            path = report / "figures" / f"{name}.{suffix}"
            if not expect(path.is_file(), f"{path.name}: is missing"):
                continue
            data = path.read_bytes()
            largest = max(largest, (path.name, len(data)), key=lambda pair: pair[1])
            expect(len(data) < LARGEST_PICTURE, f"{path.name}: {len(data):,} bytes")
            if suffix == "svg":
                text = data.decode("utf-8")
                marks = len(re.findall(r"<(?:path|text|image|rect|line|circle)\b", text))
                expect(text.rstrip().endswith("</svg>") and marks > 10, f"{path.name}: {marks} marks")
                expect("undefined" not in text and "NaN" not in text, f"{path.name}: says NaN or undefined")
            elif suffix == "png":
                expect(data.startswith(b"\x89PNG") and not png_is_blank(data), f"{path.name}: is blank")
            else:
                expect(data.startswith(b"%PDF-") and b"%%EOF" in data[-64:] and len(data) > 2000,
                       f"{path.name}: is no whole PDF file")
    say(f"{3 * len(names)} pictures, the largest {largest[0]} of {largest[1] / 1e6:.2f} MB")


def check_tables(report, names):
    rows = 0
    for name in names:
        path = report / "tables" / f"{name}.csv"
        if not expect(path.is_file(), f"{path.name}: is missing"):
            continue
        with path.open(newline="", encoding="utf-8") as file:
            head, *body = list(csv.reader(file))
        expect(body, f"{path.name}: has no rows")
        expect(len(set(head)) == len(head) and all(len(row) == len(head) for row in body), f"{path.name}: is ragged")
        rows += len(body)
    say(f"{len(names)} tables, {rows:,} rows")


def check_specifications(report, names):
    """That they are valid Vega-Lite, also of the version that notebook viewers have."""
    import altair
    import vl_convert

    for name in names:
        path = report / "figures" / f"{name}.vl.json"
        expect(path.stat().st_size < LARGEST_PICTURE, f"{path.name}: {path.stat().st_size:,} bytes")
        specification = json.loads(path.read_text(encoding="utf-8"))
        try:
            altair.Chart.from_dict({key: value for key, value in specification.items() if key != "data"} |
                                   {"data": {"values": []}})
        except Exception as error:
            expect(False, f"{path.name}: is not Vega-Lite: {str(error).splitlines()[0]}")
        for version in VEGA_LITE_VERSIONS:
            try:
                vl_convert.vegalite_to_vega(specification | {"data": {"values": []}}, vl_version=version)
            except Exception as error:
                expect(False, f"{path.name}: Vega-Lite {version} does not take it: {str(error).splitlines()[0]}")


# The page

# The marks that a drawn figure has, beside its axes and legends, as far as they have a size.
COUNT_MARKS = """figure => {
  let marks = 0;
  for (const group of figure.querySelectorAll('svg .role-mark')) {
    for (const mark of group.querySelectorAll('path, text, image, line')) {
      const box = mark.getBoundingClientRect();
      if (box.width > 0 || box.height > 0) ++marks;
    }
  }
  return marks;
}"""

# What can be worked in the page, in the order of the document, as far as it can be seen: of a group of radio buttons one.
CONTROLS = """() => {
  const seen = new Set();
  const controls = [];
  for (const control of document.querySelectorAll('a[href], button, select, input, textarea, summary, [tabindex]')) {
    if (control.disabled || control.tabIndex < 0 || !control.checkVisibility({visibilityProperty: true})) continue;
    if (control.type === 'radio') {
      if (seen.has(control.name)) continue;
      seen.add(control.name);
    }
    control.dataset.checked = controls.length;
    controls.push(control.outerHTML.slice(0, 120).replace(/\\s+/g, ' '));
  }
  return controls;
}"""

FOCUSED = """() => {
  const element = document.activeElement;
  if (!element || element === document.body) return null;
  const style = getComputedStyle(element);
  const radio = element.type === 'radio' ? document.querySelector(`input[name="${element.name}"][data-checked]`) : null;
  return {index: (radio || element).dataset.checked,
          visible: style.outlineStyle !== 'none' || style.boxShadow !== 'none'};
}"""

BRIGHTNESS = """() => {
  const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
  return (red + green + blue) / 3;
}"""

# What is drawn, to see whether it changed.
DRAWN = "() => [...document.querySelectorAll('figure .plot')].map(plot => plot.innerHTML).join('')"


# Captions and findings that do not fit into the window, or only by scrolling, and letters of figures outside of these.
CUT_OFF = """() => {
  const cut = [];
  const edge = document.documentElement.clientWidth;
  for (const text of document.querySelectorAll('figcaption, .caption, #summary > div p, #summary li, h1, h2, h3')) {
    if (!text.checkVisibility()) continue;
    const box = text.getBoundingClientRect();
    if (box.left < 0 || box.right > edge + 1 || text.scrollWidth > text.clientWidth + 1 ||
        text.parentElement.closest('.scroll')) cut.push(text.textContent.slice(0, 80));
  }
  for (const svg of document.querySelectorAll('.plot svg')) {
    const around = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll('text')) {
      const box = text.getBoundingClientRect();
      if (box.width > 0 && (box.left < around.left - 2 || box.right > around.right + 2)) {
        cut.push(`${svg.closest('figure').id}: ${text.textContent.slice(0, 80)}`);
      }
    }
    if (around.right > edge + 1) cut.push(`${svg.closest('figure').id}: its right`);
  }
  return cut;
}"""

# Entries of one legend that cannot be told apart, by colour and by line.
ALIKE = """() => {
  const alike = [];
  for (const figure of document.querySelectorAll('figure')) {
    const seen = new Set();
    for (const symbol of figure.querySelectorAll('.role-legend-symbol path')) {
      const look = `${symbol.getAttribute('stroke')} ${symbol.getAttribute('d').replace(/M[^M]*$/, '')}`;
      if (seen.has(look)) alike.push(`${figure.id}: two entries of the legend look alike: ${look}`);
      seen.add(look);
    }
  }
  return alike;
}"""


def chromium(named):
    for name in [named] if named else BROWSERS:
        if path := shutil.which(name):
            return path
    sys.exit(f"check-report: no browser ({named or ', '.join(BROWSERS)}): scripts/install-dependencies.sh --ci installs one")


class Page:
    """The page of a report in a browser, and everything in it that went wrong."""

    def __init__(self, browser, report, **options):
        self.context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}, **options)
        self.page = self.context.new_page()
        self.address = (report / "index.html").resolve().as_uri()
        self.page.on("console", self.heard)
        self.page.on("pageerror", lambda error: expect(False, f"page: {error}"))
        self.page.on("request", self.requested)

    def heard(self, message):
        if message.type in ("error", "warning"):
            expect(False, f"console: {message.type}: {message.text}")

    def requested(self, request):
        own = request.url.split("#")[0] == self.address or request.url.startswith(("data:", "blob:"))
        expect(own, f"page: asks for {request.url[:100]}")

    def open(self):
        """Seconds until the page is there, and until the first of its figures is."""
        started = time.monotonic()
        self.page.goto(self.address, wait_until="load")
        self.page.evaluate("() => document.title")  # answered when the page's own scripts leave it time
        loaded = time.monotonic() - started
        with contextlib.suppress(Exception):
            self.page.wait_for_selector("figure[data-drawn], figure[data-failed]", state="attached", timeout=30_000)
        return loaded, time.monotonic() - started

    def draw_all(self):
        started = time.monotonic()
        self.page.evaluate("() => window.kvreplay.drawAll()")
        return time.monotonic() - started

    def check_figures(self, when):
        """That every figure which is shown was drawn, with marks in it; their number."""
        figures = self.page.query_selector_all("figure")
        shown = [figure for figure in figures if figure.is_visible()]
        for figure in shown:
            name = figure.get_attribute("id")
            if figure.get_attribute("data-failed"):
                expect(False, f"{when}: {name}: {figure.query_selector('.message').inner_text()}")
                continue
            empty = figure.query_selector(".message").inner_text()  # filters may leave nothing, which it says
            if expect(figure.get_attribute("data-drawn") == "true", f"{when}: {name} is not drawn") and not empty:
                marks = figure.evaluate(COUNT_MARKS)
                expect(marks > 0, f"{when}: {name} has no marks")
            expect(not empty or when not in ("as it is opened", "dark"), f"{when}: {name} says: {empty}")
        return len(shown)

    def check_keyboard(self):
        """That Tab comes to every control in the order of the page, and shows where it is."""
        controls = self.page.evaluate(CONTROLS)
        self.page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
        reached = []
        for _ in range(min(len(controls), 200) + 5):
            self.page.keyboard.press("Tab")
            focused = self.page.evaluate(FOCUSED)
            if focused is None:
                break
            if focused["index"] is not None:
                index = int(focused["index"])
                if reached and index == reached[0]:
                    break
                reached.append(index)
                expect(focused["visible"], f"keyboard: where the focus is cannot be seen: {controls[index]}")
        for index in range(min(len(controls), 200)):
            expect(index in reached, f"keyboard: Tab does not come to {controls[index]}")
        expect(reached == sorted(reached), "keyboard: Tab does not follow the order of the page")
        return len(reached)

    def screenshot(self, folder, name):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=folder / f"{name}.png", full_page=True)

    def check_change(self, what, change):
        """That figures look different after a change, and that none is lost by it."""
        before = self.page.evaluate(DRAWN)
        change()
        self.draw_all()
        if self.check_figures(what):
            expect(self.page.evaluate(DRAWN) != before, f"{what}: no figure changed")

    def check_filters(self, screenshots):
        """That each filter changes figures and that every figure comes back; what was filtered."""
        tried = []
        unfiltered = self.page.evaluate(DRAWN)
        for select in self.page.query_selector_all("#filters select"):
            label = select.evaluate("select => select.labels[0].firstChild.textContent.trim()")
            value = select.evaluate("select => select.options[select.options.length - 1].value")
            self.check_change(f"{label} {value}", lambda: select.select_option(value))
            self.check_change(f"{label} all again", lambda: select.select_option(index=0))
            tried.append(label.lower())
        boxes = self.page.query_selector_all("#filters input[type=checkbox]")
        if boxes:
            if not boxes[0].is_visible():
                self.page.click("#filters summary")
            self.check_change("one policy", lambda: [box.uncheck() for box in boxes[1:]])
            self.screenshot(screenshots, "one-policy")
            self.check_change("all policies again", lambda: [box.check() for box in boxes[1:]])
            tried.append(f"{len(boxes)} policies")
        names = re.compile(r'(?<=["#])[a-zA-Z_-]*\d+[^")]*')  # of clips and gradients, which are counted up
        expect(names.sub("", self.page.evaluate(DRAWN)) == names.sub("", unfiltered),
               "filters: taken back they leave other figures than before")
        return ", ".join(tried) or "none"

    def check_choices(self):
        """That each figure draws whatever its own lists offer last; how many lists."""
        lists = len(self.page.query_selector_all("figure .choices select"))
        for index in range(lists):
            select = self.page.query_selector_all("figure .choices select")[index]
            select.select_option(index=select.evaluate("select => select.options.length - 1"))
        self.page.wait_for_timeout(200)
        self.check_figures("with other choices")
        return lists

    def check_width(self, width, screenshots):
        """That a window of some width is used as a whole, and that nothing is cut off at its edges."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.wait_for_timeout(400)  # until figures are drawn for the new width
        self.draw_all()
        self.check_figures(f"{width} wide")
        used = self.page.evaluate("() => document.documentElement.scrollWidth")
        expect(used <= width, f"page: {used} wide in a window of {width}")
        used = self.page.evaluate("() => document.querySelector('main').getBoundingClientRect().width")
        expect(used > 0.9 * width, f"page: uses {used:.0f} of a window of {width}")
        for text in self.page.evaluate(CUT_OFF):
            expect(False, f"{width} wide: is cut off: {text}")
        for text in self.page.evaluate(ALIKE):
            expect(False, f"{width} wide: {text}")
        self.screenshot(screenshots, f"{width}-wide")

    def check_theme(self, screenshots):
        before = self.page.evaluate(BRIGHTNESS)
        self.page.click("#theme")
        after = self.page.evaluate(BRIGHTNESS)
        expect(before > 128 > after, f"page: brightness {before:.0f}, and {after:.0f} when dark is asked for")
        self.check_figures("switched to dark")
        self.screenshot(screenshots, "switched-to-dark")
        self.page.click("#theme")
        expect(self.page.evaluate(BRIGHTNESS) == before, "page: does not become light again")


# The notebook

def check_notebook(report, names):
    """That it is valid, shows every figure as it is, and draws every figure again."""
    import nbformat
    from nbconvert.preprocessors import CellExecutionError, ExecutePreprocessor

    path = report / "notebook.ipynb"
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    try:
        nbformat.validate(json.loads(text))
    except nbformat.ValidationError as error:
        expect(False, f"notebook: {error}")
    # Written numbers may differ in their last digits and be the same.
    saved = nbformat.writes(notebook)
    same = json.dumps(json.loads(saved)) == json.dumps(json.loads(text))
    expect(same and saved.count("\n") + 1 == text.count("\n"), "notebook: saving it unchanged changes it")

    def drawn(cells, when):
        code = [cell for cell in cells if cell.cell_type == "code"][1:]  # the first one sets up
        expect(len(code) == len(names), f"notebook {when}: {len(code)} cells for {len(names)} figures")
        for cell in code:
            data = [output.data for output in cell.outputs if "data" in output]
            charts = [part for part in data if "image/png" in part or "application/vnd.vegalite.v5+json" in part]
            expect(charts, f"notebook {when}: {cell.id} shows nothing")
            for part in charts:
                picture = part.get("image/png", "")
                expect(not picture or len(picture) > 1000, f"notebook {when}: {cell.id} has an empty picture")
        for cell in cells:
            for output in cell.get("outputs", []):
                expect(output.output_type not in ("stream", "error"),
                       f"notebook {when}: {cell.id} says {str(output.get('text', output.get('evalue')))[:300]}")

    drawn(notebook.cells, "as it is opened")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "report"
        shutil.copytree(report, copy)
        try:
            executed, _ = ExecutePreprocessor(
                timeout=300, kernel_name="python3", extra_arguments=["--log-level=ERROR"]).preprocess(
                    notebook, {"metadata": {"path": str(copy)}})
        except CellExecutionError as error:
            expect(False, f"notebook: {error}")
        else:
            drawn(executed.cells, "run again")
    say(f"notebook of {len(text) / 1e6:.1f} MB with {len(names)} figures, run again in {time.monotonic() - started:.1f} s")


def check_page(report, options):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(options.browser), args=["--no-sandbox"])
        browser.new_page().close()  # the first page of a browser waits for it to be ready
        page = Page(browser, report, color_scheme="light")
        loaded, first = page.open()
        drawn = page.draw_all()
        figures = page.check_figures("as it is opened")
        say(f"page of {(report / 'index.html').stat().st_size / 1e6:.1f} MB: there after {loaded:.2f} s, with its first figure "
            f"after {first:.2f} s; {figures} figures drawn in another {drawn:.2f} s")
        expect(loaded < options.open_within, f"page: there after {loaded:.1f} s")
        page.screenshot(options.screenshots, "light")
        reached = page.check_keyboard()
        say(f"keyboard: Tab comes to {reached} controls")
        say(f"filters: {page.check_filters(options.screenshots)}; {page.check_choices()} lists of single figures")
        page.check_theme(options.screenshots)
        page.context.close()
        # The reader's own preference.
        page = Page(browser, report, color_scheme="dark")
        page.open()
        expect(page.page.evaluate(BRIGHTNESS) < 128, "page: is bright for readers who prefer dark")
        page.draw_all()
        page.check_figures("dark")
        page.screenshot(options.screenshots, "dark")
        page.context.close()
        page = Page(browser, report, color_scheme="light")
        page.open()
        for width in WIDTHS:
            page.check_width(width, options.screenshots)
        browser.close()
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--screenshots", type=pathlib.Path, metavar="DIR", help="writes what was seen there")
    parser.add_argument("--browser", metavar="NAME", help="default: the first there is of " + ", ".join(BROWSERS))
    parser.add_argument("--open-within", type=float, default=30, metavar="S",
                        help="seconds until the page is there, default %(default)s: for the page's own limit the machine "
                             "has to be idle")
    parser.add_argument("--skip", default="", metavar="LIST", help="of pictures, page, notebook")
    options = parser.parse_args()
    report = options.report.resolve()
    if not (report / "index.html").is_file():
        sys.exit(f"check-report: {options.report}: is no report, it has no index.html")
    skipped = options.skip.split(",")
    names = sorted(path.name.removesuffix(".vl.json") for path in (report / "figures").glob("*.vl.json"))
    expect(names, "there are no figures")

    check_tables(report, names)
    check_specifications(report, names)
    if "pictures" not in skipped:
        check_pictures(report, names)
    if "page" not in skipped:
        figures = check_page(report, options)
        expect(figures == len(names), f"page: {figures} figures, and there are {len(names)} specifications")
    if "notebook" not in skipped:
        check_notebook(report, names)
    if failures:
        sys.exit(f"check-report: {len(failures)} things are wrong with {options.report}")
    say(f"{options.report} is as it should be: {len(names)} figures")


if __name__ == "__main__":
    main()
