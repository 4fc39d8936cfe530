"""Conditions of rules: CEL, parsed and evaluated by its official runtime. SQL is built from ``tree``."""

from segsvc.conditions.condition import Condition, parse_condition

__all__ = ["Condition", "parse_condition"]
