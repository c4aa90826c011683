"""Write a report as an HTML page."""

from pathlib import Path

from ee_llm.evaluation.report.content import gather
from ee_llm.evaluation.report.options import ReportOptions
from ee_llm.evaluation.report.page import page_of


def report(options: ReportOptions, output: Path) -> None:
    """Measure the exits, generate samples, and write the page.

    Args:
        options: The options.
        output: The HTML file to write.

    Raises:
        UserError: The options, the text or the checkpoint is not valid, or a file is not for this
            model.
        RunError: The loss of an exit is not finite.
    """
    output.write_text(page_of(gather(options)), encoding="utf-8")
