"""What clients of a server see, and how much a server holds; see __main__."""
