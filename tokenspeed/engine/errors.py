"""The errors a caller may see. Each message names the offending value and what would be right."""


class TokenSpeedError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(TokenSpeedError):
    """A configuration or a checkpoint cannot be used."""


class RequestError(TokenSpeedError):
    """One request is invalid; others are unaffected."""


class CapacityError(TokenSpeedError):
    """More memory was asked for than there is."""


class PlacementError(TokenSpeedError):
    """Two stages of a program do not fit on the ranks they are placed on."""


class CorruptedError(TokenSpeedError):
    """The model's numbers for one request are not finite, so it ended; others are unaffected."""


class EngineError(TokenSpeedError):
    """The engine itself failed and serves nobody any more."""


class LogError(TokenSpeedError):
    """A step log cannot be read, or does not fit the model it is replayed on."""


class TransferError(TokenSpeedError):
    """State could not be brought from one engine to another; the prompt is then computed where it is needed."""


class HandshakeError(TransferError):
    """Two engines do not fit. field: in what; ours, theirs: what each has."""

    def __init__(self, field: str, ours: str, theirs: str):
        super().__init__(
            f"the other engine has another {field}: {theirs} there, {ours} here; both must have the same to exchange "
            "state."
        )
        self.field, self.ours, self.theirs = field, ours, theirs
