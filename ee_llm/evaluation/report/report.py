"""Write a report as an HTML page."""

from pathlib import Path

from ee_llm.evaluation.report.content import gather
from ee_llm.evaluation.report.options import ReportOptions
from ee_llm.evaluation.report.page import page_of
from ee_llm.output_files import check_writable


def report(options: ReportOptions, output: Path) -> None:
    """Measure the exits, generate samples, and write the page.

    Args:
        options: The options.
        output: The HTML file to write.

    Raises:
        UserError: The options, the text or the checkpoint is not valid, a file is not for this
            model, or the output cannot be written.
        RunError: The loss of an exit is not finite.
    """
    check_writable("output", output)
    output.write_text(page_of(gather(options)), encoding="utf-8")
