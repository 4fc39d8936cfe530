"""Conditions of rules: CEL, read and judged by its official runtime; ``tree`` is what SQL is made from."""

from segsvc.conditions.condition import Condition, parse_condition

__all__ = ["Condition", "parse_condition"]
