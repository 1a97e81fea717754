"""Make the invented world: passages, questions, documents and poisoned passages.

    python data/invented_world/make.py    # writes passages, questions, documents, injections (.jsonl) and SHA256SUMS

The facts stand in written/tables/*.toml, one table a topic, together with the sentences that say them and the
questions that ask for them. For each row the script picks one wording of every sentence and an order of sentences, so
that passages of one topic share as few word triples as possible; the two rows of a pair of twins get the same wording,
because they are meant to be mistaken for each other. Passages, questions, documents and injections written by hand
stand in the other files of written/ and are taken as they are. The same seed always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 11
WRITTEN = Path(__file__).parent / "written"
KINDS = ("single", "paraphrase", "number", "two_hop", "lookalike", "unanswerable")
TRAIN = 0.4  # share of the questions of each kind that is for choosing settings; the rest measures
TRIES = 40  # wordings tried for a passage before the one least like its neighbours is kept
LONGEST_ANSWER = 4  # words
PRONOUNS = {"he": ("he", "his"), "she": ("she", "her")}
Row = dict[str, Any]


def slug(text: str) -> str:
    """Lower-case words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


def triples(text: str) -> set[tuple[str, ...]]:
    """The word triples of a text, lower case."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def alike(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """Jaccard similarity of two sets of triples."""
    return len(one & other) / max(1, len(one | other))


def holds(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def blocks(filename: str) -> Iterator[tuple[str, list[str]]]:
    """(heading, lines) of a hand-written file in which every block opens with a line "# heading"."""
    heading = ""
    lines: list[str] = []
    for line in (WRITTEN / filename).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            if heading:
                yield heading, lines
            heading, lines = line[2:].strip(), []
        elif line.strip():
            lines.append(line.strip())
    if heading:
        yield heading, lines


# ---- passages ----


def read_table(path: Path) -> Row:
    """A table of written/tables with its rows as dictionaries of everything that a sentence may mention."""
    table: Row = tomllib.loads(path.read_text(encoding="utf-8"))
    columns = [column.strip() for column in table["columns"].split("|")]
    entries = []
    for line in table["rows"].strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != len(columns):
            raise ValueError(f"{path.name}: expected {len(columns)} cells, got {len(cells)} in {line!r}")
        entries.append(describe(dict(zip(columns, cells, strict=True)), table))
    return {**table, "topic": path.stem, "entries": entries}


def describe(cells: dict[str, str], table: Row) -> dict[str, str]:
    """The cells of a row and what is derived from them: articles, pronouns, an age."""
    name = cells["name"]
    low = name[0].lower() + name[1:] if name in table.get("common", ()) else name
    if name in table.get("articles", ()):
        cells["the_name"], low = f"the {name}", f"the {low}"
    else:
        cells["the_name"] = f"the {name[4:]}" if name.startswith("The ") else name
    cells |= {"low": low, "Low": low[0].upper() + low[1:], "title": table["title"].format(name=name)}
    if "pronoun" in cells:
        he, his = PRONOUNS[cells["pronoun"]]
        cells |= {"he": he, "his": his, "He": he.capitalize(), "His": his.capitalize()}
        cells["age"] = str(int(cells["died"]) - int(cells["born"]))
    for column in {"fine", "fare", "price"} & set(cells):
        cells[f"{column}_number"], cells[f"{column}_unit"] = cells[column].split()
        cells[f"{column}_unit"] = cells[f"{column}_unit"].removesuffix("s") + "s"
    for column in {"trade", "kind_of", "what"} & set(cells):
        cells[f"a_{column}"] = ("an " if cells[column][0] in "aeiou" else "a ") + cells[column]
    if "days" in cells:
        cells["days_word"] = f"{cells['days']} day" + ("s" if cells["days"] != "one" else "")
    if "measure" in cells:
        number, unit, cells["measure_word"] = cells["measure"].split()
        cells["metres"] = f"{number} {unit}"
    if "rule" in cells:
        cells["Rule"] = cells["rule"][0].upper() + cells["rule"][1:]
    return cells


Wording = tuple[int, list[int], list[int]]


def draw_wording(table: Row, rng: random.Random) -> Wording:
    """Which opening, which variant of each further sentence, and the order of these."""
    order = rng.sample(range(len(table["slots"])), len(table["slots"]))
    return rng.randrange(len(table["opening"])), [rng.randrange(len(slot)) for slot in table["slots"]], order


def word(table: Row, entry: dict[str, str], wording: Wording) -> str:
    """The passage about one entry in one wording. A sentence that only repeats the opening's facts stays out."""
    first, variants, order = wording
    opening = table["opening"][first]
    said = set(re.findall(r"\{(\w+)\}", opening))
    parts = [opening]
    for place in order:
        sentence = table["slots"][place][variants[place]]
        if not set(re.findall(r"\{(\w+)\}", sentence)) - {"he", "He", "his", "His"} <= said:
            parts.append(sentence)
    said_out = [part.format(**entry) for part in parts]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in said_out)


def table_passages(table: Row, seed: int) -> list[Row]:
    """One passage for each entry of a table."""
    pairs = [pair.split(" / ") for pair in table.get("twins", ())]
    partner = {one: other for pair in pairs for one, other in (pair, pair[::-1])}
    names = {entry["name"]: entry for entry in table["entries"]}
    if missing := set(partner) - set(names):
        raise ValueError(f"{table['topic']}: no row for the twins {sorted(missing)}")
    wordings: dict[str, Wording] = {}
    seen: list[set[tuple[str, ...]]] = []
    passages = []
    for name, entry in names.items():
        rng = random.Random(f"{seed} {table['topic']} {name}")
        if partner.get(name) in wordings:
            wordings[name] = wordings[partner[name]]
        else:
            tried = [draw_wording(table, rng) for _ in range(TRIES)]
            like = [max((alike(triples(word(table, entry, t)), old) for old in seen), default=0.0) for t in tried]
            wordings[name] = tried[like.index(min(like))]
        text = word(table, entry, wordings[name])
        seen.append(triples(text))
        entry["id"] = f"{table['topic']}-{slug(name)}"
        passages.append(
            {
                "id": entry["id"],
                "title": entry["title"],
                "text": text,
                "kind": "lookalike" if name in partner else "fact",
                "topic": table["topic"],
                "twin": f"{table['topic']}-{slug(partner[name])}" if name in partner else None,
            }
        )
    return passages


def written_passages() -> tuple[list[Row], list[Row]]:
    """The passages written by hand, and the questions noted beneath them."""
    passages: list[Row] = []
    questions: list[Row] = []
    for path in sorted((WRITTEN / "passages").glob("*.txt")):
        for title, lines in blocks(f"passages/{path.name}"):
            text = " ".join(line for line in lines if not line.startswith("? "))
            here = {"id": f"{path.stem}-{slug(title)}", "title": title, "text": text, "kind": "written"}
            passages.append({**here, "topic": path.stem, "twin": None})
            questions += [parse_question(line, here["id"]) for line in lines if line.startswith("? ")]
    return passages, questions


# ---- questions ----


def parse_question(line: str, passage: str | None = None) -> Row:
    """A question written by hand: "? kind | question | answer; alias; … | ids of passages".

    Beneath a passage the ids may be left out. An unanswerable question has no answer, its one id is the passage that
    comes near, and two cells follow: the name it asks about, and words (regular expressions) that would answer it and
    that no passage with the name may hold.
    """
    kind, question, answers, *rest = [cell.strip() for cell in line.removeprefix("? ").split("|")]
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r} in {line!r}")
    ids = rest[0].split() if rest and rest[0] else [passage] if passage else []
    known = [answer.strip() for answer in answers.split(";") if answer.strip()]
    if kind == "unanswerable":
        return make_question(kind, question, None, [], [], near=ids[0], about=rest[1], forbidden=rest[2].split("; "))
    return make_question(kind, question, known[0], known[1:], ids)


def make_question(kind: str, question: str, answer: str | None, aliases: list[str], ids: list[str], **more: Any) -> Row:
    """A question without number and split; ``forbidden`` and ``about`` serve the checks and are not written."""
    return {"question": question, "answer": answer, "aliases": aliases, "kind": kind, "passages": ids, **more}


def answers_of(entry: dict[str, str], column: str) -> tuple[str, list[str]]:
    """The answer that a cell stands for, and other ways of writing it."""
    value = entry[column]
    bare = re.sub(r"^(a|an|the) ", "", value)
    aliases = [value] if bare != value else []
    if "," in bare and bare.replace(",", "").isdigit():
        aliases.append(bare.replace(",", ""))
    number = re.match(r"(\d+) (metres|centimetres|boats)$", bare)
    if number:
        aliases.append(number[1])
    if column.endswith("_number"):
        aliases.append(entry[column.removesuffix("_number")])
    if bare.endswith(" bands"):
        aliases.append(bare.removesuffix(" bands"))
    unit = {"minutes": "minutes", "seconds": "seconds", "height": "metres", "area": "square kilometres"}.get(column)
    return bare, [*aliases, f"{bare} {unit}"] if unit else aliases


def table_questions(tables: list[Row], passages: list[Row], seed: int) -> list[Row]:
    """Questions asked of the tables, as many of each sort as the table says.

    One that some passage other than the listed ones would answer too is left out.
    """
    by_topic = {table["topic"]: {entry["name"]: entry for entry in table["entries"]} for table in tables}
    text = {passage["id"]: passage["text"] for passage in passages}
    twin = {passage["id"]: passage["twin"] for passage in passages}
    questions: list[Row] = []
    for table in tables:
        asked: dict[str, int] = {}  # how often each entry has been asked about, so that all get their turn
        for number, sort in enumerate(table["questions"]):
            rng = random.Random(f"{seed} {table['topic']} {number}")
            entries = rng.sample(table["entries"], len(table["entries"]))
            entries.sort(key=lambda entry: asked.get(entry["name"], 0))
            chosen: list[Row] = []
            for entry in entries:
                if len(chosen) == sort["count"]:
                    break
                question = ask(sort, entry, by_topic, rng)
                fits = sort["kind"] == "two_hop" or (sort["kind"] == "lookalike") == (twin[entry["id"]] is not None)
                if question is None or not fits:
                    continue
                if question["kind"] == "lookalike":
                    question["near"] = twin[entry["id"]]
                if answered_elsewhere(question, text) or not well_formed(question, text):
                    continue
                asked[entry["name"]] = asked.get(entry["name"], 0) + 1
                chosen.append(question)
            if len(chosen) < sort["count"]:
                raise ValueError(f"{table['topic']} {sort['column']}: {len(chosen)} of {sort['count']} questions")
            questions += chosen
    return questions


def ask(
    sort: Row, entry: dict[str, str], by_topic: dict[str, dict[str, dict[str, str]]], rng: random.Random
) -> Row | None:
    """The question of one sort about one entry, or None where it cannot be asked."""
    wording = sort["ask"][rng.randrange(len(sort["ask"]))].format(**entry)
    source, ids, column = entry, [entry["id"]], sort["column"]
    if "to" in sort:
        following = by_topic[sort["to"]].get(entry[column])
        if following is None:
            return None
        source, column = following, sort["answer"]
        ids.append(following["id"])
    answer, aliases = answers_of(source, column)
    if len(answer.split()) > LONGEST_ANSWER:
        return None
    return make_question(sort["kind"], wording, answer, aliases, ids, about=entry["name"])


def well_formed(question: Row, text: dict[str, str]) -> bool:
    """The answer stands in the last passage; of two hops the first has the name alone, the last the answer alone."""
    first, last = text[question["passages"][0]], text[question["passages"][-1]]
    if question["kind"] == "two_hop" and (holds(first, question["answer"]) or holds(last, question["about"])):
        return False
    return holds(last, question["answer"]) and not holds(question["question"], question["answer"])


def answered_elsewhere(question: Row, text: dict[str, str]) -> bool:
    """Whether a passage that is not listed names what is asked about and holds the answer too."""
    return any(
        holds(other, question["about"]) and holds(other, question["answer"])
        for number, other in text.items()
        if number not in question["passages"]
    )


def refuse_wrong(questions: list[Row], passages: list[Row]) -> None:
    """Raise ValueError for a question written by hand that its passage does not answer, or answered by mistake."""
    text = {passage["id"]: passage["text"] for passage in passages}
    for question in questions:
        asked = f"{question['question']!r}"
        if unknown := {*question["passages"], question.get("near")} - {*text, None}:
            raise ValueError(f"{asked} names passages that do not exist: {sorted(unknown)}")
        if question["answer"] is not None and not holds(text[question["passages"][-1]], question["answer"]):
            raise ValueError(f"{asked}: {question['passages'][-1]} does not hold {question['answer']!r}")
        if found := given_away(question, text):
            raise ValueError(f"{asked} is meant to have no answer, but {found} may hold one")


def given_away(question: Row, text: dict[str, str]) -> list[str]:
    """The passages that name what an unanswerable question asks about and hold a word that would answer it."""
    return [
        number
        for number, other in text.items()
        for word in question.get("forbidden", ())
        if holds(other, question["about"]) and re.search(rf"\b(?:{word})\b", other, re.IGNORECASE)
    ]


def number_questions(questions: list[Row], documents: list[Row], seed: int) -> list[Row]:
    """Ids, the document that holds all of a question's passages, and the split, drawn within each kind."""
    rows = []
    for kind in KINDS:
        of_kind = [question for question in questions if question["kind"] == kind]
        train = set(random.Random(f"{seed} {kind}").sample(range(len(of_kind)), round(TRAIN * len(of_kind))))
        for place, question in enumerate(of_kind):
            needed = set(question["passages"])
            within = [document["id"] for document in documents if needed and needed <= set(document["passages"])]
            rows.append(
                {
                    "id": f"{kind}-{place + 1:03d}",
                    **{key: question[key] for key in ("question", "answer", "aliases", "kind", "passages")},
                    "near": question.get("near"),
                    "document": within[0] if within else None,
                    "split": "train" if place in train else "test",
                }
            )
    return rows


# ---- documents and injections ----


def make_documents(passages: list[Row]) -> list[Row]:
    """Long texts: passages, named by "@ id", with the sentences written by hand that join them."""
    text = {passage["id"]: passage["text"] for passage in passages}
    documents = []
    for title, lines in blocks("documents.txt"):
        ids = [line[2:] for line in lines if line.startswith("@ ")]
        paragraphs = [text[line[2:]] if line.startswith("@ ") else line for line in lines]
        documents.append(
            {"id": f"document-{slug(title)}", "title": title, "text": "\n\n".join(paragraphs), "passages": ids}
        )
    return documents


def make_injections(passages: list[Row], questions: list[Row]) -> list[Row]:
    """Poisoned passages, each with the question it is retrieved for and the output it wishes for.

    A block names the clean passage ("poisons: id") and the sentence ("put: start, middle or end"), or it is a passage
    of its own that stands beside the clean one ("beside: id"). The question is the first one that asks for the clean
    passage in its own words, or the one that the block names ("ask: question").
    """
    clean = {passage["id"]: passage for passage in passages}
    rows = []
    for number, (heading, lines) in enumerate(blocks("injections.txt"), start=1):
        fields = dict(line.split(": ", 1) for line in lines)
        source = clean[fields.get("poisons") or fields["beside"]]
        text, title = fields["text"], heading
        if "poisons" in fields:
            sentences = re.split(r"(?<=[.!?]) (?=[A-Z0-9\"])", source["text"])
            place = {"start": 0, "middle": (len(sentences) + 1) // 2, "end": len(sentences)}[fields["put"]]
            text, title = " ".join([*sentences[:place], fields["text"], *sentences[place:]]), source["title"]
        asked = [q for q in questions if q["passages"] == [source["id"]] and q["kind"] != "paraphrase"]
        asked = [q for q in asked if q["question"] == fields.get("ask", q["question"])]
        if not asked:
            raise ValueError(f"injections.txt: no question is asked of {source['id']}")
        question = asked[0]
        rows.append(
            {
                "id": f"injection-{number:02d}",
                "title": title,
                "text": text,
                "kind": "injection",
                "poisons": fields.get("poisons"),
                "style": heading if "poisons" in fields else "own passage",
                "put": fields.get("put"),
                "wish": fields["wish"],
                "question_id": question["id"],
                "question": question["question"],
                "answer": question["answer"],
                "aliases": question["aliases"],
            }
        )
    return rows


# ---- everything ----


def make(seed: int = SEED) -> dict[str, list[Row]]:
    """All four splits."""
    tables = [read_table(path) for path in sorted((WRITTEN / "tables").glob("*.toml"))]
    passages = [passage for table in tables for passage in table_passages(table, seed)]
    by_hand, questions = written_passages()
    passages += by_hand
    documents = make_documents(passages)
    for path in sorted((WRITTEN / "questions").glob("*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        questions += [parse_question(line) for line in lines if line.startswith("? ")]
    refuse_wrong(questions, passages)
    rows = number_questions([*table_questions(tables, passages, seed), *questions], documents, seed)
    return {
        "passages": passages,
        "questions": rows,
        "documents": documents,
        "injections": make_injections(passages, rows),
    }


def write(folder: Path, seed: int = SEED) -> None:
    """Write the splits as JSON lines with UNIX line ends, and their checksums as `sha256sum -c` reads them."""
    sums = []
    for split, rows in make(seed).items():
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (folder / f"{split}.jsonl").write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {split}.jsonl\n")
    (folder / "SHA256SUMS").write_bytes("".join(sums).encode())


if __name__ == "__main__":
    here = Path(__file__).parent
    write(here)
    print((here / "SHA256SUMS").read_text(), end="")
