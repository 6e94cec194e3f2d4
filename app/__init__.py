"""A microservice that charges a student's prepaid balance for an item."""

__version__ = "0.1.0"
