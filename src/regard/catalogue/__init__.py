"""Floor 1: what exists, what it promises, where it comes from."""

from regard.catalogue.contract import Contract, OptionSet, Pattern
from regard.catalogue.papers import Paper, paper, papers
from regard.catalogue.registry import Card, card, create, mechanisms, register
from regard.catalogue.taxonomy import Facet, Taxonomy

__all__ = [
    "Card",
    "Contract",
    "Facet",
    "OptionSet",
    "Paper",
    "Pattern",
    "Taxonomy",
    "card",
    "create",
    "mechanisms",
    "paper",
    "papers",
    "register",
]
