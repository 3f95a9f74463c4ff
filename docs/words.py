"""Words that this project does not use, and what it says instead: `python docs/words.py`.

Spelling is codespell's work. This list holds words that are spelled right and read wrong: they name
something that the field calls otherwise, or come from another language.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A pattern, what to write instead, and how many places still have it.
WORDS = (
    (r"\bfeeds?\b(?![-_ ]?forward|\")", "a loader, or to pass", 0),
    (r"\blogbooks?\b", "a metrics logger", 0),
    (r"\bfootage\b", "videos", 0),
    (r"\brivals?\b", "baselines", 0),
    (r"\b(a|the|of|two) ways? in\b(?! which)|\*\*way in\*\*", "an extension point", 0),
    (r"\bgone on with\b", "continued", 0),
    (r"\bshowings?\b(?! \w)", "a validation, or a presentation", 0),
    (r"\boutcomes?\b", "a result", 0),
    (r"\bdoors?\b", "an entry point, or what is really meant", 0),
    (r"\bguards?\b", "a check", 1),
    (r"\bthr\b", "threshold", 2),
    (r"\bspoilt\b", "changed", 0),
    (r"\bfor want of\b", "because there was no", 1),
    (r"\bcounts nowhere\b", "is not counted", 0),
    (r"\b(is|are|was|were) gone (on|through)\b", "continued, examined", 0),
    (r"\bas (good|far) as .{1,30} goes\b", "a plain sentence", 0),
    (r"``", "single backticks", 5),
    (r"^ {8,12}\w+: (of|as of|like|as|as in) ", "a noun: `size: The size of ...`", 12),
)
FOLDERS = ("src", "docs", "benchmarks", "comfyui")


def main() -> int:
    """Name every place that has such a word, where there are more of them than there were."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files += ROOT.glob("*.md")
    texts = {
        path.relative_to(ROOT): path.read_text(encoding="utf-8")
        for path in sorted(files)
        if path.suffix in (".py", ".md") and path != Path(__file__)
    }
    failed = False
    for pattern, better, allowed in WORDS:
        found = [
            f"{path}:{number}: {line.strip()}"
            for path, text in texts.items()
            # Code blocks of Markdown begin and end with backticks.
            for number, line in enumerate(text.splitlines(), 1)
            if re.search(pattern, line, re.IGNORECASE) and not line.lstrip().startswith("```")
        ]
        if len(found) > allowed:
            failed = True
            rule = f"{pattern}: write {better} ({len(found)} places, {allowed} allowed)"
            sys.stdout.write("\n".join([rule, *found, ""]) + "\n")
        elif len(found) < allowed:
            sys.stdout.write(f"{pattern}: {len(found)} places, {allowed} allowed\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
