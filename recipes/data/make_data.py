"""Write the small English data sets that the recipes, the tests and the demo train on.

    python recipes/data/make_data.py            rewrites the files beside this script, byte for byte the same
    python recipes/data/make_data.py --out DIR  writes them below DIR instead

Everyday questions, each asked in a few wordings. A good answer is short, friendly and right; a bad one evades, rambles,
is rude or is wrong. `preferences/` pairs a good (chosen) with a bad (rejected) answer to the same prompt. `sft/` holds
one answer a prompt, good or bad, so that a model trained on it knows both manners and DPO has a choice to make.
Test prompts are wordings that no training file contains.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

SEED = 20
SPLITS = ("train", "test")
TEST_ROWS = 60
WORDINGS = 6  # prompts a topic
GOOD_WORDINGS = (2, 3)  # of them, by turns, have a good answer in the SFT data


class Topic(NamedTuple):
    about: str  # fits behind "a question about ..."
    prompts: tuple[str, ...]  # the direct wording first
    good: str
    wrong: str
    request: bool = False  # asks for a text, not for information


# ---- what is asked ---------------------------------------------------------------------------------------------------

CAPITALS = """
France Paris Lyon; Italy Rome Milan; Spain Madrid Barcelona; Japan Tokyo Osaka; Egypt Cairo Alexandria;
Kenya Nairobi Mombasa; Canada Ottawa Toronto; Norway Oslo Bergen; Greece Athens Patras; Peru Lima Cusco;
Austria Vienna Salzburg; Australia Canberra Sydney
"""

SUMS = """
3 + 4 = 7 8; 5 + 8 = 13 14; 20 + 15 = 35 30; 10 - 2 = 8 6; 50 - 9 = 41 39; 6 x 7 = 42 48; 9 x 9 = 81 90;
11 x 2 = 22 24
"""

OPPOSITES = """
hot cold warm; tall short big; early late soon; heavy light large; noisy quiet loud; empty full hollow; young old new;
wet dry damp
"""

YOUNG_ANIMALS = """
cat kitten puppy; dog puppy kitten; cow calf lamb; horse foal cub; duck duckling gosling; bear cub calf
"""

COUNTS = """
a week/days/seven/nine; a year/months/twelve/ten; an hour/minutes/sixty/fifty; a spider/legs/eight/six;
a violin/strings/four/seven; a hexagon/sides/six/five; a rainbow/colours/seven/four; a tricycle/wheels/three/two
"""

# About, question, the same question inside another sentence, good answer, wrong answer.
FACTS = [
    (
        "the colour of the sky",
        "Why is the sky blue?",
        "why the sky is blue",
        "Air scatters blue light more than red light, so blue reaches us from every side.",
        "The sky is blue because it mirrors the sea.",
    ),
    (
        "boiling water",
        "At what temperature does water boil?",
        "at what temperature water boils",
        "At sea level, water boils at 100 degrees Celsius.",
        "Water boils at 50 degrees Celsius.",
    ),
    (
        "the nearest star",
        "Which star is closest to us?",
        "which star is closest to us",
        "The Sun is our closest star.",
        "The North Star is our closest star.",
    ),
    (
        "oceans",
        "Which ocean is the largest?",
        "which ocean is the largest",
        "The Pacific is the largest ocean.",
        "The Arctic is the largest ocean.",
    ),
    (
        "planets",
        "Which planet is the largest?",
        "which planet is the largest",
        "Jupiter is the largest planet around our Sun.",
        "Mercury is the largest planet.",
    ),
    (
        "bees",
        "What do bees make?",
        "what bees make",
        "Bees make honey and wax.",
        "Bees make silk.",
    ),
    (
        "Romeo and Juliet",
        "Who wrote Romeo and Juliet?",
        "who wrote Romeo and Juliet",
        "William Shakespeare wrote it, around 1595.",
        "Charles Dickens wrote it.",
    ),
    (
        "the Mona Lisa",
        "Who painted the Mona Lisa?",
        "who painted the Mona Lisa",
        "Leonardo da Vinci painted it.",
        "Vincent van Gogh painted it.",
    ),
    (
        "Brazil",
        "Which language do people speak in Brazil?",
        "which language people speak in Brazil",
        "Most people in Brazil speak Portuguese.",
        "Everyone in Brazil speaks Italian.",
    ),
    (
        "caterpillars",
        "What does a caterpillar turn into?",
        "what a caterpillar turns into",
        "A caterpillar turns into a butterfly or a moth.",
        "A caterpillar turns into a snail.",
    ),
    (
        "the seasons",
        "Which season comes after summer?",
        "which season comes after summer",
        "Autumn comes after summer.",
        "Spring comes after summer.",
    ),
    (
        "breathing",
        "Which gas do we need to breathe?",
        "which gas we need to breathe",
        "We need oxygen, which is about a fifth of the air.",
        "We need helium.",
    ),
    (
        "diamonds",
        "What are diamonds made of?",
        "what diamonds are made of",
        "Diamonds are made of carbon.",
        "Diamonds are made of glass.",
    ),
    (
        "the Moon",
        "Why does the Moon shine?",
        "why the Moon shines",
        "The Moon reflects the light of the Sun.",
        "The Moon shines because it is on fire.",
    ),
]

# How to ..., about, good answer, wrong answer.
HOW_TO = [
    (
        "boil an egg",
        "eggs",
        "Lower the egg into boiling water, wait eight minutes, then cool it under the tap.",
        "Put the egg in cold milk for an hour.",
    ),
    (
        "make a cup of tea",
        "tea",
        "Pour boiling water over a tea bag, wait three minutes and take the bag out.",
        "Stir dry tea leaves into a glass of lemonade.",
    ),
    (
        "cook rice",
        "rice",
        "Use two cups of water for one cup of rice. Simmer it with the lid on for fifteen minutes, then let it rest.",
        "Fry the rice in its bag until it pops.",
    ),
    (
        "get a coffee stain out of a shirt",
        "coffee stains",
        "Rinse it with cold water soon, rub in a little dish soap and wash as usual.",
        "Pour more coffee over it so that the colour is even.",
    ),
    (
        "fall asleep faster",
        "sleep",
        "Keep the room cool and dark, put the phone away an hour earlier and breathe slowly.",
        "Drink three coffees and watch a loud film.",
    ),
    (
        "fix a squeaky door",
        "doors",
        "Put a drop of oil on each hinge and swing the door a few times.",
        "Paint the door green.",
    ),
    (
        "peel garlic quickly",
        "garlic",
        "Press the clove with the flat of a knife. The skin then slips off.",
        "Shave it with a razor.",
    ),
    (
        "cool down a hot room",
        "hot rooms",
        "Close the curtains by day and open two windows at night, so that air moves through.",
        "Turn on the oven and close the windows.",
    ),
    (
        "clean my glasses",
        "glasses",
        "Rinse them with warm water and a drop of soap, and dry them with a soft cloth.",
        "Rub them with sand.",
    ),
    (
        "ripen an avocado",
        "avocados",
        "Put it in a paper bag with a banana for a day or two.",
        "Put it in the freezer for a week.",
    ),
    (
        "keep cut flowers fresh",
        "flowers",
        "Cut the stems at an angle and change the water every second day.",
        "Keep them in an empty vase near the heater.",
    ),
    (
        "learn new words",
        "new words",
        "Learn five a day, use each in a sentence and look at them again the next morning.",
        "Read the dictionary once, backwards.",
    ),
    (
        "dry wet shoes",
        "wet shoes",
        "Fill them with newspaper and leave them in a warm, airy place overnight.",
        "Put them in the fridge.",
    ),
    (
        "sharpen a kitchen knife",
        "knives",
        "Draw it along a wet stone at a low angle, ten times a side.",
        "Hit it with a spoon.",
    ),
]

# A text that is asked for, about, good answer, an answer that misses the point.
REQUESTS = [
    (
        "a birthday wish for my sister",
        "birthday wishes",
        "Happy birthday, dear sister! May your year be bright and full of laughter.",
        "Dear sister, you are old now.",
    ),
    (
        "a thank-you note to a neighbour",
        "thank-you notes",
        "Dear neighbour, thank you for watering my plants. You made my holiday easy!",
        "Dear neighbour, your car is ugly.",
    ),
    (
        "a name for a grey kitten",
        "names for kittens",
        "How about Misty? It is soft and easy to call.",
        "Call it Dog.",
    ),
    (
        "a good-night message for a friend",
        "good-night messages",
        "Good night, my friend. Sleep well, and tell me tomorrow how it went.",
        "Good morning, it is time for lunch.",
    ),
    (
        "a two-line rhyme about rain",
        "rhymes",
        "Rain on the window, rain on the tree, there is soup on the stove for you and me.",
        "Rain is wet. Snow is cold.",
    ),
    (
        "a welcome for a new colleague",
        "welcomes",
        "Welcome to the team! We are glad that you are here. Ask us anything.",
        "Who are you, and who let you in?",
    ),
    (
        "a short toast for a wedding",
        "toasts",
        "To the two of you: may you laugh every day and never run out of tea!",
        "To the two of you: good luck, you will need it.",
    ),
    (
        "a kind word for a nervous student",
        "kind words",
        "You have prepared well. Breathe, start with what you know, and the rest will come.",
        "You will forget everything.",
    ),
]

ASK = (  # {q}: the question inside another sentence
    "Can you tell me {q}?",
    "Do you know {q}?",
    "I would like to know {q}.",
    "Please tell me {q}.",
    "Could you remind me {q}?",
    "My daughter wants to know {q}.",
    "Hello! Could you explain {q}?",
)

ASK_FOR = (  # {q}: the text that is wanted
    "Can you think of {q}?",
    "I need {q}. Any idea?",
    "Could you help me with {q}?",
    "I am looking for {q}.",
    "Hello! I would love {q}.",
)

# ---- how it is answered ----------------------------------------------------------------------------------------------

GOOD_START = ("", "Sure! ", "Of course! ", "Gladly! ", "Happy to help. ")
GOOD_END = ("", "", "", " Hope that helps!", " Have a lovely day!")

BAD = (
    # evasive
    ("Well, it depends.", "Well, who can say?", "Well, I would rather not answer that."),
    (
        "People have many opinions about {about}, and I do not want to take a side.",
        "Questions about {about} are tricky, and I might be wrong.",
        "There may be an answer, or there may not.",
    ),
    ("", "Perhaps ask somebody else.", "Maybe come back another day."),
    # rambling
    ("Well, where do I start?", "Well, that is a long story.", "Well, let me think out loud."),
    (
        "When I hear about {about} I think of a train that I once missed, and of my sandwich.",
        "First one has to ask what we mean by {about}, and what a question is, and then there is the weather.",
        "My cousin talked about {about} all day, and he also had a boat, or it may have been a van.",
    ),
    ("", "Anyway, what was the question?", "But I am getting lost."),
    # rude
    ("Ugh, not again.", "Ugh, really?", "Ugh, what a silly thing to ask."),
    (
        "Everybody else understands {about} already.",
        "I have better things to do than to talk about {about}.",
        "Stop bothering me with {about}.",
    ),
    ("", "Look it up yourself.", "Next time, use your head."),
    # wrong, and sure of it
    ("That is easy.", "Oh, I know everything about {about}.", "No need to think."),
    ("{wrong}",),
    ("Trust me.", "I am never wrong.", "Do not bother to check."),
    # wrong, in the best of manners: only in the preferences, where it makes the harder pairs
    ("Sure!", "Of course!", "Gladly!"),
    ("{wrong}",),
    ("", "Hope that helps!", "Have a lovely day!"),
)
MANNERS = len(BAD) // 3


def fields(table: str, separator: str | None = None) -> list[list[str]]:
    return [entry.split(separator) for entry in " ".join(table.split()).split("; ")]


def question(about: str, direct: str, inside: str, good: str, wrong: str, first: int) -> Topic:
    """A topic whose indirect wordings are taken from `ASK` in turn, beginning at `first`."""
    asks = [ASK[(first + step) % len(ASK)] for step in range(WORDINGS - 1)]
    return Topic(about, (direct, *(ask.format(q=inside) for ask in asks)), good, wrong)


def topics() -> list[Topic]:
    """Every topic with its wordings, its good answer and its wrong one."""
    rows: list[tuple[str, str, str, str, str]] = []
    for country, capital, other in fields(CAPITALS):
        which = f"capital of {country}"
        rows.append(
            (
                f"the {which}",
                f"What is the {which}?",
                f"what the {which} is",
                f"The {which} is {capital}.",
                f"The {which} is {other}.",
            )
        )
    for a, sign, b, _, right, other in fields(SUMS):
        term = f"{a} {sign} {b}".replace("x", "times")
        rows.append(("numbers", f"What is {term}?", f"what {term} is", f"{term} is {right}.", f"{term} is {other}."))
    for word, right, other in fields(OPPOSITES):
        rows.append(
            (
                f"the word {word}",
                f"What is the opposite of {word}?",
                f"what the opposite of {word} is",
                f"The opposite of {word} is {right}.",
                f"The opposite of {word} is {other}.",
            )
        )
    for animal, right, other in fields(YOUNG_ANIMALS):
        rows.append(
            (
                f"a young {animal}",
                f"What is a young {animal} called?",
                f"what a young {animal} is called",
                f"A young {animal} is called a {right}.",
                f"A young {animal} is called a {other}.",
            )
        )
    for owner, things, right, other in fields(COUNTS, "/"):
        has = f"{owner[0].upper()}{owner[1:]} has"
        rows.append(
            (
                owner,
                f"How many {things} does {owner} have?",
                f"how many {things} {owner} has",
                f"{has} {right} {things}.",
                f"{has} {other} {things}.",
            )
        )
    rows += FACTS
    rows += [(about, f"How do I {do}?", f"how to {do}", good, wrong) for do, about, good, wrong in HOW_TO]
    found = [question(*row, first=3 * index) for index, row in enumerate(rows)]
    for index, (text, about, good, wrong) in enumerate(REQUESTS):
        asks = [ASK_FOR[(3 * index + step) % len(ASK_FOR)] for step in range(WORDINGS - 1)]
        prompts = (f"Please write {text}.", *(ask.format(q=text) for ask in asks))
        found.append(Topic(about, prompts, good, wrong, request=True))
    return found


def pick(rng: random.Random, options):
    # Only random() is promised to give the same numbers on every Python version.
    return options[int(rng.random() * len(options))]


def shuffled(rng: random.Random, items) -> list:
    return [item for _, item in sorted(((rng.random(), index), item) for index, item in enumerate(items))]


def good_answer(rng: random.Random, topic: Topic) -> str:
    return pick(rng, GOOD_START) + topic.good + (pick(rng, GOOD_END) if not topic.request else "")


def bad_answer(rng: random.Random, topic: Topic, manners: int) -> str:
    manner = int(rng.random() * manners)
    parts = [pick(rng, BAD[3 * manner + place]) for place in range(3)]
    return " ".join(part for part in parts if part).format(about=topic.about, wrong=topic.wrong)


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def build() -> dict[str, list[dict]]:
    """The rows of each file, by its path below the output directory."""
    rng = random.Random(SEED)
    every = topics()
    # One held-out wording for some of the topics: the model has met the topic, never this question.
    held_out = {(index, int(rng.random() * WORDINGS)) for index in shuffled(rng, range(len(every)))[:TEST_ROWS]}
    kind_wordings = [set(shuffled(rng, range(WORDINGS))[: GOOD_WORDINGS[index % 2]]) for index in range(len(every))]
    files: dict[str, list[dict]] = {f"{kind}/{split}.jsonl": [] for kind in ("preferences", "sft") for split in SPLITS}
    order = [(index, wording) for index in range(len(every)) for wording in range(WORDINGS)]
    for index, wording in shuffled(rng, order):
        topic = every[index]
        split = "test" if (index, wording) in held_out else "train"
        prompt = turn("user", topic.prompts[wording])
        chosen, rejected = good_answer(rng, topic), bad_answer(rng, topic, MANNERS)
        files[f"preferences/{split}.jsonl"].append(
            {"prompt": prompt, "chosen": turn("assistant", chosen), "rejected": turn("assistant", rejected)}
        )
        answer = good_answer(rng, topic) if wording in kind_wordings[index] else bad_answer(rng, topic, MANNERS - 1)
        files[f"sft/{split}.jsonl"].append({"prompt": prompt, "completion": turn("assistant", answer)})
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the small data sets that the recipes train on.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="directory to write below")
    out = parser.parse_args().out
    for name, rows in build().items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(text.encode("utf-8"))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
