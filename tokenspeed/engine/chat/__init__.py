"""Conversations, whoever brings them: what was asked as the engine's request, what came as the parts of a turn."""
