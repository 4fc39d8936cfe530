"""The demonstration: the main job on real components, each claim checked as it is made."""
