"""Make a graded notebook harmless to look at: no script of a student's runs in formgrader or in the feedback page.

nbgrader 0.9.6 puts Markdown cells, HTML and JavaScript outputs and some metadata into its pages as they are, with the
rights of whoever looks at them. So what is kept of a notebook is what is on a list, and HTML goes through bleach,
which comes with nbconvert. Left out on purpose: anything that loads from elsewhere (a picture on another server tells
its owner who looked, and when), and ids, data- attributes and classes, which formgrader's own script acts on.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import nbformat
import tinycss2
from bleach.css_sanitizer import CSSSanitizer
from bleach.sanitizer import Cleaner

OUTPUT_LIMIT = 1_000_000  # characters of one output
NOTEBOOK_LIMIT = 20_000_000  # characters of all outputs and attachments together
OUTPUTS_LIMIT = 500  # outputs of one cell
# characters of a Markdown cell, and of all: nbconvert's time grows with the square of a hostile text, 5 s for 20,000
MARKDOWN_LIMIT, ALL_MARKDOWN_LIMIT = 20_000, 100_000
TAGS_LIMIT = 5_000  # opening angle brackets of one piece of HTML; bleach's time grows with the square of unclosed tags
PICTURES = ("image/png", "image/jpeg")
# formgrader's script finds its parts by these names; a heading of a student's must not be found in their place
PAGE_IDS = frozenset("top toc notebook notebook-container statusmessage MathJax".split())
CELL_METADATA = ("nbgrader", "tags", "deletable", "editable")

TAGS = frozenset(
    """a abbr b blockquote br caption center cite code col colgroup dd del details dfn div dl dt em figcaption figure
    h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p pre q s samp section small span strong sub summary sup table tbody
    td tfoot th thead tr tt u ul var wbr""".split()
)
_LINK = re.compile(r"(?:https?://|mailto:|#)[^\s\x00-\x1f]*", re.IGNORECASE)
_PICTURE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SIZE = re.compile(r"\d{1,4}(?:\.\d{1,3})?(?:%|px)?")
_CLASSES = frozenset(
    """alert alert-info alert-warning alert-success alert-danger lecturekit-verdict dataframe highlight
    anchor-link""".split()
)
_TEXTS = frozenset("alt title aria-label lang scope".split())
_STYLES = frozenset(
    """background background-color border border-top border-right border-bottom border-left border-collapse
    border-color border-radius border-style border-width color display font-family font-size font-style font-weight
    height line-height list-style-type margin margin-top margin-right margin-bottom margin-left max-width padding
    padding-top padding-right padding-bottom padding-left text-align text-decoration vertical-align white-space
    width""".split()
)
_CSS_TOKENS = frozenset("whitespace ident number dimension percentage hash string literal".split())
_CSS_FUNCTIONS = frozenset("rgb rgba hsl hsla".split())


class _Css(CSSSanitizer):
    """Keeps declarations of known properties whose values are plain: nothing that loads, places or pulls aside."""

    def sanitize_css(self, style: str) -> str:
        kept = []
        for declaration in tinycss2.parse_declaration_list(style, skip_comments=True, skip_whitespace=True):
            if declaration.type == "declaration" and declaration.lower_name in _STYLES and _plain(declaration.value):
                kept.append(f"{declaration.lower_name}:{tinycss2.serialize(declaration.value).strip()}")
        return ";".join(kept)


@dataclass
class _Room:
    """How many characters may still be kept of one notebook."""

    outputs: int = NOTEBOOK_LIMIT
    markdown: int = ALL_MARKDOWN_LIMIT


def _plain(tokens: list[Any]) -> bool:
    for token in tokens:
        if token.type == "function":
            if token.lower_name not in _CSS_FUNCTIONS:
                return False
        elif token.type not in _CSS_TOKENS or getattr(token, "value", None) in ("<", ">", "\\"):
            return False  # a url, a block, an error
        elif token.type in ("number", "dimension", "percentage") and token.value < 0:
            return False  # a negative margin would lay one thing over another
    return True


def sanitise(html: str, reserved: Collection[str] = ()) -> tuple[str, bool]:
    """HTML with only the tags, attributes and styles on our lists; other tags become text that can be read.

    reserved: ids that headings must not have. Returns (the HTML, whether an attribute was taken out).
    Raises ValueError for HTML with more than TAGS_LIMIT tags, or that changes each time it is read.
    """
    if html.count("<") > TAGS_LIMIT:
        raise ValueError(f"the HTML has more than {TAGS_LIMIT:,} tags")
    refused = False

    def allowed(tag: str, name: str, value: str) -> bool:
        nonlocal refused
        good = _attribute(tag, name, value, reserved)
        refused = refused or not good
        return good

    cleaner = Cleaner(
        tags=TAGS, attributes=allowed, protocols={"http", "https", "mailto", "data"}, css_sanitizer=_Css()
    )
    for _ in range(4):  # HTML that reads otherwise once it has been written out is how sanitisers are fooled
        before, html = html, str(cleaner.clean(html))
        if html == before:
            return html, refused
    raise ValueError("the HTML is never the same twice")


def _attribute(tag: str, name: str, value: str, reserved: Collection[str]) -> bool:
    if name in _TEXTS or name == "style" or (name == "open" and tag == "details"):
        return True
    if name == "href":
        return tag == "a" and _LINK.fullmatch(value) is not None
    if name == "src":
        return tag == "img" and _PICTURE.fullmatch(value) is not None
    if name in ("width", "height", "colspan", "rowspan", "start", "border"):
        return _SIZE.fullmatch(value) is not None
    if name == "align":
        return value.lower() in ("left", "right", "center", "justify")
    if name == "role":
        return value in ("status", "note", "img")
    if name == "id":
        return tag in ("h1", "h2", "h3", "h4", "h5", "h6") and value not in reserved
    if name == "class":
        if tag == "code" and re.fullmatch(r"language-[\w+-]{1,20}", value):
            return True
        short = tag == "span" and re.fullmatch(r"[a-z][a-z0-9]?", value)  # pygments' names for kinds of tokens
        return bool(short) or set(value.split()) <= _CLASSES
    return False


def clean(notebook: Mapping[str, Any], trusted: Collection[str] = ()) -> tuple[Any, list[str]]:
    """An executed notebook without anything that could run in, or change, the page that shows it.

    notebook: nbformat 4.   trusted: sources of Markdown cells to be left as they are, those of the release.
    Outputs keep plain text, PNG and JPEG pictures, and sanitised HTML. A Markdown cell keeps its source unless that
    holds raw HTML or a link or picture that is not allowed; then it becomes the sanitised HTML that it renders to.
    Returns (a new notebook, a sentence for each thing left out). Never raises for what a student put into it.
    """
    given = [cell for cell in _list(notebook.get("cells")) if isinstance(cell, Mapping)]
    names = {_grade_id(cell) for cell in given} - {""}
    endings = ("", "-comment", "_extra_credit")
    reserved = PAGE_IDS | {name + ending for name in names for ending in endings}
    notes: list[str] = []
    room = _Room()
    cells = []
    for number, cell in enumerate(given, 1):
        where = f"cell {number}"
        kind, source = cell.get("cell_type"), _text(cell.get("source"))
        metadata = _mapping(cell.get("metadata"))
        kept: dict[str, Any] = {
            "cell_type": kind,
            "id": cell["id"] if isinstance(cell.get("id"), str) else f"cell-{number}",
            "metadata": {key: metadata[key] for key in CELL_METADATA if key in metadata},
            "source": source,
        }
        if kind == "code":
            count = cell.get("execution_count")
            kept["execution_count"] = count if isinstance(count, int) else None
            kept["outputs"] = _outputs(_list(cell.get("outputs")), where, room, notes)
        elif kind == "markdown":
            attachments = _attachments(cell.get("attachments"), where, room, notes)
            if attachments:
                kept["attachments"] = attachments
            if source not in trusted:
                cut = source[: min(MARKDOWN_LIMIT, room.markdown)]
                room.markdown -= len(cut)
                if len(cut) < len(source):
                    notes.append(f"{where}: a text of {len(source):,} characters was cut to {len(cut):,}.")
                kept["source"] = _markdown(cut, attachments, reserved, where, notes)
        else:
            if source.strip():
                notes.append(f"{where}: a cell that is neither code nor Markdown was left out.")
            continue
        cells.append(kept)
    metadata = _mapping(notebook.get("metadata"))
    top = {key: metadata[key] for key in ("kernelspec", "lecturekit") if key in metadata}
    name = _mapping(metadata.get("language_info")).get("name")
    top["language_info"] = {"name": name if isinstance(name, str) and name.isalnum() else "python"}
    made = {"cells": cells, "metadata": top, "nbformat": 4, "nbformat_minor": 5}
    return nbformat.from_dict(made), notes


def _grade_id(cell: Mapping[str, Any]) -> str:
    name = _mapping(_mapping(cell.get("metadata")).get("nbgrader")).get("grade_id")
    return name if isinstance(name, str) else ""


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    """A multi-line string of a notebook: one string, or a list of them."""
    if isinstance(value, list):
        return "".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""


# --- Markdown -------------------------------------------------------------------------------------------------------


def rendered(source: str, attachments: Mapping[str, Any], escaped: bool = False) -> str:
    """The HTML that nbgrader's pages make of a Markdown cell. escaped: with raw HTML shown as text."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from nbconvert.filters.strings import strip_files_prefix

    renderer = IPythonRenderer(escape=escaped, attachments=dict(attachments), anchor_link_text="¶")
    return str(strip_files_prefix(MarkdownWithMath(renderer=renderer).render(source)))


def _markdown(
    source: str, attachments: Mapping[str, Any], reserved: Collection[str], where: str, notes: list[str]
) -> str:
    try:
        html = rendered(source, attachments)
        harmless, refused = sanitise(html, reserved)
        if not refused and html.strip() == harmless.strip() == source.strip() and "\n" not in source:
            return source  # cleaned before
        if not refused and "mermaid" not in html and html == rendered(source, attachments, escaped=True):
            return source  # no raw HTML in it, and every link and picture is allowed
        # without a line end it is one block of HTML, which the next rendering leaves as it is
        line, _ = sanitise("<div>" + re.sub(r"\r\n|[\n\r]", "&#10;", harmless) + "</div>", reserved)
        if rendered(line, {}).strip() != line:
            raise ValueError("the sanitised HTML does not stay as it is")
    except Exception:  # whatever a hostile text does to the parser, a name of a picture that is not there, deep nesting
        notes.append(f"{where}: the text could not be rendered and is shown as written.")
        return _verbatim(source)
    if _visible(harmless) != _visible(html):
        notes.append(f"{where}: markup or links that a page must not hold were taken out of the text.")
    return line


def _visible(html: str) -> str:
    """HTML without what differs between two writers of the same page."""
    return re.sub(r"[\s/\"']+", "", re.sub(r"<!--.*?-->", "", html, flags=re.DOTALL)).lower()


def _verbatim(source: str) -> str:
    """Markdown that shows a text as it was written: a fence longer than any run of backquotes in it."""
    longest = max((len(run) for run in re.findall(r"`+", source)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{source}\n{fence}"


# --- outputs --------------------------------------------------------------------------------------------------------


def _outputs(outputs: list[Any], where: str, room: _Room, notes: list[str]) -> list[dict[str, Any]]:
    if len(outputs) > OUTPUTS_LIMIT:
        notes.append(f"{where}: only the first {OUTPUTS_LIMIT} of {len(outputs):,} outputs were kept.")
    kept = []
    for output in outputs[:OUTPUTS_LIMIT]:
        made = _output(output, where, room, notes) if isinstance(output, Mapping) else None
        if made is None:
            continue
        size = _size(made)
        if size > OUTPUT_LIMIT or size > room.outputs:
            limit = "an output" if size > OUTPUT_LIMIT else "all outputs together"
            notes.append(f"{where}: an output of {size:,} characters was left out; {limit} may have {_limit(limit):,}.")
            continue
        room.outputs -= size
        kept.append(made)
    return kept


def _limit(what: str) -> int:
    return OUTPUT_LIMIT if what == "an output" else NOTEBOOK_LIMIT


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _output(output: Mapping[str, Any], where: str, room: _Room, notes: list[str]) -> dict[str, Any] | None:
    kind = output.get("output_type")
    if kind == "stream":
        text = _text(output.get("text"))
        if len(text) > OUTPUT_LIMIT:
            notes.append(f"{where}: printed text of {len(text):,} characters was cut to {OUTPUT_LIMIT:,}.")
            text = text[: OUTPUT_LIMIT - 100] + "\n(cut)\n"
        return {"output_type": kind, "name": "stderr" if output.get("name") == "stderr" else "stdout", "text": text}
    if kind == "error":
        lines = [line for line in _list(output.get("traceback")) if isinstance(line, str)]
        return {
            "output_type": kind,
            "ename": _text(output.get("ename")),
            "evalue": _text(output.get("evalue")),
            "traceback": lines,
        }
    if kind not in ("display_data", "execute_result"):
        return None
    data = _bundle(_mapping(output.get("data")), where, room, notes)
    if not data:
        return None
    made: dict[str, Any] = {
        "output_type": kind,
        "data": data,
        "metadata": _picture_metadata(output.get("metadata"), data),
    }
    if kind == "execute_result":
        count = output.get("execution_count")
        made["execution_count"] = count if isinstance(count, int) else None
    return made


def _bundle(given: Mapping[str, Any], where: str, room: _Room, notes: list[str]) -> dict[str, str]:
    """Of one output's representations those that are harmless."""
    data = {}
    for kind, value in given.items():
        text = _text(value)
        if kind == "text/plain" or (kind in PICTURES and _BASE64.fullmatch(text)):
            data[kind] = text
        elif kind in ("text/html", "text/markdown") and len(text) <= OUTPUT_LIMIT:
            try:
                html = text
                if kind == "text/markdown":
                    cut = text[: min(MARKDOWN_LIMIT, room.markdown)]
                    room.markdown -= len(cut)
                    html = rendered(cut, {})
                data["text/html"], refused = sanitise(html)
            except Exception:  # hostile enough for the parser to give up
                html = f"<pre>{escape(text[:2000])}</pre>"
                data["text/html"], refused = html, True
            if refused or data["text/html"].count("&lt;") > html.count("&lt;"):
                notes.append(f"{where}: markup that a page must not hold was taken out of an output.")
        else:
            notes.append(f"{where}: an output of the kind {_kind(kind)} was left out.")
    return data


def _kind(name: Any) -> str:
    """A mime type as a note may show it: student code chooses it."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.+-]{1,60}/[\w.+-]{1,60}", name) else "unknown"


def _picture_metadata(metadata: Any, data: Mapping[str, str]) -> dict[str, Any]:
    """Width, height and alt text of pictures. Width and height go into the page unquoted: numbers only."""
    kept = {}
    for kind in PICTURES:
        given = metadata.get(kind) if isinstance(metadata, Mapping) and kind in data else None
        if isinstance(given, Mapping):
            sizes = {key: given[key] for key in ("width", "height") if type(given.get(key)) in (int, float)}
            alt = {"alt": given["alt"]} if isinstance(given.get("alt"), str) else {}
            kept[kind] = sizes | alt
    return kept


def _attachments(given: Any, where: str, room: _Room, notes: list[str]) -> dict[str, dict[str, str]]:
    """PNG and JPEG pictures attached to a cell, as far as there is room."""
    kept: dict[str, dict[str, str]] = {}
    for name, bundle in given.items() if isinstance(given, Mapping) else ():
        data = (
            {kind: _text(bundle.get(kind)) for kind in PICTURES if kind in bundle}
            if isinstance(bundle, Mapping)
            else {}
        )
        data = {kind: text for kind, text in data.items() if _BASE64.fullmatch(text)}
        if not data or _size(data) > room.outputs or _size(data) > 10 * OUTPUT_LIMIT:
            notes.append(f"{where}: an attached file was left out: it is no PNG or JPEG picture, or too large.")
            continue
        room.outputs -= _size(data)
        kept[str(name)] = data
    return kept


# --- names ----------------------------------------------------------------------------------------------------------


def is_safe_id(student: str) -> bool:
    """Whether a student's id may stand in nbgrader's pages and paths, which do not escape it.

    Letters and digits of any script, and . _ @ + - but no dot in front; short enough for a file name.
    """
    return re.fullmatch(r"[\w@+-][\w.@+-]{0,127}", student) is not None and len(student.encode()) <= 200
