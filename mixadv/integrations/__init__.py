"""Adapters to frameworks, each of which imports its framework only here."""
