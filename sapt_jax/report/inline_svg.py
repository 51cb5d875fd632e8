"""A drawing as SVG that stands inside a page: small, with the page's fonts, and colours that are CSS variables."""

import io
import re
from xml.etree import ElementTree

from sapt_jax.results.figures.style import GRID, INK, MUTED, PAPER, SERIES, Drawing, house_style

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
VARIABLES |= {colour: f"series-{index}" for index, colour in enumerate(SERIES)}
# What neighbours may inherit from a group around them.
_SHARED = ("style", "clip-path")


def inline_svg(drawing: Drawing, key: str) -> str:
    """The SVG element of a figure; its ids begin with `key`, so that many stand on one page."""
    import matplotlib

    out = io.BytesIO()
    with house_style(), matplotlib.rc_context({"svg.fonttype": "none"}):
        drawing.figure.savefig(out, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue())
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.text = element.text if element.tag == "text" else None
        element.tail = None
        _shorten(element, key)
    _flatten(root)
    _group(root)
    # The page sets the size and says what the picture shows.
    root.attrib = {"viewBox": root.get("viewBox", ""), "aria-hidden": "true", "focusable": "false"}
    return ElementTree.tostring(root, encoding="unicode")


def _shorten(element: ElementTree.Element, key: str) -> None:
    attributes = element.attrib
    if _LINK in attributes:
        target = attributes.pop(_LINK)
        attributes["href"] = f"#{key}{target[1:]}" if target.startswith("#") else re.sub(r"\s", "", target)
    if "id" in attributes:
        # Only what others point to keeps its name.
        name = attributes.pop("id")
        if element.tag != "g" and element.tag != "svg":
            attributes["id"] = f"{key}{name}"
    for name in ("d", "x", "y", "width", "height"):
        if name in attributes:
            attributes[name] = _numbers(attributes[name], 1)
    if "d" in attributes:
        attributes["d"] = re.sub(r" ?([A-Za-z]) ?", r"\1", " ".join(attributes["d"].split()))
    if "transform" in attributes:
        if attributes["transform"].startswith("rotate(-0 "):
            del attributes["transform"]
        else:
            attributes["transform"] = _numbers(attributes["transform"], 4)
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{key}")
    if "style" in attributes:
        attributes["style"] = _style(attributes["style"])


def _style(style: str) -> str:
    style = re.sub(r"font-family:[^;]*;?\s*", "", style)
    style = re.sub(r"(font: (?:[a-z\d]+ )?[\d.]+px)[^;]*", r"\1 sans-serif", style)
    for colour, name in VARIABLES.items():
        style = style.replace(colour, f"var(--{name})")
    return re.sub(r"([:;]) ", r"\1", _numbers(style, 2)).strip("; ")


def _numbers(text: str, digits: int) -> str:
    def rounded(found: re.Match[str]) -> str:
        value = f"{float(found[0]):.{digits}f}".rstrip("0").rstrip(".")
        return "0" if value == "-0" else value

    return re.sub(r"-?\d+\.\d+", rounded, text)


def _flatten(element: ElementTree.Element) -> None:
    """Takes away what shows nothing, and groups that say nothing."""
    kept: list[ElementTree.Element] = []
    for child in element:
        _flatten(child)
        invisible = child.tag == "path" and child.get("style") == "fill:none"
        empty = child.tag in ("g", "defs") and not len(child)
        if child.tag in ("metadata", "style") or invisible or empty:
            continue
        kept += list(child) if child.tag == "g" and not child.attrib else [child]
    element[:] = kept


def _group(element: ElementTree.Element) -> None:
    """Says once what neighbours have in common."""
    for child in element:
        _group(child)
    kept: list[ElementTree.Element] = []
    for child in element:
        shared = {name: child.attrib[name] for name in _SHARED if name in child.attrib}
        before = kept[-1] if kept else None
        if not shared or child.tag in ("g", "image"):
            kept.append(child)
            continue
        if before is not None and before.tag == "g" and before.attrib == shared:
            group = before
        else:
            group = ElementTree.Element("g", shared)
            kept.append(group)
        for name in shared:
            del child.attrib[name]
        group.append(child)
    for place, group in enumerate(kept):
        # A clip is measured where its element stands, so that it cannot move onto one that is shifted itself.
        if group.tag == "g" and len(group) == 1 and group[0].tag == "path" and "transform" not in group[0].attrib:
            if not set(group.attrib) & set(group[0].attrib):
                group[0].attrib.update(group.attrib)
                kept[place] = group[0]
    element[:] = kept
