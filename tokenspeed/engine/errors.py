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
