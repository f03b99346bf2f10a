"""The error that every function of this package raises."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit.

    The message says what is wrong, what was found and what to do.
    """


class RefusedError(CheckpointError):
    """A checkpoint holds an object that safe loading refuses.

    Args:
        message (str): What is wrong and what to do.
        name (str): The object, as ``'os.system'``.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name
