"""Draw how two tokenizers cut one response, as an SVG.

Prints the same picture for the terminal.
"""

import argparse
from pathlib import Path

from jaxdistill.align import align, to_svg, to_text
from jaxdistill.text import Tokenizer, concatenate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True, help="folder of the student")
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--text", required=True, help="a response; both ends of turn are added")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    arguments = parser.parse_args()
    sides = []
    for folder in (arguments.student, arguments.teacher):
        tokenizer = Tokenizer.load(folder)
        sides.append(concatenate([tokenizer.encode(arguments.text), tokenizer.role_span("end_of_turn")]))
    student, teacher = sides
    alignment = align(student, teacher)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(to_svg(student, teacher, alignment))
    print(to_text(student, teacher, alignment))


if __name__ == "__main__":
    main()
