"""The closed world the conversations speak of: things, their properties, tools, and small talk."""

THINGS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "falcon",
    "garnet",
    "harbor",
    "indigo",
    "jasper",
    "kelp",
    "lotus",
    "maple",
    "nickel",
    "onyx",
    "pearl",
    "quartz",
    "raven",
    "saffron",
    "tulip",
    "umber",
    "violet",
    "willow",
    "xenon",
    "yarrow",
    "zinc",
    "apple",
    "bread",
    "copper",
    "dune",
    "eagle",
    "fern",
]

# What a user may tell and ask back, and what only a lookup tool knows: never the same property.
TOLD_PROPERTIES = ["code", "price", "room", "port"]
LOOKED_UP_PROPERTIES = ["stock", "owner", "status"]
STATUSES = ["open", "closed", "ready", "busy"]

OPERATORS = {"plus": "+", "minus": "-", "times": "*"}

CALCULATOR_NAMES = ["calc", "compute", "math", "calculator"]
CALCULATOR_DESCRIPTIONS = ["Do arithmetic.", "Compute with two numbers."]
CALCULATOR_PARAMETERS = [("a", "op", "b"), ("x", "op", "y"), ("left", "sign", "right")]

LOOKUP_NAMES = ["lookup", "fetch", "query", "find"]
LOOKUP_DESCRIPTIONS = ["Look up a field.", "Find a value."]
LOOKUP_PARAMETERS = [("key", "field"), ("name", "field"), ("item", "what"), ("key", "what")]

TOTAL_NAMES = ["total", "sum", "add_all"]
TOTAL_DESCRIPTIONS = ["Add up a list.", "Sum of numbers."]
TOTAL_PARAMETERS = ["values", "numbers", "list"]

SMALL_TALK = {
    "Hello!": "Hello! How can I help?",
    "Hi there.": "Hello! How can I help?",
    "Good morning.": "Good morning! How can I help?",
    "How are you?": "I am fine, thank you.",
    "Who are you?": "I am a tiny agent.",
    "What can you do?": "I remember facts and call tools.",
    "Thank you.": "You are welcome.",
    "Thanks!": "You are welcome.",
    "Goodbye.": "Goodbye!",
    "Are you there?": "Yes, I am here.",
}

SYSTEM_PROMPT = "You are a helpful agent."
