#!/usr/bin/env python3
"""Prints what one run of the CRI conformance suite found.

    tests/critest/summary.py HANDLER EXCEPTIONS REPORT

REPORT is what ginkgo's --json-report wrote. Each spec is printed with its state, failures and skips with their reason.
Status 1 if a spec failed or skipped itself that EXCEPTIONS does not list for HANDLER, if a listed one passed, or if none
ran.
"""

import json
import re
import sys


def specs(path):
    """State, seconds and message by name; specs that a filter left out are not among them, but counted."""
    with open(path, encoding="utf-8") as file:
        suites = json.load(file)
    found, filtered = {}, 0
    for suite in suites:
        for report in suite.get("SpecReports") or []:
            if report.get("LeafNodeType") != "It":
                # The suite's own set-up: of interest only if it failed, since no spec runs then.
                if report["State"] in ("passed", "skipped"):
                    continue
            message = (report.get("Failure") or {}).get("Message") or ""
            if report["State"] == "skipped" and not message:
                filtered += 1
                continue
            state = report["State"] if report["State"] in ("passed", "skipped", "pending") else "failed"
            name = " ".join([*(report.get("ContainerHierarchyTexts") or []), report["LeafNodeText"]])
            found[name] = (state, report["RunTime"] / 1e9, tidy(message))
    return found, filtered


def tidy(message):
    """One line, without what differs from run to run."""
    message = " ".join(message.split())
    message = re.sub(r"<\*?[\w./]+ \| 0x[0-9a-f]+>: ?", "", message)
    message = re.sub(r"\s*\{ ?(s|msg|error|Op|Code): .*", "", message)
    message = re.sub(r"\b[0-9a-f]{64}\b", "<id>", message)
    return message[:600]


def exceptions(path, handler):
    """Reason by name, where a name may end in * for all that begin so."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            parts = [part.strip() for part in line.split("|")]
            if len(parts) != 3 or parts[0] not in ("microvm", "host", "*") or not parts[1] or not parts[2]:
                sys.exit(f"{path}:{number}: not of the form: HANDLER | name of the spec | reason")
            if parts[0] in (handler, "*"):
                found[parts[1]] = parts[2]
    return found


def why_excepted(excepted, name):
    """The reason why this spec need not pass, or None."""
    for pattern, reason in excepted.items():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return reason
    return None


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    handler, excepted = sys.argv[1], exceptions(sys.argv[2], sys.argv[1])
    found, filtered = specs(sys.argv[3])
    by_state = {state: [] for state in ("passed", "skipped", "pending", "failed")}
    wrong = []
    for name, (state, seconds, message) in sorted(found.items()):
        by_state[state].append(name)
        reason, note = why_excepted(excepted, name), f": {message}" if message else ""
        if state == "passed" and reason:
            wrong.append(name)
            note = ": it is listed as an exception; take it off the list"
        elif state != "passed" and reason:
            note = f": an exception: {reason}"
        elif state != "passed":
            wrong.append(name)
            state = state.upper()
        print(f"{state:8}{seconds:7.1f} s  {name}{note}")
    counts = ", ".join(f"{len(names)} {state}" for state, names in by_state.items() if names)
    print(f"critest, handler {handler}: {counts or 'no spec ran'}; {filtered} filtered out; {len(wrong)} not as expected")
    sys.exit(1 if wrong or not found else 0)


main()
