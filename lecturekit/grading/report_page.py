"""How the instructor's report looks: its figures, its tables, its template."""

from __future__ import annotations

import base64
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from markupsafe import Markup

from lecturekit.explore import style
from lecturekit.grading import similarity

if TYPE_CHECKING:
    from lecturekit.grading.report import Gathered, Item, QuestionText

ROWS = 1_000  # rows of one list of submissions; a page of 10,000 rows helps nobody
REASONS = {
    "problems": (
        "Something went wrong while it ran",
        "A crash, a time limit or output cut off. The other answers were judged all the same.",
    ),
    "dropped": ("Not everything was taken over", "Staging left something out or put it back."),
    "pending": ("Waiting for a GPU", "Neither passed nor failed yet: grade these again on a machine with a GPU."),
    "low trust": (
        "Points that rest on plain asserts",
        "These tests ran beside the student's code, which could fool them.",
    ),
    "by hand": ("Written answers waiting", "Give their points in formgrader."),
}


def visible(value: Any) -> Any:
    """A value for the page: text with control, bidi and other invisible characters shown as escapes.

    Without this a name could turn the line around it, or look like another.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else f"\\u{{{ord(character):04X}}}"
        for character in value
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def picture(drawn: style.Picture) -> Markup:
    """The figure as an <img> with its text."""
    data = base64.b64encode(drawn.png).decode("ascii")
    tag = '<img src="data:image/png;base64,{}" alt="{}" width="{}">'
    return Markup(tag).format(Markup(data), visible(drawn.text), drawn.width)


def histogram(scores: Sequence[float], total: float) -> style.Picture:
    """How many submissions earned how many points, in ten classes."""
    figure, (axes,) = style.figure(width=8, height=3.6)
    edges = [total * step / 10 for step in range(11)]
    counts, _, _ = axes.hist([min(score, total) for score in scores], bins=edges, color=style.BLUE, edgecolor="white")
    axes.set(xlabel=f"points earned so far, of {total:g}", ylabel="submissions", xlim=(0, total))
    axes.yaxis.get_major_locator().set_params(integer=True)
    parts = [f"{edges[i]:g} to {edges[i + 1]:g} points: {int(count)}" for i, count in enumerate(counts) if count]
    return style.alt(figure, f"Histogram of the scores of {len(scores)} submissions. " + "; ".join(parts) + ".")


def items_picture(items: Sequence[Item]) -> style.Picture:
    """Pass rates with their intervals, and discrimination, one row a question."""
    height = 1.1 + 0.42 * len(items)
    figure, (left, right) = style.figure(1, 2, width=5.2, height=height, sharey=True, width_ratios=[1.25, 1])
    places = range(len(items))
    said = []
    for place, item in zip(places, items, strict=True):
        if item.interval:
            rate, (low, high) = item.passed / item.judged, item.interval
            left.barh(place, rate, color=style.SKY, height=0.6)
            left.plot([low, high], [place, place], color=style.BLACK, linewidth=1.6)
            said.append(f"{name(item)} {percent(rate)}")
        if item.discrimination is None:
            right.text(0.02, place, "not defined", va="center", fontsize=10, color=style.GREY)
        else:
            colour = style.VERMILION if item.discrimination < 0.1 else style.BLUE
            right.barh(place, item.discrimination, color=colour, height=0.6)
    left.set_yticks(list(places), [_label(item) for item in items])
    left.invert_yaxis()
    left.set(xlim=(0, 1), xlabel="share who passed, with 95 % interval")
    left.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    right.set(xlim=(min([0.0, *(i.discrimination for i in items if i.discrimination is not None)]) - 0.02, 1))
    right.set_xlabel("discrimination")
    right.axvline(0, color=style.GREY, linewidth=1)
    return style.alt(
        figure, "Share who passed each question: " + "; ".join(said) + ". The table below has all numbers."
    )


def name(item: Item) -> str:
    return item.question or item.cell


def _label(item: Item) -> str:
    """A name for an axis: short, and without matplotlib's signs for mathematics."""
    shown = visible(name(item))
    return (shown if len(shown) <= 30 else f"{shown[:29]}…").replace("$", r"\$")


def render(
    lab: str,
    gathered: Gathered,
    questions: Mapping[str, QuestionText],
    alike: Sequence[tuple[similarity.Alike, Sequence[tuple[str, float, str, str]]]],
    groups: int,
) -> str:
    """The whole page."""
    items = list(gathered.items.values())
    judged = [item for item in items if item.judged]
    total = sum(item.points for item in items)
    scores = gathered.scores
    steps = sorted(gathered.seconds.items(), key=lambda step: -sum(step[1]))
    spent = sum(sum(seconds) for _, seconds in steps)
    summary: list[tuple[str, str]] = [
        ("Submissions graded", f"{len(scores):,}"),
        ("Not handed in", f"{len(gathered.missing):,}"),
        ("Points of the lab", f"{total:g}"),
    ]
    if scores:
        quarters = statistics.quantiles(scores, n=4, method="inclusive") if len(scores) > 1 else scores * 3
        summary += [
            ("Mean score", f"{statistics.fmean(scores):.1f}"),
            ("Median (middle half)", f"{quarters[1]:.1f} ({quarters[0]:.1f} to {quarters[2]:.1f})"),
            ("All points earned", f"{sum(score >= total - 1e-9 for score in scores):,}"),
            ("With points still to be given", f"{sum(left > 0 for left in gathered.open):,}"),
        ]
    return _PAGE.render(
        lab=lab,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=summary,
        scores=scores,
        histogram=picture(histogram(scores, total)) if scores and total else None,
        items=items,
        judged=judged,
        items_picture=picture(items_picture(judged)) if judged else None,
        questions=questions,
        mistakes=_mistakes(items, questions),
        others=[(item, item.kinds.most_common()) for item in items if item.kinds],
        eyes=[(REASONS[key], entries[:ROWS], len(entries)) for key, entries in gathered.eyes.items() if entries],
        low_trust=[item for item in items if item.low_trust],
        alike=alike,
        groups=groups,
        limits=similarity.LIMITS,
        steps=[(step, sum(s), sum(s) / spent if spent else 0.0, statistics.median(s), max(s)) for step, s in steps],
        devices=gathered.devices.most_common(),
        rows=ROWS,
    )


def _mistakes(items: Sequence[Item], questions: Mapping[str, QuestionText]) -> list[tuple[Item, list[Any]]]:
    """For each question its misconceptions, the commonest first: (name, how many, of how many, hint)."""
    found = []
    for item in items:
        hints = questions[item.question].hints if item.question and item.question in questions else {}
        rows = [
            (mistake, count, item.attempted, hints.get(mistake, "")) for mistake, count in item.mistakes.most_common()
        ]
        if rows:
            found.append((item, rows))
    return found


_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{{ lab }}: report</title>
<style>
:root { color-scheme: light dark; --line: #b8b8b8; --soft: #f3f5f7; --quiet: #555; --accent: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --soft: #22262b; --quiet: #b5b5b5; --accent: #56B4E9; } }
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .5rem; border-bottom: 2px solid var(--accent); padding-bottom: .2rem; }
h3 { font-size: 1.08rem; margin: 1.5rem 0 .3rem; }
p { max-width: 46rem; margin: .4rem 0; }
.quiet, caption { color: var(--quiet); }
a { color: var(--accent); }
nav ul { padding: 0; margin: .6rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
dl div { background: var(--soft); border-radius: .4rem; padding: .55rem .8rem; }
dt { font-size: .87rem; color: var(--quiet); }
dd { margin: 0; font-size: 1.22rem; font-weight: 600; }
img { max-width: 100%; height: auto; background: white; border-radius: .3rem; display: block; margin: .8rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .94rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .32rem .7rem; border-bottom: 1px solid var(--line); }
th { background: var(--soft); }
tbody th { background: none; font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td, th, li, summary { overflow-wrap: anywhere; unicode-bidi: isolate; }
th, .wide td { overflow-wrap: break-word; }
tbody th { overflow-wrap: anywhere; }
.wide tbody th { overflow-wrap: break-word; min-width: 9rem; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem; }
summary { cursor: pointer; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .8rem; }
figure { margin: .5rem 0; min-width: 0; }
figcaption { font-size: .9rem; color: var(--quiet); overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .6rem .8rem; margin: .2rem 0; border-radius: .3rem; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { nav { display: none; } body { max-width: none; padding: 0; }
  h2, h3, caption { break-after: avoid; } tr, img, figure { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<h1>{{ lab }}: report for the instructor</h1>
<p class="quiet">Made {{ made }}. Names and work of students: keep it as you keep the marks.</p>
<nav aria-label="Sections"><ul>
<li><a href="#summary">Summary</a></li><li><a href="#questions">Questions</a></li>
<li><a href="#mistakes">Misconceptions</a></li><li><a href="#others">Other failures</a></li>
<li><a href="#eyes">To look at</a></li><li><a href="#alike">Similar solutions</a></li>
<li><a href="#time">Time</a></li></ul></nav>
</header>
<main>
<section aria-labelledby="summary">
<h2 id="summary">Summary</h2>
<dl>{% for label, value in summary %}<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% if histogram %}{{ histogram }}{% else %}<p>There are no scores to draw.</p>{% endif %}
</section>

<section aria-labelledby="questions">
<h2 id="questions">Questions</h2>
<p>Discrimination is the correlation of a question's score with the score of all the others together (corrected
item–total, point-biserial where a question is all or nothing). Near zero or below: it does not tell the strong from
the weak; look at the question first. The interval is Wilson's, of 95 %.</p>
{% if items_picture %}{{ items_picture }}{% endif %}
<div class="wide" tabindex="0" role="region" aria-label="Table of questions"><table>
<caption>Every graded cell; n counts those judged so far</caption>
<thead><tr><th scope="col">Question</th><th scope="col">Cell</th><th scope="col" class="n">Points</th>
<th scope="col" class="n">n</th><th scope="col" class="n">Attempted</th><th scope="col" class="n">Passed</th>
<th scope="col" class="n">95 % interval</th><th scope="col" class="n">Discrimination</th>
<th scope="col" class="n">Not marked yet</th></tr></thead>
<tbody>{% for item in items %}<tr>
<th scope="row">{{ item.question or item.cell }}{% if item.question in questions %}<br>
<span class="quiet">{{ questions[item.question].title }}</span>{% endif %}</th>
<td>{{ item.cell }}</td><td class="n">{{ "%g" % item.points }}</td><td class="n">{{ item.judged }}</td>
{% if item.judged %}<td class="n">{{ item.attempted }}</td>
<td class="n">{{ item.passed }} ({{ percent(item.passed / item.judged) }})</td>
<td class="n">{{ percent(item.interval[0]) }} – {{ percent(item.interval[1]) }}</td>
{% else %}<td class="n">–</td><td class="n">–</td><td class="n">–</td>{% endif %}
<td class="n">
{%- if item.discrimination is none %}not defined{% else %}{{ "%.2f" % item.discrimination }}{% endif %}</td>
<td class="n">{{ item.waiting + item.pending }}</td></tr>{% endfor %}</tbody></table></div>
<p class="quiet">“Not defined”: everyone passed or everyone failed, all the rest is equal, or fewer than three have a
mark.</p>
</section>

<section aria-labelledby="mistakes">
<h2 id="mistakes">Most frequent misconceptions</h2>
{% for item, rows in mistakes %}
<h3>{{ item.question or item.cell }}{% if item.question in questions %}: {{ questions[item.question].title }}{% endif %}
</h3>
<ul>{% for mistake, count, attempted, hint in rows %}
<li><strong>{{ percent(count / attempted) if attempted else "–" }} ({{ count }} of {{ attempted }})</strong>
{{ mistake }}{% if hint %}<br><span class="quiet">Hint they got: {{ hint }}</span>{% endif %}</li>{% endfor %}</ul>
{% else %}<p>No known misconception was seen.</p>{% endfor %}
<p class="quiet">Shares are of those who attempted the question.</p>
</section>

<section aria-labelledby="others">
<h2 id="others">Other failures</h2>
{% if others %}<div class="wide" tabindex="0" role="region" aria-label="Table of other failures"><table>
<caption>Wrong answers that match no known misconception, by kind</caption>
<thead><tr><th scope="col">Question</th><th scope="col">Kind</th><th scope="col" class="n">Submissions</th></tr></thead>
<tbody>{% for item, kinds in others %}{% for kind, count in kinds %}<tr>
<th scope="row">{{ item.question or item.cell }}</th><td>{{ kind }}</td><td class="n">{{ count }}</td></tr>
{% endfor %}{% endfor %}</tbody></table></div>{% else %}<p>None.</p>{% endif %}
</section>

<section aria-labelledby="eyes">
<h2 id="eyes">Submissions that a person should look at</h2>
{% if low_trust %}<p>Low-trust tests, plain asserts that ran beside the student's code:
{% for item in low_trust %}{{ item.cell }} ({{ "%g" % item.points }} points){{ ", " if not loop.last }}{% endfor %}.
A perfect score there proves less than one at a question.</p>{% endif %}
{% for (title, meaning), entries, count in eyes %}
<details{% if count <= 30 %} open{% endif %}><summary><strong>{{ title }}</strong> ({{ count }})</summary>
<p class="quiet">{{ meaning }}</p>
<table><caption>{{ title }}{% if count > entries|length %}: the first {{ entries|length }} of {{ count }}{% endif %}
</caption><thead><tr><th scope="col">Student</th><th scope="col">Reason</th></tr></thead>
<tbody>{% for student, reason in entries %}<tr><th scope="row">{{ student }}</th><td>{{ reason }}</td></tr>
{% endfor %}</tbody></table></details>
{% else %}<p>None.</p>{% endfor %}
</section>

<section aria-labelledby="alike">
<h2 id="alike">Similar solutions</h2>
<p><strong>Similar is not copied: a person must look.</strong> Two people who learned from the same book write alike.
This compares the order of tokens, names and numbers left aside; it knows nothing of who worked with whom.</p>
<p class="quiet">{{ limits }}</p>
{% if groups > alike|length %}<p>Shown are the {{ alike|length }} most alike of {{ groups }} groups.</p>{% endif %}
{% for group, excerpts in alike %}
<details><summary>{{ group.students[:12]|join(", ") }}{% if group.students|length > 12 %} and
{{ group.students|length - 12 }} more{% endif %}: {{ percent(group.share) }} of the fingerprints in common
({{ group.common }}), in {% for cell, share in group.cells %}{{ cell }}{{ ", " if not loop.last }}{% endfor %}</summary>
{% if group.students|length > 2 %}<p>All {{ group.students|length }}: {{ group.students|join(", ") }}.
The most alike two:</p>{% endif %}
{% for cell, share, one, other in excerpts %}<h3>{{ cell }}, {{ percent(share) }}</h3>
<div class="pair"><figure><figcaption>{{ group.pair[0] }}</figcaption><pre><code>{{ one }}</code></pre></figure>
<figure><figcaption>{{ group.pair[1] }}</figcaption><pre><code>{{ other }}</code></pre></figure></div>{% endfor %}
</details>{% else %}<p>None were found.</p>{% endfor %}
</section>

<section aria-labelledby="time">
<h2 id="time">Where the time went</h2>
{% if steps %}<div class="wide" tabindex="0" role="region" aria-label="Table of times"><table>
<caption>Seconds by step, over all submissions</caption>
<thead><tr><th scope="col">Step</th><th scope="col" class="n">Total</th><th scope="col" class="n">Share</th>
<th scope="col" class="n">Median</th><th scope="col" class="n">Longest</th></tr></thead>
<tbody>{% for step, total, share, median, longest in steps %}<tr><th scope="row">{{ step }}</th>
<td class="n">{{ "%.1f" % total }}</td><td class="n">{{ percent(share) }}</td><td class="n">{{ "%.2f" % median }}</td>
<td class="n">{{ "%.2f" % longest }}</td></tr>{% endfor %}</tbody></table></div>
<p>Ran on: {% for device, count in devices %}{{ device }} ({{ count }}){{ ", " if not loop.last }}{% endfor %}.</p>
{% else %}<p>Not recorded.</p>{% endif %}
</section>
</main>
</body>
</html>
"""
_ENVIRONMENT = Environment(autoescape=True, finalize=visible, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.globals["percent"] = percent
_PAGE = _ENVIRONMENT.from_string(_TEMPLATE)
