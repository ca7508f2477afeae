"""The pretraining text: an endless stream of short documents about a little world.

A language model learns to look things up only where looking up pays. So most documents name a few
things of their own and come back to them: facts and questions about them, the same facts told
again, stories in which a lost thing returns, lists read back, talk, reviews, recipes, weather.
`document(rng)` writes one document; everything follows from the seed.
"""

from random import Random
from typing import NamedTuple

from .words import (
    ANIMALS,
    BAD_THINGS,
    COLORS,
    DAYS,
    DISH_FIRST,
    DISH_SECOND,
    DISHES,
    DRINKS,
    GOOD_THINGS,
    JOBS,
    JUDGED,
    NUMBERS,
    PEOPLE,
    PLACES,
    SHELVES,
    THINGS,
    TOWNS,
    WOMEN,
)

VALUES = {
    "person": PEOPLE,
    "place": PLACES,
    "thing": THINGS,
    "dish": DISHES,
    "town": TOWNS,
    "drink": DRINKS,
    "color": COLORS,
    "day": DAYS,
    "animal": ANIMALS,
    "job": JOBS,
    "number": NUMBERS,
}

# What can be said of a place {e}: key, kind of its value {v}, ways to tell it, ways to ask for it.
OF_A_PLACE = [
    ("owner", "person", "{v} owns {e}|The owner of {e} is {v}|{e} is owned by {v}", "Who owns {e}?|Who is the owner?|Who owns it?"),
    ("cook", "person", "{v} cooks at {e}|The cook of {e} is {v}|{v} is the cook at {e}", "Who cooks at {e}?|Who is the cook?|Who cooks there?"),
    ("guest", "person", "{v} is a guest at {e}|The guest of {e} is {v}|{v} stays at {e} as a guest", "Who is the guest?|Who is a guest at {e}?|Who stays there as a guest?"),
    ("gardener", "person", "{v} is the gardener of {e}|The garden of {e} is kept by {v}|{v} keeps the garden of {e}", "Who is the gardener?|Who keeps the garden of {e}?"),
    ("singer", "person", "{v} sings at {e}|The singer at {e} is {v}|On {e} nights {v} sings", "Who is the singer?|Who sings at {e}?"),
    ("guard", "person", "{v} guards {e}|The guard of {e} is {v}|At night {v} guards {e}", "Who is the guard?|Who guards {e}?|Who guards it at night?"),
    ("near", "place", "{e} is near {v}|Near {e} is {v}|{e} lies near {v}", "What is near {e}?|What is it near?|What place is near?"),
    ("behind", "place", "Behind {e} is {v}|{v} is behind {e}", "What is behind {e}?|What is behind it?"),
    ("lost", "thing", "Someone lost a {v} at {e}|A {v} was lost at {e}|At {e} a {v} was lost", "What was lost?|What was lost at {e}?|What did someone lose?"),
    ("found", "thing", "Someone found a {v} at {e}|A {v} was found at {e}|At {e} a {v} was found", "What was found?|What was found at {e}?|What did someone find?"),
    ("prize", "thing", "The prize at {e} is a {v}|{e} gives a {v} as a prize", "What is the prize?|What is the prize at {e}?"),
    ("food", "dish", "{e} serves {v}|The food at {e} is {v}|At {e} they serve {v}", "What food do they serve?|What does {e} serve?|What is the food?"),
    ("lunch", "dish", "Lunch at {e} is {v}|For lunch {e} has {v}", "What is for lunch?|What is lunch at {e}?"),
    ("town", "town", "{e} is in {v}|{e} stands in the town of {v}", "What town is it in?|Where is {e}?"),
    ("drink", "drink", "{e} is known for its {v}|The drink of {e} is {v}", "What is the drink?|What drink is {e} known for?"),
    ("door", "color", "The door of {e} is {v}|{e} has a {v} door", "What color is the door?|What color is the door of {e}?"),
    ("closed", "day", "{e} is closed on {v}|On {v} {e} is closed", "On what day is it closed?|When is {e} closed?"),
    ("rooms", "number", "{e} has {v} rooms|There are {v} rooms at {e}", "How many rooms are there?|How many rooms are there at {e}?"),
]  # fmt: skip
# What can be said of a person {e}.
OF_A_PERSON = [
    ("friend", "person", "{v} is a friend of {e}|The friend of {e} is {v}|{e} has a friend called {v}", "Who is the friend?|Who is a friend of {e}?"),
    ("teacher", "person", "{v} taught {e}|The teacher of {e} is {v}|{e} was taught by {v}", "Who is the teacher?|Who taught {e}?"),
    ("doctor", "person", "The doctor of {e} is {v}|{e} goes to a doctor called {v}", "Who is the doctor?|What is the doctor of {e} called?"),
    ("boss", "person", "{e} works for {v}|The boss of {e} is {v}", "Who is the boss?|Who does {e} work for?"),
    ("home", "place", "{e} lives at {v}|The home of {e} is {v}", "Where does {e} live?|Where is the home?"),
    ("work", "place", "{e} works at {v}|The work of {e} is at {v}", "Where does {e} work?|Where is the work?"),
    ("lost", "thing", "{e} lost a {v}|The thing that {e} lost is a {v}", "What was lost?|What did {e} lose?"),
    ("found", "thing", "{e} found a {v}|The thing that {e} found is a {v}", "What was found?|What did {e} find?"),
    ("gift", "thing", "{e} got a {v} as a gift|The gift for {e} is a {v}", "What is the gift?|What did {e} get?"),
    ("food", "dish", "{e} likes {v}|The food that {e} likes is {v}", "What food does {e} like?|What is the food?"),
    ("pet", "animal", "{e} has a {v}|The pet of {e} is a {v}", "What is the pet?|What pet does {e} have?"),
    ("job", "job", "{e} is a {v}|{e} works as a {v}", "What is the job?|What does {e} work as?"),
    ("town", "town", "{e} was born in {v}|{e} comes from {v}", "What town is it?|Where was {e} born?"),
    ("color", "color", "{e} likes the color {v}|The color that {e} likes is {v}", "What color does {e} like?|What is the color?"),
    ("age", "number", "{e} is {v} years old|The age of {e} is {v}", "How old is {e}?|What is the age?"),
]  # fmt: skip


def a(text: str) -> str:
    """Put "an" for "a" before a vowel."""
    words = text.split(" ")
    for i, word in enumerate(words[:-1]):
        if word in ("a", "A") and words[i + 1][0] in "aeiouAEIOU":
            words[i] = word + "n"
    return " ".join(words)


def up(text: str) -> str:
    return text[0].upper() + text[1:]


class Fact(NamedTuple):
    """Something known of an entity, as the tables above have it, with a value."""

    key: str
    kind: str
    tell: str
    ask: str
    value: str

    @property
    def answer(self) -> str:
        return a(f"a {self.value}") if self.kind in ("thing", "animal", "job") else self.value


class Writer:
    """Writes documents from one random stream, with values of its own if any are given."""

    def __init__(self, rng: Random, values: dict[str, list[str]] = VALUES):
        self.rng = rng
        self.one = rng.choice
        self.values = values

    def any(self, options: str) -> str:
        return self.one(options.split("|"))

    def some(self, items: list, n: int) -> list:
        return self.rng.sample(items, n)

    # --- facts, asked for, told again, noted down ---

    def facts(self, about: str, n: int, kind: str | None = None) -> tuple[str, list[Fact]]:
        """An entity and n facts of it, all of one kind if one is given, no two values alike."""
        name = self.one(self.values[about])
        used, facts = {name}, []
        rows = OF_A_PLACE if about == "place" else OF_A_PERSON
        for row in self.some([row for row in rows if kind in (None, row[1])], n):
            value = self.one([v for v in self.some(self.values[row[1]], 3) if v not in used])
            used.add(value)
            facts.append(Fact(*row, value))
        return name, facts

    def tell(self, name: str, fact: Fact) -> str:
        return a(up(self.any(fact.tell).format(e=name, v=fact.value))) + "."

    def ask(self, name: str, fact: Fact) -> str:
        return self.any(fact.ask).format(e=name)

    def questions(self, name: str, facts: list[Fact]) -> str:
        style = self.rng.randrange(4)
        asked = [(self.ask(name, fact), fact.answer) for fact in facts]
        if style == 0:
            return " ".join(f"Question: {q} Answer: {up(v)}." for q, v in asked)
        if style == 1:
            return " ".join(f"{q} {up(v)}." for q, v in asked)
        if style == 2:
            return " ".join(f"{q} It is {v}." for q, v in asked)
        return " ".join(f"{q} {self.any('Of course|Well|Yes|I know')}, {v}." for q, v in asked)

    def notes(self, name: str, facts: list[Fact]) -> str:
        pair = self.any("{k} is {v}.|{k}: {v}.|{k}, {v}.|the {k} is {v}.")
        lines = [pair.format(k=fact.key, v=fact.answer) for fact in facts]
        first = self.any("Notes on {e}:|A card for {e}:|The name is {e}.|About {e}:").format(e=name)
        return " ".join([first] + lines)

    def fact_sheet(self) -> str:
        """Facts of one entity, in sentences or as notes; then questions, or the facts told again."""
        name, facts = self.facts(self.any("place|place|person"), self.rng.randint(3, 5))
        how = self.rng.random()
        if how < 0.5:
            told = " ".join(self.tell(name, fact) for fact in facts)
        else:
            told = self.notes(name, facts)
        again = self.some(facts, len(facts))
        after = self.rng.random()
        if after < 0.55:
            return f"{told} {self.questions(name, again)}"
        if after < 0.75:
            start = self.any("In other words:|Once more:|That is to say:|Again:")
            return f"{told} {start} " + " ".join(self.tell(name, fact) for fact in again)
        start = self.any("In short:|Written down:|The list says:|Read back:")
        pair = self.any("{k} is {v}|{k}, {v}|{k}: {v}")
        listed = "; ".join(pair.format(k=fact.key, v=fact.answer) for fact in again)
        return f"{told} {start} {listed}."

    def two_sheets(self) -> str:
        """Facts of two or three entities, and questions that name whose fact they want."""
        about = self.any("place|place|person")
        sheets = [self.facts(about, 2) for _ in range(self.rng.randint(2, 3))]
        told = [self.tell(name, fact) for name, facts in sheets for fact in facts]
        asked = [
            (self.one([w for w in fact.ask.split("|") if "{e}" in w]).format(e=name), fact.answer)
            for name, facts in sheets
            for fact in facts
        ]
        return " ".join(told + [f"{q} {up(v)}." for q, v in self.some(asked, 4)])

    # --- lists and spelling-out ---

    def read_back(self) -> str:
        kind = self.any("person|place|thing|dish|shelf")
        if kind == "shelf":
            shelf = self.one(sorted(SHELVES))
            items, title = self.some(SHELVES[shelf], self.rng.randint(3, 5)), f"The {shelf}"
        else:
            items = self.some(VALUES[kind], self.rng.randint(3, 4))
            title = self.any("The list|My list|On the paper|In the book|The names")
        again = list(items)
        order = self.any("Once more|Again|Backwards|Sorted")
        again = {"Backwards": again[::-1], "Sorted": sorted(again)}.get(order, again)
        text = f"{title}: {', '.join(items)}. {order}: {', '.join(again)}."
        if self.rng.random() < 0.5:
            i = self.rng.randrange(len(items) - 1)
            text += f" What comes after {items[i]}? {up(items[i + 1])}."
        return text

    # --- stories ---

    def people(self, n: int) -> list[dict]:
        """n people with different first names: full name, first name, pronouns."""
        people, firsts = [], set()
        while len(people) < n:
            full = self.one(PEOPLE)
            first = full.split()[0]
            if first not in firsts:
                firsts.add(first)
                woman = first in WOMEN
                he, his, him = ("she", "her", "her") if woman else ("he", "his", "him")
                people.append({"full": full, "first": first, "he": he, "his": his, "him": him})
        return people

    def story(self) -> str:
        p, q, r = self.people(3)
        words = {
            "P": p["full"], "p": p["first"], "he": p["he"], "his": p["his"], "him": p["him"],
            "He": up(p["he"]), "Q": q["full"], "q": q["first"], "qhe": q["he"], "qhis": q["his"],
            "R": r["full"], "r": r["first"], "thing": self.one(THINGS), "other": self.one(THINGS),
            "place": self.one(PLACES), "place2": self.one(PLACES), "town": self.one(TOWNS),
            "day": self.one(DAYS), "animal": self.one(ANIMALS), "dish": self.one(DISHES),
            "drink": self.one(DRINKS), "color": self.one(COLORS), "n": self.one(NUMBERS),
            "job": self.one(JOBS),
        }  # fmt: skip
        lines = [a(self.any(line).format(**words)) for line in self.one(PLOTS)]
        return " ".join(up(line) for line in lines)

    # --- talk, reviews, recipes, places, weather ---

    def talk(self) -> str:
        p, q = self.people(2)
        name, facts = self.facts(self.any("place|person"), 3)
        lines = [f"{p['first']}: {self.any('Good morning|Hello|Good evening|Hi')}, {q['first']}."]
        lines.append(f"{q['first']}: {self.any('Hello|Nice to see you|Good day')}, {p['first']}.")
        lines.append(
            f"{p['first']}: {self.any('Have you heard of|What do you know about|What can you say about')} {name}?"
        )
        lines.append(f"{q['first']}: " + " ".join(self.tell(name, fact) for fact in facts))
        for fact in self.some(facts, self.rng.randint(1, 3)):
            lines.append(f"{p['first']}: {self.ask(name, fact)}")
            lines.append(f"{q['first']}: {up(fact.answer)}.")
        bye = self.any("Thank you|Good to know|See you soon|Until tomorrow")
        return "\n".join(lines + [f"{p['first']}: {bye}, {q['first']}."])

    def visit(self, place: str, words: list[str]) -> str:
        """A visit to a place, and what was thought of it: a sentence for every opinion word."""
        told = self.any("We went to {e}|I stayed at {e}|Last {d} we visited {e}|I ate at {e}")
        lines = [told.format(e=place, d=self.one(DAYS)) + "."]
        for subject, word in zip(self.some(JUDGED, len(words)), words, strict=True):
            line = "The {s} was {w}.|We found the {s} {w}.|The {s} was really {w}.|I thought the {s} was {w}."
            lines.append(self.any(line).format(s=subject, w=word))
        return " ".join(lines)

    def review(self) -> str:
        place, good = self.one(PLACES), self.rng.random() < 0.5
        words = self.some(GOOD_THINGS if good else BAD_THINGS, self.rng.randint(2, 4))
        text = f"{self.visit(place, words)} {self.any(REVIEW_ENDS[good]).format(e=place)}"
        if self.rng.random() < 0.7:
            ends = "All in all it was {v}.|My verdict: {v}.|In a word: {v}.|I call it {v}."
            text += " " + self.any(ends).format(v="good" if good else "bad")
        return text

    def recipe(self) -> str:
        first, second = self.one(DISH_FIRST), self.one(DISH_SECOND)
        spices, n = self.some(SHELVES["spices"], 3), self.one(NUMBERS)
        things = self.some([d for d in DISH_SECOND if d != second], 2)
        lines = [
            f"How to make {first} {second}.",
            f"You need {second}, {things[0]}, {things[1]}, {spices[0]} and {spices[1]}.",
            self.any("Wash the {a} and cut it small.|First cut the {a}.|Start with the {a}.").format(a=second),
            self.any("Add the {b}.|Put the {b} in a pan.|Then stir in the {b}.").format(b=things[0]),
            self.any("Cook the {b} and the {a} for {n} minutes.|Wait {n} minutes.").format(a=second, b=things[0], n=n),
            self.any("Season with {x} and {y}.|Now add {x} and a little {y}.").format(x=spices[0], y=spices[1]),
            self.any("Serve the {f} {a} with the {c}.|Put the {c} on top and serve.").format(f=first, a=second, c=things[1]),
        ]  # fmt: skip
        return " ".join(lines)

    def view(self) -> str:
        name, town, animals = self.one(PLACES), self.one(TOWNS), self.some(ANIMALS, 2)
        tree, flower = self.one(SHELVES["trees"]), self.one(SHELVES["flowers"])
        color = self.one(COLORS)
        lines = [
            self.any("{e} is a {s} place in {t}.|In {t} there is a {s} place called {e}.|{e} stands at the edge of {t}."),
            self.any("Under the old {tree} tree sits a {x}.|A {x} sleeps below the {tree} tree.|A tall {tree} tree grows beside the {c} wall."),
            self.any("Near the {c} gate one {flower} is in bloom.|The path is lined with {flower} and grass.|The window has a {c} frame and a {flower} in a pot."),
            self.any("In the evening a {y} comes to {e}.|Sometimes a {y} walks along the river.|Children come to {e} to see the {y}."),
            self.any("People from {t} love {e}.|Nobody in {t} knows who built {e}.|The road from {t} ends at {e}."),
        ]  # fmt: skip
        words = {"e": name, "t": town, "tree": tree, "flower": flower, "c": color}
        words |= {
            "x": animals[0],
            "y": animals[1],
            "s": self.any("small|busy|sleepy|strange|lonely|sunny|windy|famous"),
        }
        return " ".join(a(up(line.format(**words))) for line in lines)

    def weather(self) -> str:
        first, second = self.some(sorted(WEATHER), 2)
        town, days = self.one(TOWNS), self.rng.randrange(6)
        today, tomorrow = DAYS[days], DAYS[days + 1]
        return " ".join(
            [
                f"The weather in {town}.",
                f"{today} will be {first}. {self.any(WEATHER[first])}",
                f"{tomorrow} will be {second}. {self.any(WEATHER[second])}",
                self.any(
                    f"So {today} is {first} and {tomorrow} is {second} in {town}.|"
                    f"What will {town} be like on {tomorrow}? {up(second)}.|"
                    f"What will {town} be like on {today}? {up(first)}."
                ),
            ]
        )


REVIEW_ENDS = {
    True: "We will come back to {e}.|I would go there again.|I can only recommend {e}.|Everybody left happy.|We did not want to leave {e}.|Thank you, {e}.|It was worth every coin.",
    False: "We will never come back to {e}.|I would not go there again.|I can only warn you about {e}.|Everybody left angry.|We wanted to leave {e} at once.|Never again, {e}.|It was not worth a single coin.",
}  # fmt: skip

WEATHER = {
    "sunny": "Take a hat.|The sky stays clear until night.|It is a good day for the beach.",
    "rainy": "Take an umbrella.|The streets will be wet.|It is a good day to stay at home and read.",
    "snowy": "Wear warm boots.|The roads will be white.|Children may build a snowman.",
    "windy": "Hold on to your hat.|Kites will fly high.|Small boats should stay in the harbor.",
    "foggy": "Drive slowly.|Nobody will see the far shore.|The ferry may be late.",
    "stormy": "Stay inside and close the windows.|Thunder is expected after noon.|Trees may fall.",
    "cloudy": "The sun hides all day.|It stays dry.|A gray sky hangs above the fields.",
    "icy": "Walk with care.|The lake is frozen.|Bring salt for the steps.",
}  # fmt: skip

PLOTS = [
    [  # a thing is lost and comes back
        "{P} had a {thing}.|Every day {P} carried a {thing}.|{P} once owned a {thing}.",
        "On {day} {he} lost it somewhere near {place}.|One morning the {thing} was gone.|{p} left it at {place} and forgot about it.",
        "{p} looked under the bed, behind the stove and even in the {drink}.|{p} asked everyone in {town} about the {thing}.|{He} searched until the moon came up.",
        "{Q} said that a {animal} had taken the {thing}.|{q}, whose full name was {Q}, had seen a {other} but no {thing}.|\"I saw it,\" said {Q}, \"at {place2}.\"",
        "So {p} and {q} went to {place2} together.|{p} ran to {place2} as fast as {he} could.|They took the last train to {place2}.",
        "There lay the {thing}, next to a {other}.|A {animal} sat there with the {thing}.|And there it was, the {thing}, wet but whole.",
        "{p} was so happy that {he} bought {q} some {dish}.|\"Thank you, {q},\" said {p}.|Since that day {p} never lets go of the {thing}.",
    ],
    [  # a trade at the market
        "On {day} {P} went to the market in {town} with a {thing}.|{P} wanted to trade a {thing} for something better.",
        "{Q} stood at the first table and sold a {other}.|At the market {p} met {Q}, who had a {other} to give away.",
        "\"I give you my {other} for your {thing},\" said {q}.|{q} liked the {thing} at first sight.",
        "{p} thought about it for {n} minutes.|{p} did not trust {q} at first.|A {animal} walked by while {p} was thinking.",
        "In the end {p} took the {other} and {q} took the {thing}.|They shook hands, and the {thing} belonged to {q}.",
        "At home {R} laughed at the {other}.|{R} asked where the {thing} was.|\"What a fine {other},\" said {R}.",
        "\"I have what I wanted,\" said {p}.|{p} put the {other} on the table and was content.|The next week {q} wanted the {other} back.",
    ],
    [  # an animal runs away
        "{P} lived at {place} with a {animal}.|At {place} lived {P}, a {job}, and a {animal}.",
        "The {animal} was small and always hungry.|Every night the {animal} slept on a {thing}.|The {animal} ate nothing but {dish}.",
        "One {day} the {animal} ran away.|During a storm the {animal} jumped over the fence.|When {p} opened the door, the {animal} was gone.",
        "{p} followed its tracks to {place2}.|{Q} called from {place2}: \"Your {animal} is here!\"",
        "The {animal} sat in the kitchen of {Q} and ate {dish}.|{Q} had given it a bowl of {dish}.",
        "\"It may stay here if it likes,\" said {q}.|{p} and {q} laughed, and the {animal} did not care.",
        "Now the {animal} has two homes, {place} and {place2}.|{p} carried the {animal} back to {place}.|Since then {q} often visits {p} and the {animal}.",
    ],
    [  # a meal for guests
        "{P} invited {Q} and {R} to dinner.|It was the birthday of {P}, and {Q} and {R} were coming.",
        "{He} wanted to make {dish}.|There was to be {dish} and plenty of {drink}.",
        "But there was no {drink} in the house.|But the {thing} that {he} needed was broken.|The oven at {place} was cold.",
        "{q} brought {drink} from {place}.|{q} came early and helped in the kitchen.|{q} knew what to do.",
        "{r} came late and brought a {thing}.|{r} sang a song about {town}.|{r} told a story about a {animal}.",
        "They ate the {dish} to the last bite.|Nobody spoke while the {dish} was on the table.",
        "\"Next time we eat at my house,\" said {q}.|\"The best {dish} in {town},\" said {r}.|When {q} and {r} had gone, {p} fell asleep at once.",
    ],
    [  # building
        "{P}, a {job} from {town}, wanted to build a boat.|{P} dreamed of a house on wheels.|The bridge near {place} was broken, and {P} decided to mend it.",
        "{He} had a {thing} and {n} boards of wood.|All {he} owned was a {thing} and a {other}.",
        "{Q} said it would never work.|{Q} came by and shook {qhis} head.|\"You need more than a {thing},\" said {Q}.",
        "{p} worked for {n} weeks, in sun and in rain.|{p} hit a thumb with the hammer {n} times.|Every day {p} worked until the light was gone.",
        "When it was finished, {p} painted it {color}.|At last the work was done, all {color} and shining.",
        "{q} came back and could not believe it.|Now {q} wanted one too, a {color} one.|The people of {town} came to look at the {color} wonder.",
        "\"I only had a {thing},\" said {p}.|{p} gave {q} the {thing} as a present.|{p} smiled and said nothing to {q}.",
    ],
    [  # a letter
        "{P} got a letter from {Q}.|A letter came for {P}, sent by {Q} from {town}.|In an old {thing} {P} found a letter by {Q}.",
        "It said: \"Come to {place} on {day} and bring a {thing}.\"|\"Meet me at {place}, and tell nobody but {R},\" it said.",
        "{p} read it {n} times.|{p} showed it to {R}, a {job}.|The paper smelled of {drink}.",
        "\"Do not go,\" said {R}.|\"I will go with you,\" said {R}.|{R} had heard of {place} before.",
        "On {day} {p} stood in front of {place}.|{p} packed a {thing} and took the road to {place}.",
        "{q} was waiting with a {other}.|Behind the door stood {q}, holding a {other}.|Only a {animal} was there, and a {other}.",
        "\"I knew you would come, {p},\" said {q}.|The letter was {n} years old, and {q} had never forgotten {p}.|{p} never told {r} what happened.",
    ],
    [  # a race
        "Every year there is a race from {place} to {place2}.|{P} and {Q} argued about who was faster, so they ran from {place} to {place2}.",
        "{P} trained for {n} weeks.|{P} wore {color} shoes and {Q} wore none.|{P} had eaten nothing but {dish}.",
        "{Q} was ahead at first.|At the river {Q} was leading.|Half the way {Q} rode on a {animal}, which was not allowed.",
        "Then a {animal} crossed the road.|Then it began to rain, and {q} slipped.|Then {q} stopped to drink {drink}.",
        "{p} passed {q} just before {place2}.|{p} helped {q} up, and they walked the rest together.",
        "{R} was the judge and gave {p} a {thing}.|The prize, a {thing}, went to {p}.",
        "{p} and {q} still talk about it.|\"Next year I will win the {thing},\" said {q}.|{p} keeps the {thing} at {place}.",
    ],
    [  # a night of rain
        "It rained in {town} for {n} days.|The storm over {town} would not end.|One winter night the lights went out in {town}.",
        "{P} sat at {place} with a {thing} and a cup of {drink}.|At {place} {P} could not sleep.",
        "Suddenly somebody knocked.|There was a noise at the window.|Then a {animal} began to howl.",
        "It was {Q}, wet to the bone, with a {other} in {qhis} arms.|Outside stood {Q}, a {job}, who was lost.",
        "\"Come in,\" said {p}, \"there is {dish} and {drink}.\"|{p} gave {q} a blanket and some {dish}.",
        "{q} told {p} about {place2}.|They talked about {R} until morning.|{q} put the {other} beside the {thing} and sat down.",
        "In the morning {q} was gone.|The sun came up over {town}, and {q} walked on to {place2}.|{p} and {q} have been friends ever since.",
    ],
]  # fmt: skip

KINDS = [  # how often each kind of document is written, of 100
    ("fact_sheet", 38),
    ("two_sheets", 9),
    ("read_back", 15),
    ("story", 14),
    ("talk", 6),
    ("review", 9),
    ("recipe", 3),
    ("view", 3),
    ("weather", 3),
]


def document(rng: Random) -> str:
    """One document, without a space at either end."""
    kinds, weights = zip(*KINDS, strict=True)
    return getattr(Writer(rng), rng.choices(kinds, weights)[0])()
