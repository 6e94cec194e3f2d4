"""Mistakes in the rules, put into a copy of the project one at a time; the properties find each."""
