"""The products service: whether an item is for sale."""
