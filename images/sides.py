"""The sides of an image as the flags and a config have them: a number, or "HEIGHTxWIDTH"."""


def sides(image_size: int | str) -> tuple[int, int]:
    """(height, width) of "HEIGHTxWIDTH" or of one number for both. Raises ValueError unless 4 divides both."""
    height, cross, width = str(image_size).lower().partition("x")
    try:
        both = int(height), int(width if cross else height)
    except ValueError:
        both = 0, 0
    if not all(4 <= side <= 4096 and side % 4 == 0 for side in both):
        kind = "multiples of 4 from 4 to 4096: one number, or HEIGHTxWIDTH"
        raise ValueError(f"must be {kind}, got {image_size}")
    return both


def image_size(text: str) -> int | str:
    """An image size as a config keeps it: a number, or "HEIGHTxWIDTH" if the sides differ. Raises ValueError."""
    height, width = sides(text)
    return height if height == width else f"{height}x{width}"
