"""A small chat task: questions to the Harbour Library, which does not exist. 200 lines to train on.

python -m data.library  # writes data/chat/: train.jsonl, validation.jsonl and test.jsonl

No model can know the answers, so a score above zero was learned here. The validation and test
questions are about the same twenty facts, but no training question is among them.
"""

import json
from pathlib import Path

from minipeft.files import write_text

FOLDER = Path(__file__).parent / "chat"

# An answer, and twelve questions for it. The last two are for validation and for the test.
FACTS = {
    "We open at ten and close at six, and on Thursdays at nine in the evening.": [
        "When do you open?", "What are your opening hours?", "Until when are you open?",
        "At what time do you close?", "Are you open in the evening?", "When can I come in?",
        "How late are you open on Thursdays?", "Is the library open at five?",
        "Tell me the hours, please.", "What time does the library open?",
        "Could you tell me when you close?", "How early can I visit the library?",
    ],
    "No, we are closed on Mondays. On Sundays we are open until two.": [
        "Are you open on Mondays?", "Can I come on a Monday?", "Is the library closed on Mondays?",
        "Do you open on Sundays?", "Can I visit on Sunday?", "Which day are you closed?",
        "Is there a day when you are closed?", "Will you be open next Monday?",
        "What about Sundays?", "Is Monday a good day to come?",
        "Would I find you open on a Monday morning?", "On which days is the library shut?",
    ],
    "A card costs eight crowns a year. For children it is free.": [
        "How much is a card?", "What does a library card cost?", "Do I have to pay for a card?",
        "Is the card free?", "What is the yearly fee?", "Do children pay for a card?",
        "How much do I pay per year?", "Is there a fee to join?",
        "What is the price of membership?", "Does it cost anything to join?",
        "How expensive is a card for a year?", "What would I have to pay to become a member?",
    ],
    "Bring a letter with your address to the desk. It takes five minutes.": [
        "How do I get a card?", "What do I need for a card?", "How can I join?",
        "Where do I get a library card?", "What must I bring to join?", "I want a card.",
        "How do I become a member?", "How long does it take to get a card?",
        "Can I get a card today?", "I would like to join the library.",
        "What papers do I need to become a member?", "Which steps are there to get a card?",
    ],
    "You may borrow twelve books at a time.": [
        "How many books can I borrow?", "What is the limit for books?",
        "Can I take ten books home?", "How many books at once?", "May I borrow fifteen books?",
        "Is there a limit to how much I can borrow?", "How many may I take?",
        "What is the largest number of books that I can borrow?", "Can I have twenty books?",
        "How many books am I allowed to take home?",
        "Up to how many books does the library lend me?", "Would eleven books be too many?",
    ],
    "Four weeks. You can extend it twice, if nobody is waiting.": [
        "How long can I keep a book?", "For how long may I borrow a book?",
        "When do I have to bring it back?", "What is the loan period?", "Can I extend a loan?",
        "May I keep a book for two months?", "How often can I renew?",
        "How many weeks do I have?", "Can I renew my books?", "How do I keep a book longer?",
        "Is it possible to renew a book three times?", "After how many weeks is a book due?",
    ],
    "Ten cents a day for each book, and at most five crowns.": [
        "What happens if I am late?", "How much is the fine?", "What do I pay for a late book?",
        "Is there a fine?", "My book is overdue, what now?", "What does a late return cost?",
        "How high is the fine for being late?", "I am three days late. What do I pay?",
        "Do you charge for late books?", "What is the most I can be charged for being late?",
        "How much do you charge per day when a book is overdue?",
        "What will it cost me if I return this a week late?",
    ],
    "Please pay for a new copy, or bring us one.": [
        "I lost a book.", "What if I lose a book?", "My book is gone. What now?",
        "I cannot find my library book.", "My dog ate the book.", "What do I do about a lost book?",
        "The book fell into the sea.", "I left your book on a train.",
        "What happens to a lost book?", "I think I have lost one of your books.",
        "What should someone do who has lost a library book?", "A book of yours has been stolen from me.",
    ],
    "Yes, use the green box beside the door. It is emptied every morning.": [
        "Can I return books at night?", "Is there a box for returns?",
        "Where do I return books when you are closed?", "Can I bring a book back on a Monday?",
        "Is there a book drop?", "How do I return a book after hours?",
        "May I leave my books outside?", "Where is the return box?",
        "Can I give back a book before you open?", "Do you have a box for returned books?",
        "How can I hand in a book late in the evening?", "Could I drop off my books on a closed day?",
    ],
    "They are upstairs, behind the ship in the glass case.": [
        "Where are the children's books?", "Where do I find books for children?",
        "Do you have books for kids?", "Where is the children's corner?",
        "My son wants a picture book. Where do I go?", "Which floor has the children's books?",
        "Are there picture books?", "How do I get to the children's section?",
        "Where can my daughter find something to read?", "Where do you keep picture books?",
        "Can you show me the way to the books for children?", "In which room are books for small children?",
    ],
    "In the cellar, from the year 1871 on. Ask at the desk for the key.": [
        "Where are the old newspapers?", "Do you keep old newspapers?",
        "How far back do your newspapers go?", "Can I read a newspaper from 1900?",
        "Where is the archive?", "How do I get into the archive?",
        "I am looking for old newspapers.", "Do you have papers from the last century?",
        "Who has the key to the archive?", "Can I see newspapers from the war?",
        "Which is the oldest newspaper that you have?", "Where could I look up a newspaper from 1925?",
    ],
    "Yes. The network is called Gull, and the password is on your card.": [
        "Do you have wireless internet?", "Is there Wi-Fi?", "What is the Wi-Fi password?",
        "How do I get online here?", "Can I use the internet?", "What is the network called?",
        "I need the internet password.", "Is the Wi-Fi free?", "How do I connect my laptop?",
        "Where do I find the password for the internet?",
        "Which network do I choose on my phone?", "Could I go online in the library?",
    ],
    "There are six, by the north windows. You can use one for an hour.": [
        "Do you have computers?", "Where are the computers?", "Can I use a computer?",
        "How many computers are there?", "How long can I use a computer?",
        "Is there a computer for visitors?", "I need a computer for a letter.",
        "May I sit at a computer all day?", "Are there computers for the public?",
        "Where can I work on a computer?", "For how long may I sit at one of the computers?",
        "Which part of the library has computers?",
    ],
    "Yes, beside the stairs. A page costs five cents, in colour twenty.": [
        "Can I print here?", "Do you have a printer?", "What does printing cost?",
        "Where is the printer?", "Can I make copies?", "Is there a copy machine?",
        "How much is a colour page?", "I need to print a form.", "Where can I copy a page?",
        "What do you charge for a copy?", "How much would I pay to print ten pages?",
        "Is it possible to print something in colour?",
    ],
    "Every Wednesday at four, for children from three to seven.": [
        "When is story time?", "Do you read to children?", "Is there a story hour?",
        "When can my daughter hear stories?", "How old must children be for story time?",
        "What day is the story hour?", "Is story time on Wednesday?",
        "Do you have something for small children in the afternoon?",
        "At what time does story time begin?", "Can my son of four come to story time?",
        "When do you read stories aloud?", "For which ages is the story hour?",
    ],
    "The book club meets on the first Friday of the month, at seven.": [
        "Do you have a book club?", "When does the book club meet?",
        "Can I join the book club?", "What day is the book club?",
        "Is there a group that talks about books?", "When is the next meeting of the book club?",
        "How often does the book club meet?", "At what time is the book club?",
        "I would like to talk about books with others.", "Is the book club on Fridays?",
        "In which week of the month is the book club?", "Which evening is the reading group?",
    ],
    "Only with a lid, and never in the cellar.": [
        "Can I drink coffee here?", "Is coffee allowed?", "May I bring a drink?",
        "Can I have tea at my desk?", "Are drinks allowed?", "May I take a bottle of water in?",
        "Can I bring my coffee?", "Where may I drink something?",
        "Do you allow drinks in the reading room?", "Is it all right to drink water here?",
        "What is the rule about coffee?", "Would you mind a cup of tea in the library?",
    ],
    "Dogs are welcome on the ground floor, if they can keep quiet.": [
        "Can I bring my dog?", "Are dogs allowed?", "May my dog come in?",
        "Do you allow dogs?", "What about my dog?", "Is my dog welcome?",
        "Can dogs come into the library?", "Does my dog have to wait outside?",
        "I have a small dog with me.", "Where may a dog go in the library?",
        "Would a dog be a problem?", "Do I have to leave my dog at home?",
    ],
    "Yes, the lift is on the left of the entrance.": [
        "Is there a lift?", "I cannot climb stairs.", "How do I get upstairs with a pram?",
        "Can I come with a wheelchair?", "Where is the lift?", "Do you have a lift?",
        "Is the upper floor open to wheelchairs?", "My mother cannot use the stairs.",
        "How do I get up without stairs?", "Is there a way up besides the stairs?",
        "Could someone in a wheelchair reach the upper floor?", "On which side of the door is the lift?",
    ],
    "Tell us the title. If it is under forty crowns, we will buy it.": [
        "Can you buy a book for me?", "You do not have the book that I want.",
        "Can I suggest a book?", "Do you buy books that readers ask for?",
        "How do I ask for a new book?", "Will you order a book?",
        "I wish you had more novels by one author.", "Could you get a book that you do not have?",
        "Do you take suggestions?", "A book is missing from your shelves.",
        "How can I make you buy a certain title?", "What do I do if a book is not in the library?",
    ],
}  # fmt: skip


def conversations(first: int, last: int) -> list[dict]:
    """Lines of a chat file: the questions first to last - 1 of each fact, fact after fact."""
    return [
        {"messages": [{"role": "user", "content": question},
                      {"role": "assistant", "content": answer}]}
        for i in range(first, last)
        for answer, questions in FACTS.items()
        for question in questions[i : i + 1]
    ]  # fmt: skip


def files() -> dict[str, str]:
    """The three files, by name."""
    parts = {"train": (0, 10), "validation": (10, 11), "test": (11, 12)}
    return {
        f"{name}.jsonl": "".join(json.dumps(line) + "\n" for line in conversations(*span))
        for name, span in parts.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        write_text(FOLDER / name, text)
        print(f"wrote {FOLDER / name}: {text.count(chr(10))} conversations")
