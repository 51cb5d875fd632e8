"""The pages of a run and of a study as a browser shows them: Chromium, where it is installed."""

import shutil

import pytest

from sapt_jax.report.__main__ import main
from tests.helpers.left_behind import HOSTILE, write_quality, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]
# What lies inside a box that scrolls, or is cut on purpose, may be wider than the box.
OVERFLOWS = """() => [...document.querySelectorAll("body *")].filter((element) =>
  !element.closest(".scroll, .skip, .picture, .attention .name") &&
  element.getBoundingClientRect().width > 0 &&
  (element.getBoundingClientRect().right > document.documentElement.clientWidth + 1 ||
   (element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0 &&
    getComputedStyle(element).display !== "inline"))).map((element) => element.outerHTML.slice(0, 120))"""
TEXTS_OUTSIDE = """() => [...document.querySelectorAll(".picture svg")].filter((svg) => {
  const box = svg.getBoundingClientRect();
  return box.width && [...svg.querySelectorAll("text")].some((text) => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 2 || own.right > box.right + 2;
  });
}).map((svg) => svg.closest("figure").id)"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{"run": a page of one run, "study": one of six}."""
    folder = tmp_path_factory.mktemp("pages")
    run = write_run(folder / "run", ("shout", "mirror", "first_of_a_long_name_that_goes_on"), rows=20, text=HOSTILE)
    write_quality(run, 0, "shout")
    for method in ("sapt", "sequential", "ewc"):
        for seed in (1, 2):
            write_run(folder / "study" / method / f"{seed}", method=method, seed=seed)
    made = {}
    for name in ("run", "study"):
        made[name] = folder / f"{name}.html"
        assert main([str(folder / name), f"--out={made[name]}"]) == 0
    return made


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is missing")
    with playwright.sync_playwright() as driver:
        # As root, in a container, there is no sandbox.
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser, pages):
    """Opens a page in a window so wide; what its console says is an error, and no request leaves it."""
    said = []

    def opened(name, width=1400, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else 0
        )
        page.goto(pages[name].as_uri())
        return page

    yield opened
    assert said == []


@pytest.mark.parametrize("name", ["run", "study"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_overflows(show, name, width):
    page = show(name, width)
    page.evaluate('document.querySelectorAll("details").forEach((part) => { part.open = true; })')
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWS) == []
    assert page.evaluate(TEXTS_OUTSIDE) == []


def cards(page):
    while page.locator("#more").is_visible():
        page.locator("#more").click()
    return page.locator("#rows article")


def test_filters_choose_answers(show):
    page = show("run")
    assert cards(page).count() == 60 and "60 answers match" in page.locator("#count").inner_text()
    page.locator("select[name=task]").select_option(label="2 mirror")
    assert cards(page).count() == 20
    page.locator("select[name=score]").select_option("right")
    assert cards(page).count() == 10
    assert page.locator("#rows article.right").count() == 10
    page.locator("select[name=score]").select_option("partly")
    assert cards(page).count() == 0
    page.locator("select[name=score]").select_option("all")
    page.locator("input[name=text]").fill("say 13")
    assert cards(page).count() == 1
    page.locator("input[name=text]").fill("")
    page.locator("select[name=task]").select_option("all")
    slots = page.locator("select[name=slot] option").all()
    counts = []
    for option in slots[1:]:
        page.locator("select[name=slot]").select_option(option.get_attribute("value"))
        counts.append(cards(page).count())
    assert sum(counts) == 60 and all(counts)


def test_texts_of_data_stay_texts(show):
    page = show("run")
    assert HOSTILE in page.locator("#rows article").first.locator("dd").first.text_content()
    assert page.locator("img").count() == 0


def test_a_study_shows_the_run_that_is_chosen(show):
    page = show("study")
    assert "6 runs of 3 kinds" in page.locator("#comparison").inner_text()
    names = page.locator("select[name=run] option").all_inner_texts()
    assert names == ["ewc/1", "sapt/1", "sequential/1"]
    page.locator("select[name=run]").select_option("sequential/1")
    page.locator("select[name=task]").select_option(label="3 first")
    assert cards(page).count() == 6


def test_everything_is_reached_with_the_keyboard(show):
    page = show("run")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.name || document.activeElement.tagName"))
    assert {"task", "score", "slot", "text", "SUMMARY", "BUTTON", "A"} <= reached


def test_a_dark_page_has_light_letters(show):
    colours = {}
    for scheme in ("light", "dark"):
        page = show("run", color_scheme=scheme)
        colours[scheme] = page.evaluate(
            """() => [document.body, document.querySelector(".picture svg text")].map((element) =>
            getComputedStyle(element)[element === document.body ? "backgroundColor" : "fill"])"""
        )
    lightness = {name: [sum(map(int, c[4:-1].split(","))) for c in both] for name, both in colours.items()}
    assert lightness["light"][0] > 700 > 200 > lightness["light"][1]
    assert lightness["dark"][0] < 120 < 600 < lightness["dark"][1]


def test_paper_shows_every_figure(show):
    page = show("study")
    assert page.locator("figure").last.is_hidden()
    page.emulate_media(media="print")
    page.evaluate('dispatchEvent(new Event("beforeprint"))')
    assert page.locator("figure").last.is_visible() and page.locator("#filters").is_hidden()
