"""What can go wrong, each with one line that names the culprit and the way out."""

LONGEST = 500  # characters of a message


def one_line(message: str, longest: int = LONGEST) -> str:
    """A message in one line; of one that quotes something long, the middle is left out."""
    line = " ".join(message.split())
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"


class MinpaintError(ValueError):
    """Base of every error minpaint raises on purpose; its message is one line of up to `longest` characters."""

    def __init__(self, message: str, longest: int = LONGEST) -> None:
        super().__init__(one_line(message, longest))


class InputError(MinpaintError):
    """An argument, an image or a mask that cannot be used."""


class CheckpointError(MinpaintError):
    """Weights or a configuration that are missing, damaged or not supported."""


class ModelNotFoundError(InputError, CheckpointError):
    """No such model: the argument is wrong, or its weights are missing; catch it as either."""


class BudgetError(MinpaintError):
    """A memory budget that cannot hold the run."""


class SafetyError(MinpaintError):
    """A painting that the checkpoint's safety checker flags."""


class MinpaintWarning(UserWarning):
    """Something the user should know although the run goes on; one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
