"""Wordings and grammar behind `tiny_text.describe`: data only.

Placeholders: {np} is the name with its article ("a red apple"), {name} the bare name, {topic} its subgroup's topic, and
{words} a few CLDR keywords ("fruit, food and diet"). {This_is}, {this_is}, {Here_is}, {There_is}, {there_is}, {is},
{has}, {It}, {it_object} and {s} agree in number with the name: "This is", "belong{s}" -> "These are", "belong".
No wording contains the name of a concept, so that a description names its own concept only. A test checks this.
"""

# Openings that name the concept with its article.
OPENINGS = [
    "This picture shows {np}.",
    "The picture shows {np}.",
    "The image shows {np}.",
    "{This_is} {np}.",
    "{Here_is} {np}.",
    "{There_is} {np} in this picture.",
    "{There_is} {np} in the image.",
    "In this picture you can see {np}.",
    "In the image we see {np}.",
    "You can see {np} here.",
    "We are looking at {np}.",
    "You are looking at {np}.",
    "Someone has drawn {np}.",
    "Somebody drew {np}.",
    "This is a drawing of {np}.",
    "This is a small picture of {np}.",
    "This is a simple, colourful drawing of {np}.",
    "The drawing depicts {np}.",
    "What you see here {is} {np}.",
    "On a plain background {there_is} {np}.",
    "The image depicts {np} on a white background.",
    "A cartoon of {np} fills the picture.",
    "A little drawing of {np} can be seen here.",
    "The subject of the image is {np}.",
    "It looks like {np}.",
]

# Openings that give the bare name. They suit every concept, and labels such as "locked" have no others.
LABEL_OPENINGS = [
    "The name of this picture is {name}.",
    "The right name for this image is {name}.",
    "This picture is known as {name}.",
    "This drawing is called {name}.",
    "People call this picture {name}.",
    "The image goes by the name of {name}.",
    "In a list of emoji this one is called {name}.",
    "The title of this drawing is {name}.",
    "This emoji is labelled {name}.",
    "The best caption for this picture is {name}.",
]

# Further openings by group.
GROUP_OPENINGS = {
    "Smileys & Emotion": [
        "In a message about feelings you may see {np}.",
        "To show how they feel, people may send {np}.",
        "As a reply, somebody might choose {np}.",
    ],
    "People & Body": [
        "A friendly drawing portrays {np}.",
        "The drawing is about people, and it shows {np}.",
        "This little portrait shows {np}.",
    ],
    "Animals & Nature": [
        "A story about nature may mention {np}.",
        "The drawing is about the living world, and it shows {np}.",
        "The picture shows {np}, a part of nature.",
    ],
    "Food & Drink": [
        "In the kitchen or on the table you may find {np}.",
        "Somebody hungry or thirsty may think of {np}.",
        "The picture would suit a menu, and it shows {np}.",
    ],
    "Travel & Places": [
        "On your travels you may see {np}.",
        "A postcard could show {np} like this.",
        "Out and about, you may notice {np}.",
    ],
    "Activities": [
        "For a good time, think of {np}.",
        "The picture is about leisure, and it shows {np}.",
        "To talk about leisure, somebody drew {np}.",
    ],
    "Objects": [
        "Among the things people own or use {there_is} {np}.",
        "The drawing is about things, and it shows {np}.",
        "At home or at work you may see {np}.",
    ],
    "Symbols": [
        "On a screen or a notice you may see {np}.",
        "Among the symbols people use {there_is} {np}.",
        "In signs and messages people use {np}.",
    ],
    "Flags": [
        "You can wave {np}.",
        "High up on the mast we see {np}.",
        "Moving in the breeze, we see {np}.",
    ],
}

# Sentences about the topic that may come first, before one of NAMINGS.
TOPIC_FIRST = [
    "The picture is about {topic}.",
    "The theme here is {topic}.",
    "This drawing has to do with {topic}.",
    "We are in the world of {topic}.",
    "This image belongs under {topic}.",
    "Here we have something to do with {topic}.",
    "Among pictures of {topic} you may find this one.",
]
NAMINGS = [
    "It shows {np}.",
    "More exactly, it shows {np}.",
    "You can see {np}.",
    "Someone drew {np}.",
    "To be precise, {this_is} {np}.",
    "In it {there_is} {np}.",
    "The drawing depicts {np}.",
]
LABEL_NAMINGS = [
    "Its name is {name}.",
    "It is known as {name}.",
    "More exactly, it is called {name}.",
    "To be precise, its title is {name}.",
    "It is listed as {name}.",
]

# Single sentences with both name and topic.
COMBINED = [
    "The picture shows {np}, which {has} to do with {topic}.",
    "{This_is} {np}, drawn for the theme of {topic}.",
    "On the theme of {topic}, someone has drawn {np}.",
    "If you think of {topic}, you may well think of {np}.",
]
LABEL_COMBINED = [
    "On the theme of {topic}, this picture is called {name}.",
    "In the section on {topic}, this drawing is called {name}.",
    "Among emoji about {topic}, this one is known as {name}.",
]

TOPIC_FOLLOW_UPS = [
    "{It} {has} to do with {topic}.",
    "{It} belong{s} to the theme of {topic}.",
    "The theme is {topic}.",
    "The picture is about {topic}.",
    "You would find {it_object} in the section on {topic}.",
    "One may file {it_object} under {topic}.",
    "This is one of many pictures about {topic}.",
    "Emoji like this are about {topic}.",
    "People use the picture when they write about {topic}.",
    "{It} would suit a text about {topic}.",
]

WORD_FOLLOW_UPS = [
    "Words that go with {it_object} are {words}.",
    "Related words are {words}.",
    "{It} bring{s} to mind words such as {words}.",
    "Some words for the picture are {words}.",
    "You could also describe {it_object} with the words {words}.",
    "People who search for {it_object} type words like {words}.",
    "The picture goes well with the words {words}.",
    "{It} can be found under words like {words}.",
    "Among the keywords are {words}.",
    "Think of words like {words}.",
    "Further words for the image are {words}.",
    "A dictionary would list {it_object} with {words}.",
]

GROUP_FOLLOW_UPS = {
    "Smileys & Emotion": [
        "The picture tells us something about a feeling.",
        "Such a picture can say more than a sentence.",
        "People send the picture to show how they feel.",
        "It adds a mood to a message.",
    ],
    "People & Body": [
        "The picture is about people and what they do.",
        "It is a picture about us.",
        "It tells us something about people.",
        "The lines are simple and friendly.",
    ],
    "Animals & Nature": [
        "The picture is about nature.",
        "The image is about the living world.",
        "Friends of nature will like the picture.",
        "{It} remind{s} us of the world outdoors.",
    ],
    "Food & Drink": [
        "The picture is about eating and drinking.",
        "The image may make somebody hungry or thirsty.",
        "The drawing would suit a menu or a recipe.",
        "A meal comes to mind.",
    ],
    "Travel & Places": [
        "The picture is about going places and seeing things.",
        "The drawing would suit a travel guide.",
        "{It} make{s} one think of a trip.",
        "{It} may be part of a long journey.",
    ],
    "Activities": [
        "The picture is about things people enjoy doing.",
        "{It} make{s} one think of leisure.",
        "The drawing would suit an invitation.",
        "Play, sports and special days come to mind.",
    ],
    "Objects": [
        "The picture is about the things we use.",
        "{It} may be found at home or at work.",
        "{It} {has} been drawn in a clear and simple way.",
        "Everyday life is full of such things.",
    ],
    "Symbols": [
        "The meaning is understood without a sentence.",
        "One can read the picture at a glance.",
        "The image says something in a short way.",
        "The picture is made of plain shapes.",
    ],
    "Flags": [
        "The cloth moves in the breeze.",
        "{It} can be seen from far away.",
        "The image sends a message without words.",
        "People hold {it_object} up for all to see.",
    ],
}

# The topics of Unicode's subgroups.
TOPICS = {
    "face-smiling": "joy and laughter",
    "face-affection": "love and affection",
    "face-tongue": "fun and silliness",
    "face-hand": "thoughts and gestures",
    "face-neutral-skeptical": "doubt and mixed feelings",
    "face-sleepy": "sleep and rest",
    "face-unwell": "feeling unwell",
    "face-hat": "dressing up",
    "face-glasses": "eyewear",
    "face-concerned": "worry and sadness",
    "face-negative": "anger and bad moods",
    "face-costume": "strange creatures",
    "cat-face": "feline feelings",
    "monkey-face": "monkeys and manners",
    "heart": "love and romance",
    "emotion": "comics and emotions",
    "hand-fingers-open": "gestures with an open palm",
    "hand-fingers-partial": "signs made by hand",
    "hand-single-finger": "pointing",
    "hand-fingers-closed": "gestures with a closed palm",
    "hands": "gestures with both palms",
    "hand-prop": "things done by hand",
    "body-parts": "parts of the body",
    "person": "people of all ages",
    "person-gesture": "gestures and what they mean",
    "person-role": "jobs and roles in life",
    "person-fantasy": "legends and fantasy",
    "person-activity": "what people do all day",
    "person-sport": "sports and exercise",
    "person-resting": "rest and relaxation",
    "person-symbol": "people and traces of people",
    "animal-mammal": "animals with fur or hide",
    "animal-bird": "birds",
    "animal-amphibian": "animals of the pond",
    "animal-reptile": "reptiles",
    "animal-marine": "life in the sea",
    "animal-bug": "insects and other tiny animals",
    "plant-flower": "flowers",
    "plant-other": "plants and trees",
    "food-fruit": "fruit",
    "food-vegetable": "vegetables",
    "food-prepared": "meals and snacks",
    "food-asian": "dishes from Asia",
    "food-sweet": "sweets and desserts",
    "drink": "drinks",
    "dishware": "tableware",
    "place-map": "maps and geography",
    "place-geographic": "landscapes",
    "place-building": "buildings",
    "place-religious": "places of prayer",
    "place-other": "places to visit",
    "transport-ground": "traffic and vehicles",
    "transport-water": "boats and shipping",
    "transport-air": "flying",
    "hotel": "staying away from home",
    "time": "time and clocks",
    "sky-weather": "the weather and the sky",
    "event": "parties and festivals",
    "award-medal": "prizes",
    "sport": "sports",
    "game": "games and toys",
    "arts-crafts": "arts and crafts",
    "clothing": "clothes and things to wear",
    "sound": "sound",
    "music": "music",
    "musical-instrument": "musical instruments",
    "phone": "telephones",
    "computer": "computers",
    "light-video": "light, photos and films",
    "book-paper": "reading and paper",
    "money": "money",
    "mail": "post and messages",
    "writing": "writing and drawing",
    "office": "office work",
    "lock": "keys and locks",
    "tool": "tools and weapons",
    "science": "science",
    "medical": "medicine and health",
    "household": "household goods",
    "other-object": "traditions and remembrance",
    "transport-sign": "signs in public places",
    "warning": "warnings and rules",
    "arrow": "arrows and directions",
    "religion": "religion and belief",
    "zodiac": "the zodiac",
    "av-symbol": "buttons on a player or a screen",
    "gender": "gender",
    "math": "arithmetic",
    "punctuation": "punctuation",
    "currency": "currencies",
    "other-symbol": "signs and marks",
    "keycap": "keys on a phone",
    "alphanum": "letters, numbers and boxes with writing",
    "geometric": "shapes and colours",
    "flag": "flags",
}

# Names used only as labels: adjectives, verbs and fragments that suit no article and no verb.
LABELS = {
    "ZZZ", "airplane arrival", "airplane departure", "chart decreasing", "chart increasing",
    "chart increasing with yen", "children crossing", "copyright", "dashing away", "divide", "dizzy", "foggy",
    "hourglass done", "hourglass not done", "hundred points", "input latin letters", "input latin lowercase",
    "input latin uppercase", "input numbers", "input symbols", "locked", "locked with key", "locked with pen", "minus",
    "mobile phone off", "multiply", "no bicycles", "no entry", "no littering", "no mobile phones",
    "no one under eighteen", "no pedestrians", "no smoking", "om", "palms up together", "plus", "prohibited",
    "radioactive", "raised back of hand", "registered", "rolling on the floor laughing", "speaker high volume",
    "speaker low volume", "speaker medium volume", "star-struck", "sun behind cloud", "sun behind large cloud",
    "sun behind rain cloud", "sun behind small cloud", "unlocked", "vibration mode", "wireless",
}  # fmt: skip

# Names with "the".
DEFINITES = {
    "Statue of Liberty", "kaaba", "milky way", "moon viewing ceremony", "sign of the horns", "star and crescent",
    "star of David", "sun", "vulcan salute", "wheel of dharma",
}  # fmt: skip

# Names without an article: substances, games, proper names.
BARE = {
    "Mrs. Claus", "Mx Claus", "Santa Claus",  # codespell:ignore claus
    "Tokyo tower", "badminton", "bacon", "baggage claim", "baguette bread",
    "bowling", "bread", "breast-feeding", "broccoli", "bubble tea", "butter", "camping", "candy", "canned food",
    "construction", "cooked rice", "cooking", "coral", "currency exchange", "curry rice", "custard", "customs", "dango",
    "dna", "falafel", "field hockey", "fire", "fog", "fondue", "garlic", "ginger root", "green salad", "high voltage",
    "horse racing", "ice", "ice cream", "ice hockey", "infinity", "information", "lacrosse", "leafy green",
    "left luggage", "luggage", "mate", "meat on bone", "money with wings", "mount fuji", "nail polish",
    "non-potable water", "oden", "passport control", "ping pong", "popcorn", "potable water", "pouring liquid", "sake",
    "salt", "shaved ice", "soap", "soft ice cream", "spaghetti", "sushi", "tennis", "thread", "wood", "yarn",
    "yin yang",
}  # fmt: skip

# Head nouns whose ending does not show whether they are plural.
SINGULAR_IN_S = {
    "abacus", "biceps", "bus", "cactus", "crossbones", "fleur-de-lis", "hibiscus", "hippopotamus", "lotus", "minibus",
    "octopus", "rhinoceros", "trolleybus",
}  # fmt: skip
PLURAL_WITHOUT_S = {"people", "women", "men"}

# "a" or "an" depends on the sound, not on the letter.
AN_BY_SOUND = {"NG", "SOS", "x-ray"}
A_BY_SOUND = {"euro", "ewe", "one-piece", "unicorn"}

# Keywords left out: fragments of longer terms, slang, proper names in lower case, words that do not suit a caption.
UNUSED_KEYWORDS = {
    "absolutely", "adorbs", "aesculapius", "again", "age", "annelid", "antarctica", "asia", "ass", "australia",
    "awk", "aww", "baa", "back", "bad", "bae", "bangbang", "barf", "bday", "bestest", "big", "bisexual", "bok",
    "bollywood", "boo", "booze", "breast", "breath", "bro", "bruh", "buckingham", "can", "cha", "choo", "christ",
    "christmas", "cinco", "cmon", "colada", "come", "cost", "cursing", "cussing", "cya", "day", "deg", "deja",
    "done", "doo", "dope", "down", "drugs", "drunk", "dua", "dung", "dunno", "dying", "easy", "eek", "employed",
    "end", "escargot", "everyone", "evidence", "expendable", "extra", "facing", "fart", "feels", "fine", "first",
    "five", "fleek", "fosho", "four", "front", "full", "futbol", "gay", "geez", "genderqueer", "gesundheit",
    "getting", "gone", "good", "gotcha", "gotta", "gramps", "great", "gua", "guapi", "haha", "hahaha", "halloween",
    "handicap", "hanukkah", "hehe", "hit", "hollywood", "huh", "hump", "hurl", "idk", "ily", "intoxicated", "irish",
    "islam", "jack", "jacked", "jel", "jew", "know", "knows", "kuaizi", "lai", "last", "left", "legit", "legs",
    "lesbian", "lgbtqia", "like", "lit", "lmao", "lol", "london", "look", "low", "lust", "male", "mao", "mary",
    "mayo", "meh", "mexican", "mic", "moo", "muah", "nine", "nooo", "nope", "not", "nothing", "nyc", "octoberfest",
    "off", "oktoberfest", "old", "omg", "omw", "once", "one", "outtie", "over", "part", "pga", "pissed", "poo",
    "poop", "probing", "puke", "queer", "ramadan", "rawr", "ready", "real", "rex", "right", "rofl", "roflcopter",
    "roflmao", "russia", "second", "see", "seeing", "semi", "set", "settle", "seven", "sexy", "shaka", "shroom",
    "side", "six", "slots", "snicker", "soft", "sort", "speculum", "straight", "sucks", "sure", "swag", "tache",
    "tada", "tai", "taking", "tale", "ten", "thanksgiving", "third", "this", "three", "tmi", "totally", "trans",
    "ttyl", "tuk", "turd", "twinsies", "two", "type", "ugh", "uhh", "umrah", "under", "underage", "uneven",
    "valentine", "versus", "way", "well", "what", "whatever", "where", "whew", "who", "whoa", "whoops", "why",
    "wisent", "wlan", "woah", "won", "woohoo", "xmas", "xoxo", "yay", "yikes", "yolo", "york", "you", "yup", "zap",
}  # fmt: skip
