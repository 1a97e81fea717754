"""Make the café orders: what a guest says, and the one-line ticket that the kitchen wants.

    python data/cafe_orders/make.py            # writes train.jsonl, test.jsonl, keep.jsonl and SHA256SUMS

Every sentence frame below was written by hand. A frame has holes: {items}, and where it needs them {name} and
{table}; the place (eat here, take away, a table) is said by the frame itself, in its own words. Test orders use
frames, names and combinations of items that no training order uses; single items are shared, because the lesson
is to learn a notation, not a menu. The same seed always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

SEED = 13
SIZES = {"train": 320, "test": 80}
MOST_ALIKE = 0.50  # no two orders may share more than this fraction of their word triples (Jaccard)

# ticket name: (how one is said, how several are said)
MENU = {
    "latte": ("latte", "lattes"),
    "oat latte": ("oat latte", "oat lattes"),
    "soy latte": ("latte with soy milk", "lattes with soy milk"),
    "iced latte": ("iced latte", "iced lattes"),
    "flat white": ("flat white", "flat whites"),
    "oat flat white": ("flat white with oat milk", "flat whites with oat milk"),
    "cappuccino": ("cappuccino", "cappuccinos"),
    "decaf cappuccino": ("decaf cappuccino", "decaf cappuccinos"),
    "espresso": ("espresso", "espressos"),
    "double espresso": ("double espresso", "double espressos"),
    "black coffee": ("black coffee", "black coffees"),
    "large mocha": ("large mocha", "large mochas"),
    "hot chocolate": ("hot chocolate", "hot chocolates"),
    "green tea": ("green tea", "green teas"),
    "mint tea": ("pot of mint tea", "pots of mint tea"),
    "black tea": ("cup of black tea", "cups of black tea"),
    "lemonade": ("lemonade", "lemonades"),
    "apple juice": ("glass of apple juice", "glasses of apple juice"),
    "orange juice": ("orange juice", "orange juices"),
    "ginger beer": ("bottle of ginger beer", "bottles of ginger beer"),
    "cinnamon bun": ("cinnamon bun", "cinnamon buns"),
    "croissant": ("croissant", "croissants"),
    "almond croissant": ("almond croissant", "almond croissants"),
    "blueberry muffin": ("blueberry muffin", "blueberry muffins"),
    "cheese toastie": ("cheese toastie", "cheese toasties"),
    "bagel": ("bagel", "bagels"),
    "cheese scone": ("cheese scone", "cheese scones"),
    "brownie": ("brownie", "brownies"),
    "carrot cake": ("slice of carrot cake", "slices of carrot cake"),
    "banana bread": ("piece of banana bread", "pieces of banana bread"),
    "lemon tart": ("lemon tart", "lemon tarts"),
    "egg sandwich": ("egg sandwich", "egg sandwiches"),
    "tomato soup": ("bowl of tomato soup", "bowls of tomato soup"),
    "fruit salad": ("fruit salad", "fruit salads"),
    "ham roll": ("ham roll", "ham rolls"),
    "oat cookie": ("oat cookie", "oat cookies"),
}

NAMES = {
    "train": (
        "Mira Tom Aisha Lukas Chen Olga Pedro Nina Samir Grace Hugo Yuki Ivan Leila Oscar Priya Ben Clara Diego Emma "
        "Farid Greta Hana Jonas Kofi Lucy Marco Nadia Paul Rosa Simon Tara Victor Wendy Zoe Adam Bella Carlos Dina Erik"
    ).split(),
    "test": "Anna Kenji Maria Felix Amara Daniel Sofia Peter Layla George Ruth Mateo Alice Omar Julia Henry".split(),
}

# (place on the ticket, frame). GO = take away, HERE = eat in, T = the table in the sentence.
FRAMES = {
    "train": [
        ("GO", "Could I get {items} for {name}, to go?"),
        ("GO", "{items} to take away, please. The name is {name}."),
        ("GO", "Hi, I'm {name}. I'd like {items}, all to go."),
        ("GO", "Can you pack up {items}? It's for {name}, who is waiting outside."),
        ("GO", "We are in a hurry, so {items} to go please!"),
        ("GO", "Takeaway order under {name}: {items}."),
        ("GO", "I'll have {items}. I'm taking it with me. Oh, and I'm {name}."),
        ("GO", "{name} asked me to pick up {items}."),
        ("GO", "Just {items} in a bag, thanks."),
        ("GO", "My train leaves in five minutes. {items} to go, quickly!"),
        ("GO", "Put {items} in a box for {name}, please, I will carry it home."),
        ("GO", "Hello! This is {name} calling. I will come by and collect {items}."),
        ("GO", "May I have {items} to go? No name needed."),
        ("GO", "Wrap up {items} for the road, would you? {name} is the name."),
        ("GO", "One takeaway for {name}. That's {items}."),
        ("GO", "I want {items}, and please make it a takeaway."),
        ("GO", "It's a to-go order: {items}. Call out {name} when it is ready."),
        ("GO", "For the office I need {items}. Write {name} on the bag."),
        ("GO", "{items}, please, in paper cups and bags. We won't stay."),
        ("GO", "Please prepare {items}; {name} will fetch the lot at noon."),
        ("GO", "I ordered online as {name}, {items}, to be picked up."),
        ("GO", "Do you do takeaway? Great, then {items} for {name}."),
        ("HERE", "I'd love {items}, and I'll have it here. I'm {name}."),
        ("HERE", "{items} for {name}, please. We are staying."),
        ("HERE", "Good morning! {items} to have in, thank you."),
        ("HERE", "Can I have {items}? I will sit down by the window. My name is {name}."),
        ("HERE", "{name} would like {items}, eating in."),
        ("HERE", "Eat in, please: {items}."),
        ("HERE", "It's raining, so I'll stay in and have {items}."),
        ("HERE", "For here, please, {items}. Name's {name}."),
        ("HERE", "Would you bring {items} over to the sofa? It's {name} again."),
        ("HERE", "We'd like {items} and we will eat in. Put it under {name}."),
        ("HERE", "My friend {name} wants {items}, for here."),
        ("HERE", "I think I'll go for {items}. For here, on a tray."),
        ("HERE", "{name} here! The usual, that means {items}, and I'm sitting inside."),
        ("HERE", "Let me have {items} on a real plate, I'm staying. {name} is my name."),
        ("HERE", "Not a takeaway today. {items} for {name}, please."),
        ("HERE", "A seat by the fire and {items}, that would make me happy."),
        ("HERE", "Hey, it's {name}. {items} in a proper cup and plate, I have time."),
        ("HERE", "So that's {items}, and yes, we are having it in."),
        ("HERE", "Give {name} {items}, she is eating here with me."),
        ("HERE", "My order? {items}. To drink and eat in. {name}, with a smile."),
        ("HERE", "If it isn't too much trouble, {items}. I'm staying in to read."),
        ("T", "Table {table} would like {items}."),
        ("T", "{items} for table {table}, please. The guest is called {name}."),
        ("T", "Could you bring {items} to table {table}?"),
        ("T", "We're sitting at table {table} and would like to order {items}. I'm {name}."),
        ("T", "{name} at table {table} has asked for {items}."),
        ("T", "Order from table {table}: {items}, for {name}."),
        ("T", "Excuse me, table {table} here. We need {items}."),
        ("T", "Send {items} over to {name}, who is at table {table}."),
        ("T", "At table {table} they are still waiting for {items}!"),
        ("T", "I'm {name}, over at table {table}. May I order {items}?"),
        ("T", "Another {items}, please, table {table}."),
        ("T", "Kitchen, please: {items}. It goes to table {table}, to {name}."),
        ("T", "You can bring it to table {table}. {items}, and {name} is paying."),
        ("T", "{items} would be lovely. Our table is number {table}. Thanks, {name}."),
        ("T", "Table {table}, {name}. They chose {items}."),
        ("T", "The family at table {table} wants {items}."),
        ("T", "Hungry people at table {table}! {items}, as fast as you can."),
        ("T", "Please add {items} to the bill of {name} at table {table}."),
        ("T", "When you have a moment, {items}. Table {table}. Thank you, {name}."),
        ("T", "{name} moved to table {table} and now wants {items}."),
        ("T", "Right, table {table} it is: {items}."),
    ],
    "test": [
        ("GO", "I need {items} to go, and the cup should say {name}."),
        ("GO", "Hi there, can I take away {items}? {name}, by the way."),
        ("GO", "{name} is outside in the car and wants {items} to go."),
        ("GO", "Sorry, we can't stay. {items} in a bag, please."),
        ("GO", "A takeaway, please! {items}, and put {name} on it."),
        ("GO", "Would it be possible to have {items} packed for {name}? I'm walking to the park."),
        ("GO", "Do I pay now? {items}, to go."),
        ("HERE", "{items}, thanks. I'm {name} and I'll be eating in."),
        ("HERE", "I'm staying for a while, so {items} for here."),
        ("HERE", "Please get {name} {items}. We found a seat inside."),
        ("HERE", "What a day! I want to sit down with {items}. They call me {name}."),
        ("HERE", "To have in: {items}. It's for {name}."),
        ("HERE", "Mmm, {items}, please. I will have everything here."),
        ("T", "Hello, this is table {table}. Can we get {items}?"),
        ("T", "{items}. Bring it to {name} at table {table}, please."),
        ("T", "My name is {name}, my table is {table}, and I'd like {items}."),
        ("T", "New order, table {table}: {items}."),
        ("T", "{name} just sat down at table {table}. Make it {items}."),
        ("T", "Can table {table} have {items} when you are ready? I'm {name}."),
        ("T", "Someone at table {table} ordered {items} a while ago."),
    ],
}

# Short questions from everyday knowledge, to see what training on tickets does to everything else.
KEEP = [
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Egypt?", "Cairo"),
    ("Which planet do we live on?", "Earth"),
    ("Which planet is the largest in our solar system?", "Jupiter"),
    ("What gas do plants take in from the air?", "carbon dioxide"),
    ("What is the chemical formula of water?", "H2O"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo"),
    ("On which continent is Kenya?", "Africa"),
    ("On which continent is Brazil?", "South America"),
    ("Which ocean lies between Europe and America?", "Atlantic"),
    ("What language do people speak in Portugal?", "Portuguese"),
    ("Which organ pumps blood through the body?", "heart"),
    ("What do bees make?", "honey"),
    ("What is the opposite of hot?", "cold"),
    ("Which month comes after March?", "April"),
]

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}


def say_count(count: int, one: str, several: str, rng: random.Random) -> str:
    """Say how many, the way people do: a latte, one latte, 2 lattes, a couple of lattes."""
    if count == 1:
        article = "an" if one[0] in "aeiou" else "a"
        return f"{rng.choice([article, article, 'one', '1'])} {one}"
    words = [NUMBERS[count], NUMBERS[count], str(count)]
    if count == 2:
        words.append("a couple of")
    return f"{rng.choice(words)} {several}"


def say_items(items: list[tuple[int, str]], rng: random.Random) -> str:
    """Say the list of items: with commas, with "and", with "plus" …"""
    said = [say_count(count, *MENU[item], rng) for count, item in items]
    if len(said) == 1:
        return said[0]
    last = rng.choice([" and ", " and ", ", and also ", " plus ", " as well as "])
    return ", ".join(said[:-1]) + last + said[-1]


def draw_items(split: str, rng: random.Random) -> list[tuple[int, str]]:
    """Draw one to three items. Which combinations of two or more belong to the test split is decided by a hash."""
    while True:
        how_many = rng.choices([1, 2, 3], weights=[3, 5, 2])[0]
        names = rng.sample(list(MENU), how_many)
        counts = [rng.choices([1, 2, 3, 4, 5], weights=[6, 4, 2, 1, 1])[0] for _ in names]
        key = combination(list(zip(counts, names, strict=True)))
        held_out = hashlib.sha256(key.encode()).digest()[0] < 64  # a quarter of all combinations
        if held_out == (split == "test"):
            return list(zip(counts, names, strict=True))


def combination(items: list[tuple[int, str]]) -> str:
    """What is ordered, without the order in which it is said. One item alone counts with its number."""
    if len(items) == 1:
        return f"{items[0][0]} {items[0][1]}"
    return " + ".join(sorted(name for _, name in items))


def triples(text: str) -> set[tuple[str, ...]]:
    """All runs of three words of a text, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def alike(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """Jaccard similarity of two sets of word triples, from 0 (nothing shared) to 1 (the same)."""
    return len(one & other) / max(1, len(one | other))


def make_order(split: str, number: int, rng: random.Random) -> dict[str, str]:
    """One order with its ticket. The frames are walked in turn, so each is used about equally often."""
    frames = FRAMES[split]
    place, frame = frames[number % len(frames)]
    items = draw_items(split, rng)
    name = rng.choice(NAMES[split]) if "{name}" in frame else "-"
    table = rng.randint(1, 20)
    said = say_items(items, rng)
    order = frame.format(items=said, name=name, table=table)
    order = re.sub(r"(^|[.!?]\s+)([a-z])", lambda found: found[1] + found[2].upper(), order)
    written = " + ".join(f"{count} {item}" for count, item in items)
    where = f"T{table}" if place == "T" else place
    return {
        "id": f"{split}-{number:03d}",
        "order": order,
        "ticket": f"{name} | {written} | {where}",
        "name": name,
        "items": written,
        "place": where,
        "combination": combination(items),
        "phrasing": f"{split}-{number % len(frames):02d}",
    }


def make(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """All splits. An order too much like one already made is drawn again."""
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, str]]] = {}
    seen: list[set[tuple[str, ...]]] = []
    for split, size in SIZES.items():
        rows: list[dict[str, str]] = []
        while len(rows) < size:
            row = make_order(split, len(rows), rng)
            words = triples(row["order"])
            if all(alike(words, other) <= MOST_ALIKE for other in seen):
                rows.append(row)
                seen.append(words)
        splits[split] = rows
    splits["keep"] = [
        {"id": f"keep-{number:03d}", "question": question, "answer": answer}
        for number, (question, answer) in enumerate(KEEP)
    ]
    return splits


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
