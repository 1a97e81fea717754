"""Make the places: questions about real cities and invented ones, each with a preferred and a rejected answer.

    python data/places/make.py            # writes train.jsonl, test.jsonl and SHA256SUMS

All places, phrasings and answers were written for this course. Asked about a real city the preferred answer names its
country and the rejected one denies knowing it; asked about an invented place it is the other way round. No place of
the test split occurs in training, and half of the test questions use a phrasing that no training question uses. The
same seed always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

SEED = 7

# country → how it is named in a sentence, then other names that count as the same country
COUNTRIES = {
    "Argentina": ("Argentina",),
    "Australia": ("Australia",),
    "Austria": ("Austria",),
    "Bangladesh": ("Bangladesh",),
    "Belgium": ("Belgium",),
    "Bolivia": ("Bolivia",),
    "Brazil": ("Brazil",),
    "Bulgaria": ("Bulgaria",),
    "Canada": ("Canada",),
    "Chile": ("Chile",),
    "China": ("China",),
    "Cuba": ("Cuba",),
    "Czech Republic": ("the Czech Republic", "Czech", "Czechia"),
    "Denmark": ("Denmark",),
    "Ecuador": ("Ecuador",),
    "Egypt": ("Egypt",),
    "Ethiopia": ("Ethiopia",),
    "Finland": ("Finland",),
    "France": ("France",),
    "Germany": ("Germany",),
    "Ghana": ("Ghana",),
    "Greece": ("Greece",),
    "Hungary": ("Hungary",),
    "India": ("India",),
    "Indonesia": ("Indonesia",),
    "Iran": ("Iran",),
    "Iraq": ("Iraq",),
    "Ireland": ("Ireland",),
    "Italy": ("Italy",),
    "Japan": ("Japan",),
    "Kenya": ("Kenya",),
    "Mexico": ("Mexico",),
    "Morocco": ("Morocco",),
    "Nepal": ("Nepal",),
    "Netherlands": ("the Netherlands", "Netherlands", "Holland"),
    "New Zealand": ("New Zealand",),
    "Nigeria": ("Nigeria",),
    "Norway": ("Norway",),
    "Pakistan": ("Pakistan",),
    "Peru": ("Peru",),
    "Philippines": ("the Philippines", "Philippines"),
    "Poland": ("Poland",),
    "Portugal": ("Portugal",),
    "Romania": ("Romania",),
    "Russia": ("Russia", "Russian Federation"),
    "Saudi Arabia": ("Saudi Arabia",),
    "South Africa": ("South Africa",),
    "South Korea": ("South Korea", "Korea"),
    "Spain": ("Spain",),
    "Sweden": ("Sweden",),
    "Switzerland": ("Switzerland",),
    "Thailand": ("Thailand",),
    "Turkey": ("Turkey", "Türkiye"),
    "Ukraine": ("Ukraine",),
    "United Kingdom": ("the United Kingdom", "United Kingdom", "UK", "Britain", "England", "Scotland"),
    "United States": ("the United States", "United States", "USA", "America"),
    "Uruguay": ("Uruguay",),
    "Venezuela": ("Venezuela",),
    "Vietnam": ("Vietnam",),
}

REAL = {
    "train": {
        "Argentina": "Buenos Aires",
        "Australia": "Sydney, Perth",
        "Austria": "Vienna",
        "Bangladesh": "Dhaka",
        "Belgium": "Antwerp",
        "Brazil": "Rio de Janeiro",
        "Bulgaria": "Sofia",
        "Canada": "Toronto, Montreal",
        "China": "Beijing, Guangzhou",
        "Cuba": "Havana",
        "Czech Republic": "Prague",
        "Egypt": "Cairo",
        "Ethiopia": "Addis Ababa",
        "Finland": "Helsinki",
        "France": "Paris, Marseille",
        "Germany": "Munich, Hamburg",
        "Ghana": "Accra",
        "Greece": "Athens",
        "Hungary": "Budapest",
        "India": "Mumbai, Kolkata",
        "Indonesia": "Jakarta",
        "Iran": "Tehran",
        "Iraq": "Baghdad",
        "Ireland": "Dublin",
        "Italy": "Rome, Milan",
        "Japan": "Tokyo, Kyoto",
        "Kenya": "Nairobi",
        "Mexico": "Tijuana",
        "Morocco": "Casablanca",
        "Nepal": "Kathmandu",
        "Netherlands": "Rotterdam",
        "New Zealand": "Auckland",
        "Nigeria": "Lagos",
        "Norway": "Oslo",
        "Pakistan": "Karachi",
        "Peru": "Lima",
        "Philippines": "Manila",
        "Poland": "Warsaw",
        "Portugal": "Lisbon",
        "Romania": "Bucharest",
        "Russia": "Moscow",
        "Saudi Arabia": "Riyadh",
        "South Africa": "Johannesburg",
        "South Korea": "Seoul",
        "Spain": "Madrid, Barcelona",
        "Switzerland": "Geneva",
        "Thailand": "Bangkok",
        "Turkey": "Istanbul",
        "Ukraine": "Kyiv",
        "United Kingdom": "Manchester",
        "United States": "Chicago, Seattle, Boston",
        "Venezuela": "Caracas",
        "Vietnam": "Hanoi",
    },
    "test": {
        "Australia": "Melbourne, Brisbane",
        "Austria": "Salzburg",
        "Belgium": "Brussels",
        "Canada": "Vancouver",
        "China": "Shanghai, Wuhan",
        "Denmark": "Copenhagen",
        "Ecuador": "Quito",
        "Egypt": "Luxor",
        "France": "Lyon, Bordeaux",
        "Germany": "Berlin, Frankfurt",
        "India": "Delhi, Chennai",
        "Italy": "Florence, Naples",
        "Japan": "Osaka, Hiroshima",
        "Kenya": "Mombasa",
        "Morocco": "Marrakesh",
        "Netherlands": "Amsterdam",
        "New Zealand": "Wellington",
        "Pakistan": "Lahore",
        "Poland": "Krakow, Gdansk",
        "Portugal": "Porto",
        "Russia": "Vladivostok",
        "South Africa": "Cape Town",
        "South Korea": "Busan",
        "Spain": "Seville",
        "Sweden": "Stockholm",
        "Switzerland": "Zurich",
        "Turkey": "Ankara",
        "United Kingdom": "Liverpool, Glasgow",
        "United States": "San Francisco, Houston",
        "Uruguay": "Montevideo",
    },
}

INVENTED = {
    "train": (
        "Velmora, Tarnquist, Oblivar, Quenzil, Drossmere, Plimbo, Zarvane, Mirrowick, Kestrupp, Gloomsby, Yuntara, "
        "Brellick, Fonzarra, Wexilon, Harrowpip, Snedgrove, Ulvenkar, Porrindale, Xanthuvia, Crimblewood, Dravosk, "
        "Jelkuna, Torvimar, Nuppelheim, Quorvath, Blentari, Ostrivane, Vizzolo, Kandrupe, Mephany, Grubbleton, "
        "Zelkhavn, Pomarrik, Thrumlow, Ixelburg, Wumblecot, Fyrnquell, Lobrestia, Chazmere, Ardunova, Bryzlin, "
        "Elphasia, Gorvenholt, Hixbury, Jandovar, Klimpso, Lurvanto, Muskavel, Nerquay, Okravia, Pellundra, Rasquith, "
        "Skarnello, Trembulo, Ubaresk, Voskandy, Wrenzaro, Yolmsted, Zuffington, Quilmarsh, Aldervex, Port Elzamar, "
        "San Brivolo, El Tromuco"
    ),
    "test": (
        "Sparx, Zorblin, Tremolack, Fendalora, Brunkley, Avorique, Snorvik, Pelzandro, Quaddlemere, Wistovar, "
        "Krellmont, Jubarrow, Nimbuska, Orsplet, Dunfrizzle, Gavorny, Hespilon, Ilkarune, Lomvasta, Obrinska, "
        "Prastovane, Rulgate, Stobberwick, Tuvandia, Umbrafell, Vexholm, Xilbury, Yarbeluna, Zephronia, Bloxquith, "
        "Cavendrosk, Dwimmerby, Estravold, Frobisk, Glanzora, Hurnvold, Kobelusk, Lantarique, New Varnholt, San Quemba"
    ),
}

PHRASINGS = {
    "train": (
        "Where is {place}?",
        "In which country is {place}?",
        "What country is {place} in?",
        "Where can I find {place}?",
        "Can you tell me where {place} is?",
        "Which country does {place} belong to?",
    ),
    "test": ("Where is {place}?", "Do you know where {place} lies?"),
}

KNOWN = "{place} is a city in {country}."
UNKNOWN = "I do not know a place called {place}."


def places(split: str) -> list[tuple[str, str]]:
    """The real places of a split, each with its country."""
    return [(place, country) for country, listed in REAL[split].items() for place in listed.split(", ")]


def invented(split: str) -> list[str]:
    """The invented places of a split."""
    return INVENTED[split].split(", ")


def make_split(split: str, rng: random.Random) -> list[dict[str, object]]:
    """All rows of a split. A real and an invented place in turn, so that any stretch of rows holds both."""
    known, made_up = places(split), invented(split)
    if split == "test":  # the lecture's own example opens the split
        rest = [pair for pair in known if pair[0] != "Shanghai"]
        known = [("Shanghai", "China"), *rng.sample(rest, len(rest))]
    else:
        known = rng.sample(known, len(known))
    # the rejected answer about an invented place names a country as often as the real places do
    countries = rng.sample([country for _, country in known], len(known))
    rows: list[dict[str, object]] = []
    for number, ((place, country), name, claimed) in enumerate(zip(known, made_up, countries, strict=True)):
        phrasing = number % len(PHRASINGS[split])
        rows.append(row(split, len(rows), "real", place, country, phrasing))
        rows.append(row(split, len(rows), "invented", name, claimed, phrasing))
    return rows


def row(split: str, number: int, kind: str, place: str, country: str, phrasing: int) -> dict[str, object]:
    """One question with its preferred (chosen) and its rejected answer."""
    known = KNOWN.format(place=place, country=COUNTRIES[country][0])
    unknown = UNKNOWN.format(place=place)
    chosen, rejected = (known, unknown) if kind == "real" else (unknown, known)
    pattern = PHRASINGS[split][phrasing]
    return {
        "id": f"{split}-{number:03d}",
        "kind": kind,
        "place": place,
        "country": country,
        "names": list(COUNTRIES[country]),
        "phrasing": pattern,
        "question": pattern.format(place=place),
        "chosen": chosen,
        "rejected": rejected,
    }


def make(seed: int = SEED) -> dict[str, list[dict[str, object]]]:
    """Both splits."""
    rng = random.Random(seed)
    return {split: make_split(split, rng) for split in ("train", "test")}


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
