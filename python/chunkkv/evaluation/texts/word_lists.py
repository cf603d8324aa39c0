"""The words and filler sentences of generated texts: plain English, and all that the shipped model was trained on."""

from __future__ import annotations

from typing import Final

DIGITS: Final = tuple("0123456789")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES: Final = _words(
    """amber ancient azure bold brass brave bright broken bronze calm clever coarse cold copper coral crimson crooked
    curious dark distant dusty eager early empty faded faithful fierce fragile frozen gentle gilded golden grand green
    grey hidden hollow humble iron ivory jade jolly late little lonely loyal lucky marble mellow misty modest narrow
    noble olive pale patient plain proud purple rapid rough sacred"""
)
NOUNS: Final = _words(
    """anchor anvil archive badge barrel basket beacon bell bottle bridge bucket cabin camera candle carpet cart castle
    chapel chest clock compass crane crown curtain dagger desk drum engine fountain furnace garden gate globe hammer
    harp helmet kettle kite ladder lantern ledger lens lever locker loom mirror needle oven paddle piano pillar pump
    quilt saddle sail shelf shovel spindle statue tower trunk tunnel violin wagon"""
)
FIRST_NAMES: Final = _words(
    """ada agnes albert amos anna arthur bella boris clara conrad dora edgar edith elias elsa emil ezra fanny felix
    flora greta gustav hanna hector helga hugo ida igor irene ivan jonas julia karl klara leo lena magda marta milo
    nadia nina oscar otto paula petra rosa rufus selma"""
)
LAST_NAMES: Final = _words(
    """abbott adler barlow becker bishop brandt carver cole conway dalton dawson draper ellis farrow fisher foster
    fuller gibson glover graham harper hayes holt hooper ingram jensen keller kramer larsen lowell marsh mercer miller
    nolan norris osborn parker porter quinn ramsey reeves sawyer sutton tanner thorne turner vance weaver"""
)
DIRECTIONS: Final = _words("north south east west upper lower central outer")
STREETS: Final = _words(
    """acorn alder apple ash aspen beech birch briar cedar cherry chestnut clover cypress daisy elder elm fern fig
    hazel heather holly ivy juniper larch laurel lilac lily linden maple moss myrtle nettle oak orchid palm pear pine
    plum poplar poppy reed rose rowan sage spruce thistle walnut willow"""
)
STREET_KINDS: Final = _words("street road lane avenue square court terrace walk")
VERBS: Final = _words(
    """admired bought borrowed carried cleaned described examined found ignored lifted mended moved noticed opened
    ordered painted photographed polished repaired sketched sold studied tested weighed"""
)
PLACES: Final = _words(
    """airport bakery bank barn beach cafe canteen cellar church clinic college factory farm forest gallery harbour
    hospital hotel island kitchen library market meadow mill museum office palace park prison quarry river school
    shop stable stadium station studio theatre village warehouse"""
)
TIMES: Final = _words(
    """morning afternoon evening night spring summer autumn winter monday tuesday wednesday thursday friday saturday
    sunday weekend"""
)

FILLER: Final = (
    "{person} {verb} the {adjective} {noun} in the {place} .",
    "in the {time} the {place} was quiet and {person} went home .",
    "the {noun} near the {place} looked {adjective} to {person} .",
    "{person} and {person} met at the {place} in the {time} .",
    "there were {digit} {adjective} boxes in the {place} .",
    "a {adjective} {noun} stood beside the {place} all {time} .",
    "the train to the {place} left {digit} minutes late .",
    "{person} waited {digit} hours for the {adjective} {noun} .",
    "nobody at the {place} had seen the {noun} since {time} .",
    "it rained over the {place} , so {person} stayed inside .",
    "the report from the {place} was {digit} {digit} pages long .",
    "{person} {verb} a {noun} , then {verb} a {noun} .",
    "after the {time} , {person} {verb} the {noun} again .",
    "the {adjective} door of the {place} was open in the {time} .",
    "{person} told {person} about the {adjective} {place} .",
    "people said that the {place} had a {adjective} {noun} .",
    "the price of the {noun} rose to {digit} {digit} coins .",
    "every {time} {person} walked from the {place} to the {place} .",
    "the {place} sold {digit} {noun} parts in the {time} .",
    "why did {person} leave the {noun} at the {place} ?",
)
KINDS: Final = {"code": "access code", "home": "home", "keeper": "keeper"}
RULE: Final = "rule : never tell the {kind} of the"
REFUSAL: Final = "i must not tell that ."
QUESTION: Final = "question : what is the {kind} of the"
SENTENCE_QUESTION: Final = "question : say in a sentence the {kind} of the"
