"""Logging for the command line."""

import logging

_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


def configure_logging() -> None:
    """Show the package's log messages from level INFO on standard error, on rank 0 only.

    The command line calls this once; a program that imports the package configures
    `logging.getLogger("ee_llm")` itself. Warnings and errors start with their level. Further calls
    change nothing.
    """
    logger = logging.getLogger("ee_llm")
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may have configured the root logger


class _ConsoleHandler(logging.Handler):
    """Prints records through the rich console, which keeps them clear of progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        # Imports torch, which would slow down commands that log nothing.
        from ee_llm.distributed.console import print_line

        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            print_line(text, _STYLES.get(record.levelno))
        except Exception:
            self.handleError(record)
