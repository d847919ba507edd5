"""The kinds of question, and how each is asked."""

from __future__ import annotations

from collections.abc import Mapping

WORDINGS: Mapping[str, tuple[str, ...]] = {
    "existence": (
        "Is there {a} in the picture?",
        "Do you see {a}?",
        "Does the picture show {a}?",
        "Can {a} be seen in this photograph?",
        "Is {a} visible here?",
        "Would you say that there is {a} in the image?",
    ),
    "colour": (
        "What colour is the {name}?",
        "Which colour does the {name} have?",
        "Tell me the colour of the {name}.",
        "The {name} in the picture is of which colour?",
        "How would you call the colour of the {name}?",
        "In which colour do you see the {name}?",
    ),
    "place": (
        "Where is the {name}?",
        "In which corner is the {name}?",
        "Which corner of the picture holds the {name}?",
        "Where in the picture do you see the {name}?",
        "Tell me the corner that the {name} is in.",
        "Find the {name}: which corner?",
    ),
    "left": (
        "Is the {name} to the left of the {other}?",
        "Is the {name} further left than the {other}?",
        "Does the {name} stand left of the {other}?",
        "Looking from left to right, does the {name} come before the {other}?",
        "Do you find the {name} on the left side of the {other}?",
        "Would you say that the {name} is left of the {other}?",
    ),
    "count": (
        "How many {names} are there?",
        "How many {names} do you see?",
        "Count the {names}.",
        "What is the number of {names} in the picture?",
        "Tell me how many {names} the picture shows.",
        "The picture shows how many {names}?",
    ),
    "what": (
        "What is at the {place}?",
        "What do you see at the {place}?",
        "Name the thing in the {place} corner.",
        "Which thing is at the {place}?",
        "The {place} corner holds what?",
        "Tell me what stands at the {place}.",
    ),
}
KINDS = tuple(WORDINGS)
