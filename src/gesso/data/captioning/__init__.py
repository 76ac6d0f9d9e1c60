"""Captions written by models, as plug-ins."""
