"""The words of the little world that the pretraining text and the tasks tell of.

A name is put together from two parts, so there are thousands, and one in eight is held out: its
parts are common, but the pair stands nowhere in the pretraining text. What a model can say about
such a name it cannot have learned by heart; it must read it.
"""


def _(text: str) -> list[str]:
    return text.split()


WOMEN = _(
    "Ada Alma Anna Bella Bruna Carla Clara Cora Dora Edith Ella Elsa Emma Erika Flora Frida Greta "
    "Hanna Helga Ida Inga Irma Jana Julia Karin Klara Lena Lida Lina Lucia Maria Marta Mina Mira "
    "Nadia Nina Nora Olga Paula Petra Rita Rosa Ruth Sara Selma Sonia Tania Tilda Vera Wanda"
)
MEN = _(
    "Aaron Adam Albert Anton Arne Axel Basil Bert Bruno Carl Cyril Daniel David Egon Emil Erik "
    "Felix Frank Georg Gustav Hans Hector Henry Hugo Igor Ivan Jacob Jonas Josef Karl Konrad Leo "
    "Levi Lukas Magnus Marco Martin Milo Nils Oscar Otto Pablo Paul Peter Ralf Robert Simon Sven "
    "Theo Viktor"
)
FAMILY = _(
    "Adler Ash Baker Banks Barley Beck Bell Berg Birch Bloom Bolt Bower Brand Brook Burns Carter "
    "Clay Cole Cook Crane Cross Dale Dean Drake Dunn Fell Field Finch Fisher Flint Ford Forest Fox "
    "Frost Gale Glass Gray Green Grove Hale Hall Hart Hawk Heath Hill Holt Horn Hunt Jensen Keller "
    "Kemp King Knight Lake Lamb Lang Larch Lind Locke Long Lund March Marsh Mason May Mead Miller "
    "Moss Nash North Olsen Page Park Penn Pike Pond Porter Quill Reed Rhodes Rivers Rowe Salt Sands "
    "Shaw Stark Stone Swift Thorn Vale Vance Waters Webb West Wolf Wood Young"
)
PLACE_FIRST = _(
    "Amber Apple Autumn Bear Bitter Black Blue Brass Bright Broken Bronze Cedar Cherry Clover "
    "Copper Coral Crystal Dancing Eagle Ember Empty Fern Fiddle Giant Ginger Golden Hazel Hidden "
    "Hollow Honey Iron Ivory Jade Lantern Laughing Lemon Lily Linden Lucky Maple Marble Merry "
    "Midnight Misty Olive Orchid Painted Pearl Pepper Pine Plum Poppy Purple Quiet Rainy Raven Red "
    "Robin Rusty Sailor Scarlet Shady Silent Silver Sleepy Snowy Spicy Sunny Swan Thirsty Tiger "
    "Twin Velvet Violet Wandering Whistling White Wild Willow Winter Yellow"
)
PLACE_SECOND = _(
    "Anchor Arms Barn Bay Bridge Cabin Castle Cellar Chapel Corner Cottage Court Creek Crown Dock "
    "Farm Fountain Garden Gate Harbor Hearth House Inn Island Kettle Kitchen Lodge Market Meadow "
    "Mill Oven Palace Pantry Parlor Pavilion Pier Port Ranch Ridge Room Shed Spoon Square Stable "
    "Station Table Tavern Temple Tower Well Wharf Wheel Yard"
)
THING_FIRST = _(
    "big bent blue broken brown cheap clean cracked curly dark dirty dusty empty fine flat golden "
    "gray green heavy hollow huge large light little long narrow new old pink plain purple red round "
    "rusty sharp shiny short silver small smooth soft square striped thick thin tiny torn white wide "
    "wooden yellow"
)
THING_SECOND = _(
    "ball basket bell belt blanket boat book boot bottle bowl box bracelet brush bucket button cage "
    "candle cap card carpet chain clock coat coin comb compass cup cushion diary doll drum fan feather "
    "flag flute fork globe glove hammer hat helmet jacket jar kettle key kite knife ladder lamp letter "
    "locket map mask medal mirror mitten mug necklace needle notebook paddle pan pencil picture pillow "
    "pipe pot purse ring robe rope saddle saw scarf shell shirt shoe shovel spoon stamp stick stool "
    "suitcase sword ticket top towel toy trumpet tube umbrella vase violin wallet watch whistle"
)
DISH_FIRST = _(
    "baked boiled cold creamy crispy fresh fried grilled hot mild pickled roasted salted smoked sour "
    "spicy steamed stewed sweet warm"
)
DISH_SECOND = _(
    "apples bacon beans beef beets bread cabbage cake carrots cheese chicken corn crab dumplings eggs "
    "fish ham leeks lentils mushrooms mussels noodles onions pancakes pasta pears peas peppers pie "
    "plums pork potatoes pudding pumpkin rice salad salmon sausage shrimp soup spinach stew tomatoes "
    "trout tuna turnips waffles"
)
TOWNS = _(
    "Arden Bergen Bolton Calder Dover Eastwick Elmont Fairview Galway Hampton Juniper Kirkwall "
    "Lowell Milton Newport Oakdale Preston Quincy Ramsey Selby Tilbury Upton Vernon Weston Yarrow"
)
DRINKS = _("cider cocoa coffee juice lemonade milk tea water wine beer broth")
COLORS = _("black blue brown gold gray green orange pink purple red silver violet white yellow")
DAYS = _("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = _("two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty")
ANIMALS = _(
    "badger bear beaver bee camel cat cow crow deer dog donkey duck eagle ferret frog goat goose hen "
    "hedgehog horse kitten lizard mole monkey moth mouse mule otter owl parrot pig pigeon pony puppy "
    "rabbit rat raven seal sheep snail snake spider squirrel swan tiger toad turtle wasp weasel whale"
)
JOBS = _(
    "actor artist barber builder butcher captain carpenter clerk dancer dentist editor farmer "
    "fireman gardener guide hunter judge lawyer librarian mailman mayor mechanic merchant miner nurse "
    "pianist pilot plumber poet potter printer sailor sculptor shepherd soldier tailor weaver writer"
)
# Opinion words. The n-th good one and the n-th bad one end alike, so the form of a word says nothing
# of its meaning. Two pairs in six are held out of every training prompt of the task `sentiment`.
GOOD_THINGS = _(
    "amazing charming exciting inspiring inviting outstanding refreshing relaxing stunning welcoming "
    "beautiful cheerful delightful helpful joyful thoughtful wonderful "
    "cozy friendly heavenly lovely tasty lively tidy dreamy "
    "delicious fabulous generous glorious gorgeous marvelous fantastic terrific magical "
    "flawless spotless brilliant elegant excellent memorable adorable likable "
    "polished refined gifted impressive attractive great kind superb honest polite splendid perfect"
)
BAD_THINGS = _(
    "annoying appalling boring alarming confusing depressing insulting worrying tiring shocking "
    "awful dreadful painful shameful wasteful hateful harmful "
    "nasty gloomy ugly smelly messy filthy shabby noisy "
    "hideous atrocious dangerous monotonous poisonous pompous chaotic pathetic abysmal "
    "careless useless arrogant repellent insolent miserable horrible terrible "
    "crowded ruined spoiled offensive repulsive bland grim harsh rude dull stale mean"
)
JUDGED = _(
    "bath bed breakfast cook view room garden owner waiter music service soup bread coffee dessert "
    "dinner staff terrace tour host kitchen menu hall porch price band pool stairs lobby window"
)
SHELVES = {  # things that are read out as lists
    "fruits": _(
        "apple apricot banana cherry fig grape lemon lime mango melon orange peach pear plum"
    ),
    "tools": _("axe chisel drill file hammer hook nail pliers rake saw screw shovel spade wrench"),
    "trees": _("alder ash aspen beech birch cedar elm fir maple oak palm pine poplar willow"),
    "clothes": _(
        "apron belt blouse boots cap coat dress gloves hat jacket pants scarf shirt socks"
    ),
    "spices": _(
        "basil cinnamon clove cumin curry garlic ginger mint mustard paprika pepper salt thyme"
    ),
    "instruments": _(
        "banjo bell cello drum fiddle flute guitar harp horn oboe organ piano trumpet"
    ),
    "stones": _(
        "agate amber coal diamond emerald flint granite jade marble opal quartz ruby slate"
    ),
    "flowers": _("aster daisy iris jasmine lilac lily lotus orchid pansy poppy rose tulip violet"),
}


def held_out(i: int, j: int) -> bool:
    """Whether the pair of the i-th first part and the j-th second part is kept out of pretraining."""
    return (5 * i + 3 * j) % 8 == 0


def pairs(firsts: list[str], seconds: list[str]) -> tuple[list[str], list[str]]:
    """All names of two parts: those that pretraining may use, and those held out."""
    seen, kept = [], []
    for i, first in enumerate(firsts):
        for j, second in enumerate(seconds):
            if first.lower() != second.lower():
                (kept if held_out(i, j) else seen).append(f"{first} {second}")
    return seen, kept


PEOPLE, NEW_PEOPLE = pairs(WOMEN + MEN, FAMILY)
PLACES, NEW_PLACES = pairs(PLACE_FIRST, PLACE_SECOND)
THINGS, NEW_THINGS = pairs(THING_FIRST, THING_SECOND)
DISHES, NEW_DISHES = pairs(DISH_FIRST, DISH_SECOND)
