"""Seconds of each test file in a report that ``pytest --junit-xml`` wrote, the slowest first."""

import sys
from collections import Counter
from xml.etree import ElementTree


def main(report: str) -> None:
    """Print the table; several workers share the wall time that is said last."""
    try:
        suite = ElementTree.parse(report).getroot()[0]
    except OSError:
        sys.exit(f"error: there is no {report}; run the tests first")
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for case in suite.iter("testcase"):
        file = case.get("classname", "").split(".")[1]
        seconds[file] += float(case.get("time", "0"))  # type: ignore[assignment]
        tests[file] += 1
    for file, spent in seconds.most_common():
        print(f"{spent:8.1f} s  {tests[file]:4} tests  {file}")
    print(f"{seconds.total():8.1f} s  {tests.total():4} tests, in {float(suite.get('time', '0')) / 60:.1f} minutes")


if __name__ == "__main__":
    main(sys.argv[1])
