"""Hypothesis without deadlines: how long an example takes says nothing about the code on a busy machine."""

from hypothesis import settings

settings.register_profile("gesso", deadline=None)
settings.load_profile("gesso")
