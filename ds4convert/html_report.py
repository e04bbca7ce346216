"""stub"""
def write(page: object, folder: object, outcome: object) -> None:
    """."""
