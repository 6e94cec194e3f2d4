"""A microservice that charges a student's prepaid balance for an item."""
