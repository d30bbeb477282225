"""The chat: in a terminal, in a pipe, for one question, for a file of questions, in a browser."""
